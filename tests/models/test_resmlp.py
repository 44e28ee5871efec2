"""ResMLP: the authors' figures, timm's models in both directions, names by tags, one input size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import reference
from tiny_models import randomise
from torch import Tensor, nn

from deit_models import CheckpointError, ConfigError, adapt_head, create_model, from_pretrained, list_models, model_info
from deit_models.models.resmlp import Affine, MlpBlock, ResMLP, ResMLPConfig

GOLDEN = "resmlp_12"
PUBLISHED = [name for name in list_models("resmlp_*") if model_info(name).sources]


def small(**overrides: Any) -> ResMLP:
    options = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_classes": 7, **overrides}
    return randomise(ResMLP(ResMLPConfig(**options))).eval()


def images(height: int = 32, width: int | None = None, *, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(1))


# The authors' figures


def test_golden_answers() -> None:
    model = reference.filled(GOLDEN)
    reference.check(model, GOLDEN)
    theirs, ours = reference.read(GOLDEN)["config"], model.config
    for field in ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio"):
        assert getattr(ours, field) == theirs[field], field
    assert (ours.layer_scale, ours.grid) == (theirs["layer_scale_init"], (14, 14))
    assert theirs["num_patches"] == 14 * 14


# The block


def test_a_block_mixes_patches_and_then_channels() -> None:
    block = randomise(MlpBlock(ResMLPConfig(img_size=32, patch_size=16, embed_dim=6, depth=1))).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = x.clone()
    for channel in range(6):
        for out in range(4):
            inputs = block.norm1.alpha[channel] * x[:, :, channel] + block.norm1.beta[channel]
            mixed = inputs @ block.attn.weight[out] + block.attn.bias[out]
            wanted[:, out, channel] += block.gamma_1[channel] * mixed
    hidden = (block.norm2.alpha * wanted + block.norm2.beta) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    wanted = wanted + block.gamma_2 * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), wanted)


def test_fresh_scales_and_shifts_change_nothing() -> None:
    x = torch.randn(2, 3, 8)
    assert torch.equal(Affine(8)(x), x)


def test_factors_start_as_the_authors_by_depth() -> None:
    starts = {name: create_model(name, device="meta").config.layer_scale for name in PUBLISHED}
    assert {name: start for name, start in starts.items() if "12" in name} == dict.fromkeys(PUBLISHED[:3], 0.1)
    assert {starts[name] for name in list_models("resmlp_24*")} == {1e-5}
    assert {starts[name] for name in (*list_models("resmlp_36*"), *list_models("resmlp_b24*"))} == {1e-6}
    torch.testing.assert_close(create_model("resmlp_24", depth=2).blocks[1].gamma_2, torch.full((384,), 1e-5))


# One size


def test_weights_are_of_one_size(tmp_path: Path) -> None:
    model = create_model("resmlp_micro_patch4_32", depth=1).eval()
    model.save_pretrained(tmp_path)
    message = r"these weights mix 8x8 patches, img_size=64 has 16x16; .*use img_size=32"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path, img_size=64)
    with pytest.raises(ConfigError, match=message):
        adapt_head(model, num_classes=3, img_size=64)
    with pytest.raises(ConfigError, match=r"input of shape \(2, 3, 64, 64\)"):
        model(images(64))
    # a fresh model has any
    assert create_model("resmlp_micro_patch4_32", depth=1, img_size=(16, 48))(images(16, 48)).shape == (2, 10)


# timm


@torch.inference_mode()
def assert_equal_answers(ours: ResMLP, theirs: nn.Module) -> None:
    x = images(*ours.config.image_hw, batch=1)
    assert ours(x).std() > 0.1  # weights that make every answer alike would prove nothing
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-4, rtol=1e-5)
    features = ours.forward_features(x)
    torch.testing.assert_close(theirs.forward_features(x), features, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs.forward_head(features, pre_logits=True), ours.embed(x), atol=1e-4, rtol=1e-5)


def as_trained(model: nn.Module) -> nn.Module:
    """Random numbers everywhere, of a size at which the answers neither vanish nor overflow, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim != 2 else parameter.shape[1] ** -0.5
            parameter.normal_(0, spread, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "resmlp_12_distilled" else pytest.mark.slow) for n in PUBLISHED]
)
def test_timms_files_are_read_and_ours_are_read_by_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = as_trained(timm.create_model(model_info(name).sources[0].repo.removeprefix("timm/"), pretrained=False))
    timm.models.save_for_hf(theirs, tmp_path / "by_timm")
    ours = from_pretrained(tmp_path / "by_timm")
    assert ours.origin.name == name
    assert_equal_answers(ours, theirs)
    ours.save_pretrained(tmp_path / "by_us", layout="timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'by_us'}", pretrained=True).eval()
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


# Files as published


def test_the_authors_file_is_the_state_dict_itself(tmp_path: Path) -> None:
    model = create_model(GOLDEN)
    file = tmp_path / "resmlp_12_no_dist.pth"
    torch.save(model.state_dict(), file)
    loaded = from_pretrained(file, model=GOLDEN)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert [source.layout for source in model_info(GOLDEN).sources] == ["timm", "native"]
    assert model_info(GOLDEN).sources[1].payload is None
    assert model_info(GOLDEN).preprocessing.resize == int(224 / 0.9)
