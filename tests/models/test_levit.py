"""LeViT: the authors' figures, every option of the config, folding BatchNorm, other sizes, mixed precision."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import reference
from numpy.testing import assert_allclose
from torch import Tensor, nn

from deit_models import ConfigError, attention_maps, create_model, from_pretrained, list_models, model_info
from deit_models.models.layers import DropPath
from deit_models.models.levit import LeViT, LeViTConfig, NormLinear, ScoredAttention
from deit_models.training.optim import parameter_groups

GOLDEN = ("levit_128s", "levit_256")
VARIANTS = ("levit_128s", "levit_128", "levit_192", "levit_256", "levit_384")
# counted by the authors' scripts: parameters, those left after folding, multiply-accumulates
PUBLISHED = {
    "levit_128s": (7_777_058, 7_756_466, 305_108_946),
    "levit_128": (9_213_936, 9_188_864, 406_114_880),
    "levit_192": (10_947_069, 10_918_613, 657_601_916),
    "levit_256": (18_893_876, 18_856_276, 1_128_024_056),
    "levit_384": (39_128_836, 39_074_100, 2_352_935_380),
}
SMALL: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 7,
    "embed_dim": (16, 24, 32),
    "depth": (1, 2, 1),
    "num_heads": (2, 3, 4),
    "key_dim": 8,
}


def randomise(model: nn.Module) -> None:
    """Draw every number, in place: fresh BatchNorms are the identity, and fresh residual branches give 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith(("bn.weight", "bn.bias", "running_mean")):
                tensor.normal_(0.5, 0.3, generator=generator)
            elif name.endswith("attention_biases"):
                tensor.normal_(0, 1, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)


def small(**overrides: Any) -> LeViT:
    model = LeViT(LeViTConfig(**{**SMALL, **overrides}))
    randomise(model)
    return model.eval()


def images(height: int = 64, width: int | None = None, *, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[False, True], ids=["plain", "distilled"])
def distilled(request: pytest.FixtureRequest) -> bool:
    return request.param


