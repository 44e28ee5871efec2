"""DeiT: the authors' figures, every option of the config, and what a user calls on the model."""

import dataclasses
from typing import Any

import pytest
import torch
from golden import reference
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deit_models import ConfigError, create_model
from deit_models.models.deit import DeiT, DeiTConfig, PatchDropout
from deit_models.models.layers import HeadLogits, resize_pos_embed

GOLDEN = ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")
SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
}


def small(**overrides: Any) -> DeiT:
    torch.manual_seed(0)
    return DeiT(DeiTConfig(**{**SMALL, **overrides})).eval()


def images(height: int = 32, width: int | None = None, *, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[False, True], ids=["plain", "distilled"])
def distilled(request: pytest.FixtureRequest) -> bool:
    return request.param


# Golden figures of the authors' code


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request: pytest.FixtureRequest) -> tuple[dict[str, Any], DeiT]:
    model = create_model(request.param)
    model.load_state_dict(reference.weights(request.param))
    return reference.read(request.param), model.eval()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_filling_is_the_recorded_one(name: str) -> None:
    reference.check_filling(name)


def test_golden_logits_and_features(golden: tuple[dict[str, Any], DeiT]) -> None:
    recorded, model = golden
    outputs, x = recorded["outputs"], reference.inputs(224)
    with torch.inference_mode():
        logits, heads, features = model(x), model.forward_heads(x), model.forward_features(x)
    assert_allclose(logits, outputs["logits"], rtol=0, atol=1e-4)
    if heads.dist is None:
        assert_allclose(features[0, 0], outputs["features"], rtol=0, atol=1e-4)
    else:
        assert_allclose(heads.cls, outputs["logits_cls"], rtol=0, atol=1e-4)
        assert_allclose(heads.dist, outputs["logits_dist"], rtol=0, atol=1e-4)
        assert_allclose(features[0, 0], outputs["features_cls"], rtol=0, atol=1e-4)
        assert_allclose(features[0, 1], outputs["features_dist"], rtol=0, atol=1e-4)


def test_golden_positions_resized_to_384(golden: tuple[dict[str, Any], DeiT]) -> None:
    recorded, model = golden
    expected, weights = recorded["pos_embed_224_to_384"], model.state_dict()
    resized = resize_pos_embed(weights["pos_embed"], num_prefix=model.config.num_prefix_tokens, grid=(24, 24))
    assert list(resized.shape) == expected["shape"]
    for position, values in expected["rows"].items():
        assert_allclose(resized[0, int(position), : len(values)], values, rtol=0, atol=1e-5)
    assert_allclose([resized.mean(), resized.std(correction=0)], [expected["mean"], expected["std"]], atol=1e-6)

    at_384 = create_model(recorded["model"], img_size=384).eval()
    at_384.load_state_dict({**weights, "pos_embed": resized})
    with torch.inference_mode():
        assert_allclose(at_384(reference.inputs(384)), expected["logits"], rtol=0, atol=1e-4)


