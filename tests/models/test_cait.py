"""CaiT: the authors' figures, timm's models in both directions, the two kinds of blocks, and files as published."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import reference
from numpy.testing import assert_allclose
from tiny_models import randomise
from torch import Tensor, nn

from deit_models import ConfigError, create_model, from_pretrained, list_models, model_info
from deit_models.models.cait import CaiT, CaiTConfig, ClassBlock, TalkingHeadAttention
from deit_models.models.layers import resize_pos_embed
from deit_models.training.optim import layer_of_parameter

GOLDEN = "cait_xxs24_224"
SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
PUBLISHED = [name for name in list_models("cait_*") if model_info(name).sources]


def small(**overrides: Any) -> CaiT:
    return randomise(CaiT(CaiTConfig(**{**SMALL, "layer_scale": 0.1, **overrides}))).eval()


def images(height: int = 32, width: int | None = None, *, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(1))


# The authors' figures


@pytest.fixture(scope="module")
def golden() -> CaiT:
    return reference.filled(GOLDEN)


def test_golden_answers(golden: CaiT) -> None:
    reference.check(golden, GOLDEN)


def test_golden_config_and_epsilons(golden: CaiT) -> None:
    theirs, ours = reference.read(GOLDEN)["config"], golden.config
    fields = "img_size patch_size in_chans num_classes embed_dim depth depth_token_only num_heads mlp_ratio qkv_bias"
    for field in fields.split():
        assert getattr(ours, field) == theirs[field], field
    assert (ours.mlp_ratio_token_only, ours.layer_scale) == (theirs["mlp_ratio_token_only"], theirs["layer_scale_init"])
    norms = [module.eps for module in golden.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [theirs["norm_eps"]] * (2 * (24 + 2) + 1)


def test_golden_positions_at_384(golden: CaiT) -> None:
    recorded = reference.read(GOLDEN)["pos_embed_224_to_384"]
    positions = resize_pos_embed(golden.pos_embed, num_prefix=0, grid=(24, 24))
    assert list(positions.shape) == recorded["shape"]
    for row, values in recorded["rows"].items():
        assert_allclose(positions[0, int(row), : len(values)].detach(), values, rtol=0, atol=1e-6)
    wider = CaiT(CaiTConfig(img_size=384)).eval()
    wider.load_state_dict(wider.fit_state(golden.state_dict(), golden.config))
    with torch.inference_mode():
        assert_allclose(wider(reference.inputs(384)), recorded["logits"], rtol=0, atol=1e-4)


# The blocks


def test_talking_heads_are_mixed_before_and_after_the_softmax() -> None:
    attention = randomise(TalkingHeadAttention(12, 3, attn_dim=12, qkv_bias=True, drop_rate=0.0)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    query, key, value = (
        part.view(2, 5, 3, 4) for part in (x @ attention.qkv.weight.T + attention.qkv.bias).split(12, dim=2)
    )
    scores = torch.zeros(2, 3, 5, 5, dtype=torch.float64)
    for head in range(3):
        scores[:, head] = torch.einsum("bqd,bkd->bqk", query[:, :, head], key[:, :, head]) / 4**0.5
    before = sum(
        attention.proj_l.weight[:, head, None, None] * scores[:, head, None] for head in range(3)
    ) + attention.proj_l.bias.view(3, 1, 1)
    weights = before.exp() / before.exp().sum(-1, keepdim=True)
    after = torch.zeros_like(weights)
    for out in range(3):
        after[:, out] = attention.proj_w.bias[out] + sum(
            attention.proj_w.weight[out, head] * weights[:, head] for head in range(3)
        )
    mixed = torch.cat([after[:, head] @ value[:, :, head] for head in range(3)], dim=2)
    torch.testing.assert_close(attention.weights(x), weights)
    torch.testing.assert_close(attention.shares(x), after)
    torch.testing.assert_close(attention(x), mixed @ attention.proj.weight.T + attention.proj.bias)


def test_fresh_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    model = CaiT(CaiTConfig(**{**SMALL, "num_heads": 12, "layer_scale": 1e-5}))
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            torch.testing.assert_close(parameter, torch.full((24,), 1e-5))
        elif name.endswith(("proj_l.weight", "proj_w.weight", "fc1.weight", "pos_embed", "cls_token")):
            assert 0.01 < parameter.std() < 0.03, name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name


def test_class_blocks_change_the_class_token_alone() -> None:
    model = small()
    x = torch.randn(2, 5, 24)
    for block in model.blocks_token_only:
        assert isinstance(block, ClassBlock)
        after = block(x)
        assert torch.equal(after[:, 1:], x[:, 1:])
        assert not torch.allclose(after[:, 0], x[:, 0])
        moved = x.clone()
        moved[:, 3, 0] += 1  # the token asks every patch
        assert not torch.allclose(block(moved)[:, 0], after[:, 0])


def test_stochastic_depth_is_the_same_in_every_block_and_absent_in_class_blocks() -> None:
    model = small(drop_path_rate=0.3)
    assert [block.drop_path.rate for block in model.all_blocks] == [0.3] * 3 + [0.0] * 2


def test_maps_of_all_blocks_can_be_read() -> None:
    maps = small(img_size=(32, 48)).attention_maps(images(32, 48))
    assert [tuple(each.shape) for each in maps] == [(2, 3, 6, 6)] * 3 + [(2, 3, 1, 7)] * 2


def test_class_blocks_come_after_the_others_in_layers_and_groups() -> None:
    model = small()
    found = {name: layer_of_parameter(model, name) for name, _ in model.named_parameters()}
    assert (found["patch_embed.proj.weight"], found["blocks.0.norm1.bias"], found["blocks.2.gamma_1"]) == (0, 1, 3)
    assert (found["blocks_token_only.0.attn.q.weight"], found["blocks_token_only.1.mlp.fc1.bias"]) == (4, 5)
    assert found["norm.weight"] == found["head.weight"] == 6


@pytest.mark.parametrize("size", [(16, 48), 80])
def test_other_sizes_resize_the_positions(size: int | tuple[int, int]) -> None:
    model, hw = small(dynamic_img_size=True), (size, size) if isinstance(size, int) else size
    fitted = CaiT(CaiTConfig(**{**SMALL, "img_size": size, "layer_scale": 0.1})).eval()
    fitted.load_state_dict(fitted.fit_state(model.state_dict(), model.config))
    torch.testing.assert_close(fitted(images(*hw)), model(images(*hw)))
    with pytest.raises(ConfigError, match="not a multiple"):
        small(img_size=40)


# timm


def theirs_of(timm: Any, name: str, **options: Any) -> nn.Module:
    return randomise(timm.create_model(name, pretrained=False, **options), seed=3).eval()


@torch.inference_mode()
def assert_equal_answers(ours: CaiT, theirs: nn.Module) -> None:
    x = images(*ours.config.image_hw)
    assert ours(x).std() > 0.1  # weights that make every answer alike would prove nothing
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-4, rtol=1e-5)
    features = ours.forward_features(x)
    torch.testing.assert_close(theirs.forward_features(x), features, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs.forward_head(features, pre_logits=True), ours.embed(x), atol=1e-4, rtol=1e-5)
    last, maps = theirs.forward_intermediates(x, indices=[0, 1], norm=True)
    own_last, own_maps = ours.forward_intermediates(x, [0, 1], norm=True)
    for own, other in zip([own_last, *own_maps], [last, *maps], strict=True):
        torch.testing.assert_close(other, own, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_timms_files_are_read_and_ours_are_read_by_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = theirs_of(timm, name, depth=2, num_classes=9)
    timm.models.save_for_hf(theirs, tmp_path / "by_timm", model_args={"depth": 2})
    ours = from_pretrained(tmp_path / "by_timm")
    assert ours.config == create_model(name, depth=2, num_classes=9, device="meta").config
    assert ours.origin.name == name
    assert ours.origin.preprocessing == model_info(name).preprocessing
    if "224" in name:  # at more pixels it takes seconds
        assert_equal_answers(ours, theirs)
    ours.save_pretrained(tmp_path / "by_us", layout="timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'by_us'}", pretrained=True).eval()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_models_answer_as_timms(name: str) -> None:
    timm = pytest.importorskip("timm")
    ours, theirs = create_model(name).eval(), timm.create_model(name, pretrained=False).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(*ours.config.image_hw, batch=1)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x), ours(x), atol=1e-4, rtol=0)


def test_a_shape_of_ones_own_is_built_by_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    ours = randomise(create_model("cait_micro_patch4_32", mlp_ratio=2, depth=2, depth_token_only=3)).eval()
    ours.save_pretrained(tmp_path, layout="timm")
    assert_equal_answers(ours, timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval())
    assert from_pretrained(tmp_path).config == ours.config


# Files as published


def test_the_authors_file_is_read_and_a_wrong_one_refused(tmp_path: Path) -> None:
    model = create_model(GOLDEN)
    file = tmp_path / "XXS24_224.pth"
    torch.save({"model": {f"module.{key}": tensor for key, tensor in model.state_dict().items()}}, file)
    loaded = from_pretrained(file, model=GOLDEN)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with pytest.raises(ConfigError, match="transformers has no cait models"):
        loaded.save_pretrained(tmp_path / "transformers", layout="transformers")


def test_every_published_model_has_both_places() -> None:
    for name in PUBLISHED:
        info = model_info(name)
        assert [source.layout for source in info.sources] == ["timm", "native"]
        assert info.sources[0].repo == f"timm/{name}.fb_dist_in1k"
        assert info.preprocessing.resize == info.input_size
    assert len(PUBLISHED) == 10