# Golden figures of the authors' code


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request: pytest.FixtureRequest) -> tuple[dict[str, Any], LeViT]:
    model = create_model(request.param)
    missing, unexpected = model.load_state_dict(reference.weights(request.param), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return reference.read(request.param), model.eval()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_filling_is_the_recorded_one(name: str) -> None:
    reference.check_filling(name)


@torch.inference_mode()
def test_golden_logits_and_features(golden: tuple[dict[str, Any], LeViT]) -> None:
    recorded, model = golden
    outputs, x = recorded["outputs"], reference.inputs(224)
    heads = model.forward_heads(x)
    assert_allclose(model(x), outputs["logits"], rtol=0, atol=1e-4)
    assert_allclose(heads.cls, outputs["logits_cls"], rtol=0, atol=1e-4)
    assert_allclose(heads.dist, outputs["logits_dist"], rtol=0, atol=1e-4)
    assert_allclose(model.embed(x)[0], outputs["features"], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_golden_logits_of_the_folded_model(golden: tuple[dict[str, Any], LeViT]) -> None:
    recorded, model = golden
    fused = model.fuse()
    assert_allclose(fused(reference.inputs(224)), recorded["fused"]["logits"], rtol=0, atol=1e-4)
    assert sum(p.numel() for p in fused.parameters()) == recorded["fused"]["num_params"]


def test_golden_config(golden: tuple[dict[str, Any], LeViT]) -> None:
    recorded, config = golden[0]["config"], golden[1].config
    for key in ("img_size", "in_chans", "num_classes"):
        assert getattr(config, key) == recorded[key]
    for key in ("embed_dim", "depth", "num_heads"):
        assert list(getattr(config, key)) == recorded[key]
    for key in ("key_dim", "attn_ratio", "mlp_ratio"):
        assert {getattr(config, key)} == set(recorded[key])
    sides = [recorded["down_ops"][0]["resolution_in"], *(op["resolution_out"] for op in recorded["down_ops"])]
    assert config.grids == tuple((side, side) for side in sides)
    epsilons = {m.eps for m in golden[1].modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}
    assert epsilons == {recorded["norm_eps"]}


def test_golden_state_dict_names_shapes_and_order(golden: tuple[dict[str, Any], LeViT]) -> None:
    recorded, model = golden
    ours = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    stored = [e for e in recorded["state_dict"] if not e["name"].endswith("attention_bias_idxs")]
    assert ours == [(e["name"], e["shape"], f"torch.{e['dtype']}") for e in stored]
    assert sum(p.numel() for p in model.parameters()) == recorded["num_params"]["total"]


@pytest.mark.parametrize("name", VARIANTS)
def test_published_counts(name: str) -> None:
    params, fused_params, macs = PUBLISHED[name]
    info = model_info(name)
    model = create_model(name, device="meta")
    # the authors also count one operation for each entry of a softmax
    entries = sum(m.num_heads * m.offsets.numel() for m in model.modules() if isinstance(m, ScoredAttention))
    assert info.params == params
    assert info.macs + entries == macs
    assert sum(p.numel() for p in model.fuse().parameters()) == fused_params
    assert (info.family, info.distilled, info.licence, info.input_size) == ("levit", True, "Apache-2.0", 224)
    assert info.preprocessing.resize == 256
    assert info.preprocessing.interpolation == "bicubic"


def test_all_variants_are_listed() -> None:
    assert list_models("levit_*", pretrained=True) == list(VARIANTS)


# Every option does something

# field -> (another value, where the change must show)
FLIPS: dict[str, tuple[Any, str]] = {
    "img_size": (32, "parameters"),
    "in_chans": (1, "parameters"),
    "num_classes": (5, "parameters"),
    "embed_dim": ((16, 24, 40), "parameters"),
    "depth": ((1, 1, 1), "parameters"),
    "num_heads": ((2, 3, 5), "parameters"),
    "key_dim": (4, "parameters"),
    "attn_ratio": (3, "parameters"),
    "mlp_ratio": (3, "parameters"),
    "distilled": (False, "parameters"),
    "drop_rate": (0.5, "training"),
    "drop_path_rate": (0.5, "training"),
}


def observe(config: LeViTConfig) -> dict[str, Any]:
    model = LeViT(config)
    randomise(model)
    model.eval()
    x = images(*config.image_hw, channels=config.in_chans)
    seen: dict[str, Any] = {"parameters": {name: tuple(p.shape) for name, p in model.named_parameters()}}
    seen["eval"] = model(x).tolist()
    torch.manual_seed(0)
    seen["training"] = [logits.tolist() for logits in model.train().forward_heads(x) if logits is not None]
    return seen


def test_every_option_has_a_flip() -> None:
    assert set(FLIPS) == {field.name for field in dataclasses.fields(LeViTConfig)}


@pytest.mark.parametrize("field", FLIPS)
def test_option_changes_the_model(field: str) -> None:
    value, place = FLIPS[field]
    before, after = observe(LeViTConfig(**SMALL)), observe(LeViTConfig(**{**SMALL, field: value}))
    assert before[place] != after[place]
    if place == "training":
        assert before["parameters"] == after["parameters"]
        assert before["eval"] == after["eval"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 230}, "img_size=230 is not a multiple of patch_size=16; use 224 or 240"),
        ({"img_size": (64, 30)}, "img_size=30 is not a multiple of patch_size=16"),
        ({"img_size": (64, 64, 3)}, "neither a whole number nor"),
        ({"img_size": 64.0}, "neither a whole number nor"),
        ({"embed_dim": (12, 24, 32)}, r"embed_dim=\(12, 24, 32\); expected the first a multiple of 8"),
        ({"key_dim": 17}, "none below key_dim=17"),
        ({"embed_dim": ()}, "one whole number above 0 for each stage"),
        ({"depth": (1, 2)}, r"depth=\(1, 2\); expected one whole number above 0 for each stage"),
        ({"num_heads": (2, 0, 4)}, r"num_heads=\(2, 0, 4\); expected one"),
        ({"num_heads": 4}, "num_heads=4; expected one"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"mlp_ratio": 1.5}, "mlp_ratio=1.5 is not a whole number"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
    ],
)
def test_impossible_config_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LeViTConfig(**{**SMALL, **options})


def test_lists_become_tuples() -> None:
    config = LeViTConfig(**{**SMALL, "img_size": [32, 64], "depth": [1, 2, 1]})
    assert (config.image_hw, config.depth) == ((32, 64), (1, 2, 1))
    assert hash(config) == hash(dataclasses.replace(config))


# Attention


def test_score_bias_is_looked_up_by_offset_without_sign() -> None:
    model = small(img_size=(48, 80))  # 3 x 5 positions, then 2 x 3
    attention, shrink = model.blocks[0].m, model.blocks[2]
    biases = attention.attention_biases
    full = attention.score_bias()
    assert full.shape == (2, 15, 15)
    row, column = divmod(7, 5)
    other_row, other_column = divmod(13, 5)
    column_of_offset = abs(row - other_row) * 5 + abs(column - other_column)
    assert torch.equal(full[:, 7, 13], biases[:, column_of_offset])
    assert torch.equal(full, full.transpose(1, 2))
    strided = shrink.score_bias()
    assert strided.shape == (2, 6, 15)
    # query 4 stands at row 2, column 2 of the keys' map; key 4 at row 0, column 4
    assert torch.equal(strided[:, 4, 4], shrink.attention_biases[:, 2 * 5 + 2])