def test_golden_positions_resized_on_the_fly(golden: tuple[dict[str, Any], DeiT]) -> None:
    recorded, model = golden
    dynamic = create_model(recorded["model"], dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    with torch.inference_mode():
        logits = dynamic(reference.inputs(384))
    assert_allclose(logits, recorded["pos_embed_224_to_384"]["logits"], rtol=0, atol=1e-4)


def test_golden_config_and_epsilons(golden: tuple[dict[str, Any], DeiT]) -> None:
    recorded, model = golden
    shared = {field.name for field in dataclasses.fields(model.config)} & set(recorded["config"])
    assert {"embed_dim", "depth", "num_heads", "norm_eps", "distilled", "qkv_bias", "mlp_ratio"} <= shared
    assert {key: getattr(model.config, key) for key in shared} == {key: recorded["config"][key] for key in shared}
    epsilons = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert epsilons == [recorded["config"]["norm_eps"]] * (2 * model.config.depth + 1)


def test_golden_state_dict_names_shapes_and_order(golden: tuple[dict[str, Any], DeiT]) -> None:
    recorded, model = golden
    ours = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    assert ours == [(e["name"], e["shape"], f"torch.{e['dtype']}") for e in recorded["state_dict"]]
    assert sum(p.numel() for p in model.parameters()) == recorded["num_params"]["total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == recorded["num_params"]["trainable"]


# Every option does something

# field -> (another value, where the change must show)
FLIPS: dict[str, tuple[Any, str]] = {
    "img_size": (40, "parameters"),
    "patch_size": (16, "parameters"),
    "in_chans": (1, "parameters"),
    "num_classes": (5, "parameters"),
    "embed_dim": (48, "parameters"),
    "depth": (2, "parameters"),
    "num_heads": (4, "eval"),
    "mlp_ratio": (2.0, "parameters"),
    "qkv_bias": (False, "parameters"),
    "norm_eps": (1e-3, "eval"),
    "distilled": (True, "parameters"),
    "drop_rate": (0.5, "training"),
    "drop_path_rate": (0.5, "training"),
    "drop_path_uniform": (True, "training"),
    "patch_drop_rate": (0.5, "training"),
    "layer_scale": (0.1, "parameters"),
    "prefix_positions": (False, "parameters"),
    "dynamic_img_size": (True, "sizes"),
}


def observe(config: DeiTConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    model = DeiT(config).eval()
    x = images(*config.image_hw, channels=config.in_chans)
    seen: dict[str, Any] = {"parameters": {name: tuple(p.shape) for name, p in model.named_parameters()}}
    seen["eval"] = model(x).tolist()
    model.train()
    torch.manual_seed(0)
    seen["training"] = [logits.tolist() for logits in model.forward_heads(x) if logits is not None]
    try:
        seen["sizes"] = model.eval()(images(64, channels=config.in_chans)).shape
    except ConfigError:
        seen["sizes"] = None
    return seen


def test_every_option_has_a_flip() -> None:
    assert set(FLIPS) == {field.name for field in dataclasses.fields(DeiTConfig)}


@pytest.mark.parametrize("field", FLIPS)
def test_option_changes_the_model(field: str) -> None:
    value, place = FLIPS[field]
    base = {**SMALL, "drop_path_rate": 0.5} if field == "drop_path_uniform" else SMALL
    before, after = observe(DeiTConfig(**base)), observe(DeiTConfig(**{**base, field: value}))
    assert before[place] != after[place]
    if place in ("eval", "training", "sizes"):
        assert before["parameters"] == after["parameters"]
    if place in ("training", "sizes"):
        assert before["eval"] == after["eval"]
    if place == "sizes":
        assert before["training"] == after["training"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 230}, "img_size=230 is not a multiple of patch_size=8; use 224 or 232"),
        ({"img_size": (32, 30)}, "img_size=30 is not a multiple of patch_size=8"),
        ({"img_size": 4}, "img_size=4 is not a multiple of patch_size=8; use 8 or 16"),
        ({"img_size": (32, 32, 3)}, "neither a whole number nor"),
        ({"img_size": 32.0}, "neither a whole number nor"),
        ({"img_size": None}, "neither a whole number nor"),
        ({"drop_rate": "a"}, "drop_rate='a' is not a probability"),
        ({"embed_dim": 25}, "embed_dim=25 is not a multiple of num_heads=3"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"distilled": "both"}, "distilled='both'"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"num_heads": True}, "num_heads=True"),
        ({"drop_rate": 1.0}, "drop_rate=1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"layer_scale": -1e-4}, "layer_scale=-0.0001 is not a number above 0"),
    ],
)
def test_impossible_config_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeiTConfig(**{**SMALL, **options})


def test_list_as_img_size_becomes_a_tuple() -> None:
    config = DeiTConfig(**{**SMALL, "img_size": [32, 64]})
    assert config.img_size == (32, 64)
    assert config.grid == (4, 8)
    assert hash(config) == hash(dataclasses.replace(config))


# Heads


