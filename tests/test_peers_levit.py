"""LeViT: same weights, same logits as timm's and transformers' models, in every layout and both directions."""

import io
import urllib.request
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from deit_models import create_model, from_pretrained, model_info
from deit_models.formats.publish import layout_tensors
from deit_models.models.levit import LeViT

# the smallest, and one whose widths are no powers of two; the others with -m slow
SLOW = ("levit_128", "levit_256", "levit_384")
ALL = ["levit_128s", "levit_192", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
# what differs from transformers' default, LeViT-128
CONFIG = {
    "levit_128s": {"depths": [2, 3, 4], "num_attention_heads": [4, 6, 8]},
    "levit_128": {},
    "levit_192": {"hidden_sizes": [192, 288, 384], "num_attention_heads": [3, 5, 6], "key_dim": [32, 32, 32]},
    "levit_256": {"hidden_sizes": [256, 384, 512], "num_attention_heads": [4, 6, 8], "key_dim": [32, 32, 32]},
    "levit_384": {"hidden_sizes": [384, 512, 768], "num_attention_heads": [6, 9, 12], "key_dim": [32, 32, 32]},
}


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def randomise(model: nn.Module) -> nn.Module:
    """Draw every number at random, in place: fresh BatchNorms are 1 and 0, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.ndim == 1:
                tensor.normal_(0.5, 0.2, generator=generator)
            elif name.endswith("attention_biases"):
                tensor.normal_(0, 1, generator=generator)
            else:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    return model.eval()


def image(height: int = 224, width: int | None = None) -> Tensor:
    return torch.randn(1, 3, height, width or height, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_equal_answers(ours: LeViT, theirs: nn.Module, x: Tensor) -> None:
    logits, other = ours(x), theirs(x)
    assert logits.std() > 0.1  # weights that make every answer alike would prove nothing
    if hasattr(other, "logits"):
        torch.testing.assert_close(other.cls_logits, ours.forward_heads(x).cls, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.distillation_logits, ours.forward_heads(x).dist, atol=1e-4, rtol=0)
        other = other.logits
    torch.testing.assert_close(other, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["timm", "timm-conv"])
def test_timms_weights_are_read_and_ours_are_read_by_timm(name: str, layout: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model(name.replace("levit", "levit_conv") if "conv" in layout else name))
    timm.models.save_for_hf(theirs, tmp_path / "by_timm")
    ours = from_pretrained(tmp_path / "by_timm")
    assert ours.config == create_model(name, device="meta").config
    assert ours.origin is not None
    assert ours.origin.name == name
    assert_equal_answers(ours, theirs, image())

    ours.save_pretrained(tmp_path / "by_us", layout=layout)
    again = timm.create_model(f"local-dir:{tmp_path / 'by_us'}", pretrained=True).eval()
    assert type(again) is type(theirs)
    assert again.use_conv == theirs.use_conv
    assert_equal_answers(ours, again, image())
    # timm resizes to the whole part of size / crop_pct
    assert int(224 / timm.data.resolve_model_data_config(again)["crop_pct"]) == ours.origin.preprocessing.resize
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def transformers_model(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LevitConfig(**CONFIG[name], num_labels=1000)
    return randomise(transformers.LevitForImageClassificationWithTeacher(config))


def test_transformers_weights_are_read_and_ours_are_read_by_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers_model(name)
    theirs.save_pretrained(tmp_path / "by_transformers")
    ours = from_pretrained(tmp_path / "by_transformers")
    assert ours.config == create_model(name, device="meta").config
    assert ours.origin is not None
    assert ours.origin.name == name
    assert_equal_answers(ours, theirs, image())

    ours.save_pretrained(tmp_path / "by_us", layout="transformers")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "by_us").eval()
    assert type(again) is type(theirs)
    assert_equal_answers(ours, again, image())
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_round_trip_through_all_layouts_is_bit_identical(name: str, tmp_path: Path) -> None:
    first = randomise(create_model(name))
    state = first.state_dict()
    for layout in ("timm-conv", "transformers", "timm", "native"):
        first.save_pretrained(tmp_path / layout, layout=layout)
        first = from_pretrained(tmp_path / layout)
    assert first.config == create_model(name, device="meta").config
    assert list(first.state_dict()) == list(state)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_authors_file_with_its_index_buffers_is_read(name: str, tmp_path: Path) -> None:
    model = randomise(create_model(name))
    payload = dict(model.state_dict())
    for module_name, module in model.named_modules():
        if hasattr(module, "offsets"):
            payload[f"{module_name}.attention_bias_idxs"] = module.offsets
    assert len(payload) == {"levit_128s": 336}.get(name, 414)  # as many as in the authors' files
    torch.save({"model": payload}, tmp_path / "authors.pth")
    loaded = from_pretrained(tmp_path / "authors.pth", model=name, cache_dir=tmp_path / "cache")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("layout", ["native", "timm", "timm-conv", "transformers"])
def test_files_hold_as_many_tensors_as_the_published_ones(layout: str) -> None:
    # the authors' files also hold the tables of offsets
    assert len(layout_tensors(create_model("levit_128s"), layout)) == (336 if layout == "native" else 325)
    assert len(layout_tensors(create_model("levit_384"), layout)) == (414 if layout == "native" else 400)


@pytest.mark.parametrize("size", [96, 160, (64, 128)])
def test_other_sizes_and_widths_agree_with_timm(size: int | tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    ours = randomise(create_model("levit_128s", img_size=size, num_classes=5, depth=(1, 1, 1)))
    ours.save_pretrained(tmp_path, layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image(*ours.config.image_hw)
    assert_equal_answers(ours, theirs, x)
    with torch.inference_mode():
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for own, other in zip(ours.get_intermediate_layers(x, 3), maps, strict=True):
            torch.testing.assert_close(own.patches, other, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            ours.embed(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True), atol=1e-4, rtol=0
        )
    assert from_pretrained(tmp_path).config == ours.config


def test_published_sources_are_listed(name: str) -> None:
    assert [source.layout for source in model_info(name).sources] == ["timm", "timm", "transformers", "native"]


@pytest.mark.online
def test_public_figures_of_the_smallest_model() -> None:
    """The logits transformers' own tests expect for COCO val2017 image 39769 with its preprocessing."""
    transformers = pytest.importorskip("transformers")
    with urllib.request.urlopen("http://images.cocodataset.org/val2017/000000039769.jpg", timeout=30) as response:
        photo = PIL.Image.open(io.BytesIO(response.read()))
    repo = "facebook/levit-128S"
    pixels = transformers.AutoImageProcessor.from_pretrained(repo)(photo, return_tensors="pt")["pixel_values"]
    for source in (repo, "levit_128s"):
        with torch.inference_mode():
            logits = from_pretrained(source)(pixels)
        torch.testing.assert_close(logits[0, :3], torch.tensor([1.0448, -0.3745, -1.8317]), atol=2e-4, rtol=0)