def test_attention_maps_are_what_the_forward_pass_uses() -> None:
    model, x = small(img_size=(48, 80)), images(48, 80)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, ScoredAttention):
            module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    model(x)
    forward = list(seen)
    maps = attention_maps(model, x)
    assert [tuple(m.shape) for m in maps] == [
        (2, 2, 15, 15),
        (2, 2, 6, 15),
        *[(2, 3, 6, 6)] * 2,
        (2, 3, 2, 6),
        (2, 4, 2, 2),
    ]
    for probabilities, (module, tokens, out) in zip(maps, forward, strict=True):
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:3]))
        value = module.heads(tokens)[2]
        torch.testing.assert_close(module.proj((probabilities @ value).transpose(1, 2).flatten(2)), out)


def test_intermediate_layers_are_the_stages() -> None:
    model, x = small(img_size=(48, 80)), images(48, 80)
    stages = model.get_intermediate_layers(x, 3)
    assert [tuple(stage.patches.shape) for stage in stages] == [(2, 16, 3, 5), (2, 24, 2, 3), (2, 32, 1, 2)]
    assert stages[-1].prefix.shape == (2, 0, 32)
    torch.testing.assert_close(stages[-1].patches.flatten(2).transpose(1, 2), model.forward_features(x))
    last, first = model.get_intermediate_layers(x, [-1, 0])
    torch.testing.assert_close(last.patches, stages[2].patches)
    torch.testing.assert_close(first.patches[:, :, 1, 2], model.blocks[:2](model.forward_tokens(x))[:, 7])
    with pytest.raises(ConfigError, match="stages 0 to 2"):
        model.get_intermediate_layers(x, 4)


# Heads


def test_heads_read_the_mean_of_all_positions(distilled: bool) -> None:
    model, x = small(distilled=distilled), images()
    heads, features = model.forward_heads(x), model.forward_features(x).mean(dim=1)
    torch.testing.assert_close(model.embed(x), features)
    torch.testing.assert_close(heads.cls, model.head(features))
    if not distilled:
        assert heads.dist is None
        torch.testing.assert_close(model(x), heads.cls)
        assert isinstance(model.train()(x), Tensor)
        return
    torch.testing.assert_close(heads.dist, model.head_dist(features))
    torch.testing.assert_close(model(x), (heads.cls + heads.dist) / 2)
    cls, dist = model.train()(x)
    assert not torch.equal(cls, dist)


def test_new_heads_begin_fresh_and_keep_the_body(tmp_path: Path) -> None:
    create_model("levit_128s", **SMALL).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, num_classes=3)
    assert model(images()).shape == (2, 3)
    for head in (model.head, model.head_dist):
        assert isinstance(head, NormLinear)
        assert torch.equal(head.bn.running_var, torch.ones(32))
        assert head.bn.num_batches_tracked == 0
        assert 0.01 < head.l.weight.std() < 0.03


# Folding


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_folded_model_gives_the_same_logits(name: str) -> None:
    model = create_model(name, depth=(1, 1, 1))
    randomise(model)
    model.eval()
    x = images(224, batch=1)
    logits, fused = model(x), model.fuse()(x)
    assert logits.std() > 0.1
    assert (fused - logits).abs().max() <= 1e-4 * (logits.max() - logits.min())