def test_result_of_a_call_depends_on_mode_only_if_distilled(distilled: bool) -> None:
    model, x = small(distilled=distilled), images()
    heads = model.forward_heads(x)
    assert isinstance(heads, HeadLogits)
    if distilled:
        torch.testing.assert_close(model(x), (heads.cls + heads.dist) / 2)
        cls, dist = model.train()(x)
        torch.testing.assert_close((cls, dist), tuple(heads))
        assert not torch.equal(cls, dist)
    else:
        assert heads.dist is None
        torch.testing.assert_close(model(x), heads.cls)
        torch.testing.assert_close(model.train()(x), heads.cls)
    assert isinstance(model.train().forward_heads(x), HeadLogits)


def test_each_head_reads_its_own_token() -> None:
    model, x = small(distilled=True), images()
    tokens, heads = model.forward_features(x), model.forward_heads(x)
    torch.testing.assert_close(heads.cls, model.head(tokens[:, 0]))
    torch.testing.assert_close(heads.dist, model.head_dist(tokens[:, 1]))


def test_embed_is_the_class_token_or_the_mean_of_both(distilled: bool) -> None:
    model, x = small(distilled=distilled), images()
    tokens = model.forward_features(x)
    expected = (tokens[:, 0] + tokens[:, 1]) / 2 if distilled else tokens[:, 0]
    torch.testing.assert_close(model.embed(x), expected)
    assert model.embed(x).shape == (2, 24)


def test_images_of_a_batch_do_not_mix(distilled: bool) -> None:
    model, x = small(distilled=distilled), images()
    torch.testing.assert_close(model(x)[1:], model(x[1:]))


# Input sizes


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (24, 56), (56, 24), (40, 40)])
def test_any_multiple_of_the_patch_can_be_built(distilled: bool, height: int, width: int) -> None:
    model = small(distilled=distilled, img_size=(height, width))
    assert model(images(height, width)).shape == (2, 7)
    prefix, patches = 1 + distilled, height * width // 64
    assert model.forward_features(images(height, width)).shape == (2, prefix + patches, 24)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 56), (56, 24), (64, 64)])
def test_any_multiple_of_the_patch_can_be_called_if_dynamic(distilled: bool, height: int, width: int) -> None:
    dynamic = small(distilled=distilled, dynamic_img_size=True)
    fixed = small(distilled=distilled, img_size=(height, width))
    weights = dynamic.state_dict()
    grid, prefix = fixed.config.grid, 1 + distilled
    fixed.load_state_dict(weights | {"pos_embed": resize_pos_embed(weights["pos_embed"], num_prefix=prefix, grid=grid)})
    torch.testing.assert_close(dynamic(images(height, width)), fixed(images(height, width)))


def test_dynamic_model_built_for_a_non_square_size_knows_its_grid() -> None:
    model = small(img_size=(24, 56), dynamic_img_size=True)
    assert model(images(56, 24)).shape == (2, 7)


def test_wrong_input_is_refused_with_both_numbers() -> None:
    model, dynamic = small(), small(dynamic_img_size=True)
    with pytest.raises(ConfigError, match=r"40x48 pixels; this model takes 32x32.*img_size"):
        model(images(40, 48))
    with pytest.raises(ConfigError, match=r"\(2, 1, 32, 32\); expected \(B, 3, H, W\)"):
        model(images(channels=1))
    with pytest.raises(ConfigError, match=r"\(3, 32, 32\); expected \(B, 3, H, W\)"):
        model(images()[0])
    with pytest.raises(ConfigError, match="img_size=36 is not a multiple of patch_size=8; use 32 or 40"):
        dynamic(images(36))


# Tokens, maps and features


def test_intermediate_layers_follow_the_forward_pass(distilled: bool) -> None:
    model, x = small(distilled=distilled, img_size=(24, 40)), images(24, 40)
    prefix = 1 + distilled
    layers = model.get_intermediate_layers(x, 3)
    assert [layer.prefix.shape for layer in layers] == [(2, prefix, 24)] * 3
    assert [layer.patches.shape for layer in layers] == [(2, 24, 3, 5)] * 3
    tokens = model.forward_features(x)
    torch.testing.assert_close(layers[-1].prefix, tokens[:, :prefix])
    # row 1, column 2 of a map 5 wide is patch 7
    torch.testing.assert_close(layers[-1].patches[:, :, 1, 2], tokens[:, prefix + 7])

    raw = model.get_intermediate_layers(x, [-1, 0], norm=False)
    torch.testing.assert_close(model.norm(raw[0].prefix), tokens[:, :prefix])
    torch.testing.assert_close(raw[1].prefix, model.blocks[0](model.forward_tokens(x))[:, :prefix])