def test_folding_leaves_the_model_as_it_was(distilled: bool) -> None:
    model = small(distilled=distilled).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = model.fuse()
    assert model.training
    assert not fused.training
    assert fused.is_fused
    assert not model.is_fused
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [m for m in fused.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    fused.head.weight.zero_()
    assert not torch.equal(model.head.l.weight, torch.zeros_like(model.head.l.weight))
    torch.testing.assert_close(fused.fuse()(images()), fused(images()))


def test_folded_model_keeps_what_is_called_on_a_model() -> None:
    model = create_model("levit_128s", **SMALL).eval()
    randomise(model)
    fused, x = model.fuse(), images()
    assert fused.config == model.config
    assert fused.origin == model.origin
    for own, other in zip(attention_maps(fused, x), attention_maps(model, x), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(fused.embed(x), model.embed(x), atol=1e-4, rtol=1e-4)


def test_folded_model_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    fused = create_model("levit_128s", **SMALL).fuse()
    with pytest.raises(ConfigError, match="no BatchNorm left to train"):
        fused.train()
    assert fused.eval() is fused
    with pytest.raises(ConfigError, match="save the model it came from"):
        fused.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Sizes


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (80, 48), (112, 112)])
def test_any_multiple_of_sixteen_can_be_built_and_loaded(size: tuple[int, int], tmp_path: Path) -> None:
    model = create_model("levit_128s", **SMALL)
    randomise(model)
    model.save_pretrained(tmp_path)
    at_size = from_pretrained(tmp_path, img_size=size)
    assert at_size(images(*size)).shape == (2, 7)
    assert at_size.config.image_hw == size
    assert at_size.origin.preprocessing.crop == size
    back = at_size.fit_state(at_size.state_dict(), at_size.config)
    assert all(torch.equal(back[name], tensor) for name, tensor in at_size.state_dict().items())


def test_resized_biases_keep_zero_and_largest_offset() -> None:
    model, larger = small(img_size=64), small(img_size=(96, 128))  # 4 x 4 positions to 6 x 8
    state = larger.fit_state(model.state_dict(), model.config)
    before = model.blocks[0].m.attention_biases.unflatten(1, (4, 4))
    after = state["blocks.0.m.attention_biases"].unflatten(1, (6, 8))
    torch.testing.assert_close(after[:, 0, 0], before[:, 0, 0])
    torch.testing.assert_close(after[:, -1, -1], before[:, -1, -1])
    torch.testing.assert_close(after[:, 0, -1], before[:, 0, -1])
    # a table that grows evenly with the offset still does
    even = {**model.state_dict(), "blocks.0.m.attention_biases": torch.arange(4.0).repeat(2, 4)}
    grown = larger.fit_state(even, model.config)["blocks.0.m.attention_biases"].unflatten(1, (6, 8))
    assert (grown.diff(dim=2) > 0).all()
    torch.testing.assert_close(grown.diff(dim=1), torch.zeros(2, 5, 8), atol=1e-5, rtol=0)


def test_bare_file_tells_its_classes_and_size(tmp_path: Path) -> None:
    model = create_model("levit_128s", img_size=96, num_classes=9)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    loaded = from_pretrained(tmp_path / "bare.pth", model="levit_128s", cache_dir=tmp_path / "cache")
    assert (loaded.config.img_size, loaded.num_classes) == (96, 9)


@pytest.mark.parametrize("shape", [(2, 3, 64, 80), (2, 1, 64, 64), (3, 64, 64)])
def test_wrong_input_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"this model takes \(B, 3, 64, 64\).*img_size"):
        small()(torch.zeros(shape))


# Training


def test_fresh_residual_branches_give_zero() -> None:
    model = LeViT(LeViTConfig(**SMALL)).eval()
    tokens = torch.randn(2, 16, 16)
    torch.testing.assert_close(model.blocks[:2](tokens), tokens)
    starts = {name: p.mean().item() for name, p in model.named_parameters() if name.endswith("bn.weight")}
    zero = {name for name, value in starts.items() if value == 0}
    assert zero == {name for name in starts if name.endswith((".m.proj.1.bn.weight", ".m.2.bn.weight"))}


def test_drop_rates_change_in_place() -> None:
    model = small()
    model.set_drop_rates(drop_rate=0.2, drop_path_rate=0.3)
    assert (model.config.drop_rate, model.config.drop_path_rate) == (0.2, 0.3)
    assert {m.rate for m in model.modules() if isinstance(m, DropPath)} == {0.3}
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.2}
    with pytest.raises(ConfigError, match="drop_rate=1"):
        model.set_drop_rates(drop_rate=1, drop_path_rate=0)


def test_score_biases_are_not_decayed() -> None:
    model = small()
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "attention_biases" in name}
    decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {
        name for name, p in model.named_parameters() if p.ndim > 1 and "attention_biases" not in name
    }


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["levit_128s", pytest.param("levit_384", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_mixed_precision_survives_large_inputs_and_activations(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, depth=(1, 1, 1))
    randomise(model)
    for parameter in model.patch_embed[-1].bn.parameters():
        parameter.mul_(10)  # what enters the first stage
    model.eval()
    for candidate in (model, model.fuse()):
        with torch.autocast("cpu", dtype):
            logits = candidate(10 * images(224))
        assert logits.isfinite().all()
        assert torch.equal(logits.argmax(dim=1), model(10 * images(224)).argmax(dim=1))