@pytest.mark.parametrize("layers", [0, 4, -1, [3], [-4], []])
def test_intermediate_layer_that_does_not_exist_is_refused(layers: int | list[int]) -> None:
    with pytest.raises(ConfigError, match="blocks 0 to 2"):
        small().get_intermediate_layers(images(), layers)


def test_attention_maps_are_what_the_forward_pass_uses(distilled: bool) -> None:
    model, x = small(distilled=distilled), images()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(30)  # fresh weights attend almost evenly, which would hide a wrong map
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(x)
    forward = list(seen)
    maps = model.attention_maps(x)
    tokens = 1 + distilled + 16
    assert maps.shape == (3, 2, 3, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 3, tokens))
    assert maps.std() > 0.02
    for block, probabilities, (tokens_in, tokens_out) in zip(model.blocks, maps, forward, strict=True):
        value = block.attn.qkv(tokens_in)[..., 48:].unflatten(-1, (3, 8)).transpose(1, 2)
        mixed = (probabilities @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.proj(mixed), tokens_out)


# Training


def test_every_parameter_gets_a_gradient(distilled: bool) -> None:
    model = small(distilled=distilled).train()
    labels = torch.tensor([1, 2])
    sum(F.cross_entropy(logits, labels) for logits in model.forward_heads(images()) if logits is not None).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_weight_decay_exceptions_are_parameters(distilled: bool) -> None:
    model = small(distilled=distilled)
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


def test_heads_are_named(distilled: bool) -> None:
    model = small(distilled=distilled, num_classes=11)
    present = [name for name in model.head_names if getattr(model, name) is not None]
    assert present == (["head", "head_dist"] if distilled else ["head"])
    wide = {name.split(".")[0] for name, p in model.named_parameters() if 11 in p.shape}
    assert wide == set(present)


def test_fresh_weights_have_the_authors_spread(distilled: bool) -> None:
    torch.manual_seed(0)
    model = DeiT(DeiTConfig(**{**SMALL, "embed_dim": 192, "distilled": distilled}))
    for name, parameter in model.named_parameters():
        if name.startswith("patch_embed"):
            continue
        if parameter.ndim > 1:
            assert 0.017 < parameter.std() < 0.023, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name))), name


def test_patch_dropout_keeps_the_first_tokens_and_a_random_part_of_the_patches() -> None:
    tokens = torch.arange(2 * 18, dtype=torch.float32).view(2, 18, 1)
    drop = PatchDropout(0.75, num_prefix=2)
    kept = drop(tokens)
    assert kept.shape == (2, 6, 1)
    assert torch.equal(kept[:, :2], tokens[:, :2])
    for image, whole in zip(kept[:, 2:, 0].tolist(), tokens[:, 2:, 0].tolist(), strict=True):
        assert len(set(image)) == 4
        assert set(image) <= set(whole)
    assert not torch.equal(drop(tokens), kept)
    assert drop(tokens[:, :3]).shape == (2, 3, 1)  # one patch always stays
    assert drop.eval()(tokens) is tokens


def test_stochastic_depth_grows_linearly() -> None:
    model = small(depth=5, drop_path_rate=0.2)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert small(depth=1, drop_path_rate=0.2).blocks[0].drop_path.rate == 0.0


def test_dropout_acts_on_tokens_attention_and_mlp() -> None:
    model = small(drop_rate=0.5, embed_dim=48).train()
    block, tokens = model.blocks[0], torch.randn(8, 17, 48)
    for dropped in (model.forward_tokens(images(batch=8)), block.attn(tokens), block.mlp(tokens)):
        assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


# DeiT III

THREE: dict[str, Any] = {"layer_scale": 1e-4, "prefix_positions": False, "drop_path_uniform": True}


def test_layer_scale_starts_at_its_value_also_when_an_empty_model_is_filled() -> None:
    with torch.device("meta"):
        model = DeiT(DeiTConfig(**{**SMALL, **THREE}))
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    gammas = [parameter for name, parameter in model.named_parameters() if "gamma" in name]
    assert len(gammas) == 6
    assert all(torch.equal(gamma, torch.full_like(gamma, 1e-4)) for gamma in gammas)


def test_prefix_tokens_without_positions_are_the_tokens_themselves(distilled: bool) -> None:
    model, x = small(distilled=distilled, **THREE), images()
    tokens, prefix = model.forward_tokens(x), 1 + distilled
    assert model.pos_embed.shape == (1, 16, 24)
    assert torch.equal(tokens[:, :1], model.cls_token.expand(2, -1, -1))
    torch.testing.assert_close(tokens[:, prefix:], model.patch_embed(x) + model.pos_embed)


def test_positions_without_prefix_are_resized_whole(distilled: bool) -> None:
    model = small(distilled=distilled, dynamic_img_size=True, **THREE)
    wide = small(distilled=distilled, img_size=(24, 56), **THREE)
    wide.load_state_dict(wide.fit_state(model.state_dict(), model.config))
    torch.testing.assert_close(model(images(24, 56)), wide(images(24, 56)))
    assert DeiT.describe_state(model.state_dict(), DeiTConfig(**{**SMALL, **THREE, "img_size": 64})).img_size == 32


def test_stochastic_depth_is_the_same_everywhere_if_uniform() -> None:
    model = small(depth=4, drop_path_rate=0.2, drop_path_uniform=True)
    assert [block.drop_path.rate for block in model.blocks] == [0.2] * 4
    model.set_drop_rates(drop_rate=0.0, drop_path_rate=0.3)
    assert [block.drop_path.rate for block in model.blocks] == [0.3] * 4


# States made for another size or other classes


def test_state_tells_its_classes_and_size(distilled: bool) -> None:
    made = small(distilled=distilled, num_classes=5, img_size=48)
    assert DeiT.describe_state(made.state_dict(), small(distilled=distilled).config) == made.config


def test_state_is_fitted_to_the_models_grid(distilled: bool) -> None:
    made, model = small(distilled=distilled, img_size=(24, 40)), small(distilled=distilled)
    state = made.state_dict()
    fitted = model.fit_state(state, made.config)
    model.load_state_dict(fitted)
    assert state["pos_embed"].shape[1] == 15 + 1 + distilled
    assert all(torch.equal(fitted[name], value) for name, value in state.items() if name != "pos_embed")


def test_reset_heads_leaves_the_rest_alone(distilled: bool) -> None:
    model = small(distilled=distilled)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_heads()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"head.weight", "head_dist.weight"} if distilled else {"head.weight"})


# Compilers, devices, types


class _Allocations(TorchDispatchMode):
    """Collects the tensors that operations return on anything but the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.found += [f"{func}: {tuple(t.shape)}" for t in tensors if t.numel() > 1 and not t.is_meta]
        return out


def test_meta_build_allocates_nothing(distilled: bool) -> None:
    with _Allocations() as allocations, torch.device("meta"):
        model = DeiT(DeiTConfig(distilled=distilled))
    assert allocations.found == []
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())


def test_reset_parameters_gives_an_empty_model_its_weights() -> None:
    with torch.device("meta"):
        model = DeiT(DeiTConfig(**SMALL))
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    assert model.head.weight.std() > 0.01
    assert not model.head.bias.any()


def test_bfloat16_model_answers_in_bfloat16(distilled: bool) -> None:
    model, x = small(distilled=distilled), images()
    exact = model(x)
    rounded = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


def test_graph_has_no_break(distilled: bool) -> None:
    model, x = small(distilled=distilled), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert len(torch.compile(model.train(), fullgraph=True, backend="eager").forward_heads(x)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_compiled_model_gives_the_same_logits(distilled: bool, training: bool) -> None:
    model, x = small(distilled=distilled).train(training), images()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5, rtol=1e-4)


def test_exported_program_gives_the_same_logits_for_any_batch() -> None:
    model = small(distilled=True)  # a plain one: tests/test_contract.py
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(batch=5)), model(images(batch=5)))
