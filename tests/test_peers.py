"""Same weights, same logits: our models against those of other libraries."""

import io
import urllib.request
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from deit_models import ConfigError, create_model, from_pretrained, list_models, model_info
from deit_models.formats.layouts import layouts_of
from deit_models.hub.fetch import Access
from deit_models.hub.load import load_source
from deit_models.models.deit import DeiT

HEAVY = [
    "deit_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_base_patch16_384",
    "deit_base_distilled_patch16_384",
]
PUBLISHED = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY),
]


def randomise(model: nn.Module) -> nn.Module:
    """Draw every parameter at random, in place: fresh biases are 0 and norms 1, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.1 if parameter.ndim == 1 else 0.04, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def image(model: DeiT) -> Tensor:
    return torch.randn(1, 3, *model.config.image_hw, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(name: str) -> tuple[DeiT, nn.Module]:
    """Ours and timm's model of a name, each with random weights of its own."""
    timm = pytest.importorskip("timm")
    return create_model(name).eval(), timm.create_model(name, pretrained=False).eval()


@torch.inference_mode()
def assert_equal_answers(ours: DeiT, theirs: nn.Module) -> None:
    x = image(ours)
    logits = ours(x)
    assert logits.std() > 0.1  # weights that make every answer alike would prove nothing
    torch.testing.assert_close(logits, theirs(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-4, rtol=0)
    if ours.config.distilled:
        theirs.train()
        theirs.set_distilled_training(True)
        for own, other in zip(ours.forward_heads(x), theirs(x), strict=True):
            torch.testing.assert_close(own, other, atol=1e-4, rtol=0)
        theirs.eval()


def test_timm_weights_give_timm_logits(pair: tuple[DeiT, nn.Module]) -> None:
    ours, theirs = pair
    ours.load_state_dict(randomise(theirs).state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_equal_answers(ours, theirs)


def test_our_weights_give_our_logits_in_timm(pair: tuple[DeiT, nn.Module]) -> None:
    ours, theirs = pair
    theirs.load_state_dict(randomise(ours).state_dict())
    assert_equal_answers(ours, theirs)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_embedding_and_intermediate_layers_are_timms(pair: tuple[DeiT, nn.Module]) -> None:
    ours, theirs = pair
    ours.load_state_dict(randomise(theirs).state_dict())
    x = image(ours)
    with torch.inference_mode():
        embedding = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(ours.embed(x), embedding, atol=1e-4, rtol=0)
        theirs_at = theirs.forward_intermediates(
            x, indices=[0, 5, 11], norm=True, return_prefix_tokens=True, intermediates_only=True
        )
        for own, (patches, prefix) in zip(ours.get_intermediate_layers(x, [0, 5, 11]), theirs_at, strict=True):
            torch.testing.assert_close(own.patches, patches, atol=1e-4, rtol=0)
            torch.testing.assert_close(own.prefix, prefix, atol=1e-4, rtol=0)


# DeiT III, of which timm names the layer scale otherwise: short models here, whole ones among the slow tests


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("deit3_small_patch16_224", 2),
        ("deit3_medium_patch16_224", 2),
        ("deit3_huge_patch14_224", 1),
        pytest.param("deit3_small_patch16_224", 12, marks=pytest.mark.slow),
        pytest.param("deit3_medium_patch16_224", 12, marks=pytest.mark.slow),
        pytest.param("deit3_base_patch16_384", 12, marks=pytest.mark.slow),
        pytest.param("deit3_large_patch16_224", 24, marks=pytest.mark.slow),
        pytest.param("deit3_huge_patch14_224", 32, marks=pytest.mark.slow),
    ],
)
def test_deit3_gives_timms_logits_both_ways(name: str, depth: int) -> None:
    timm = pytest.importorskip("timm")
    ours = create_model(name, depth=depth).eval()
    theirs = randomise(timm.create_model(name, pretrained=False, depth=depth)).eval()
    mapped = layouts_of("deit").to_native(theirs.state_dict(), ours.state_dict(), config=ours.config)
    assert mapped[1:] == ([], [], [])
    ours.load_state_dict(mapped.tensors)
    assert_equal_answers(ours, theirs)
    again = timm.create_model(name, pretrained=False, depth=depth).eval()
    again.load_state_dict(layouts_of("deit").from_native(ours.state_dict(), config=ours.config, naming="timm"))
    assert_equal_answers(ours, again)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit3_small_patch16_384_in21ft1k"])
def test_deit3_folders_answer_alike_in_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    ours = randomise(create_model(name, depth=2, num_classes=9).eval())
    x = image(ours)
    ours.save_pretrained(tmp_path / "timm", layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-4, rtol=0)
    back = from_pretrained(tmp_path / "timm")
    assert back.config == ours.config
    state = back.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.state_dict().items())
    with pytest.raises(ConfigError, match="transformers has no DeiT III"):
        ours.save_pretrained(tmp_path / "transformers", layout="transformers")


def test_deit3_weights_of_timms_repositories_keep_their_pre_training(tmp_path: Path) -> None:
    """timm's architecture is one, its tags are two."""
    for tag, name in (("fb_in1k", "deit3_small_patch16_224"), ("fb_in22k_ft_in1k", "deit3_small_patch16_224_in21ft1k")):
        randomise(create_model(name, depth=1)).save_pretrained(tmp_path / tag, layout="timm")
        config = tmp_path / tag / "config.json"
        config.write_text(config.read_text().replace('"tag": "deit_models"', f'"tag": "{tag}"'))
        assert from_pretrained(tmp_path / tag).origin.name == name


@pytest.mark.parametrize(
    "options", [{"distilled": True}, {"prefix_positions": True}, {"layer_scale": 0.0}], ids=lambda options: str(options)
)
def test_shape_between_deit_and_deit3_is_saved_natively_alone(options: dict[str, Any], tmp_path: Path) -> None:
    ours = create_model("deit3_small_patch16_224", depth=1, **options)
    with pytest.raises(ConfigError, match="layout='native'"):
        ours.save_pretrained(tmp_path / "timm", layout="timm")
    ours.save_pretrained(tmp_path / "native")
    assert from_pretrained(tmp_path / "native").config == ours.config


@torch.inference_mode()
def test_folders_answer_alike_in_all_three_libraries(name: str, tmp_path: Path) -> None:
    """native -> transformers -> timm -> native: the same logits at each station, the same bits at the end."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    ours = create_model(name).eval()
    randomise(ours)
    x = image(ours)
    logits = ours(x)
    ours.save_pretrained(tmp_path / "transformers", layout="transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "transformers")
    torch.testing.assert_close(theirs.eval()(x).logits, logits, atol=1e-4, rtol=0)
    if ours.config.distilled:
        torch.testing.assert_close(theirs(x).cls_logits, ours.forward_heads(x).cls, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs(x).distillation_logits, ours.forward_heads(x).dist, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "by_transformers")

    second = from_pretrained(tmp_path / "by_transformers")
    torch.testing.assert_close(second(x), logits, atol=1e-4, rtol=0)
    second.save_pretrained(tmp_path / "timm", layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(x), logits, atol=1e-4, rtol=0)

    third = from_pretrained(tmp_path / "timm")
    third.save_pretrained(tmp_path / "native")
    last = from_pretrained(tmp_path / "native")
    assert last.config == ours.config
    for (key, first), (other, end) in zip(ours.state_dict().items(), last.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(first, end), key


@pytest.mark.online
def test_public_figures_of_the_distilled_base_model() -> None:
    """The logits transformers' own tests expect for COCO val2017 image 39769 with its preprocessing."""
    transformers = pytest.importorskip("transformers")
    url = "http://images.cocodataset.org/val2017/000000039769.jpg"
    with urllib.request.urlopen(url, timeout=30) as response:
        photo = PIL.Image.open(io.BytesIO(response.read()))
    repo = "facebook/deit-base-distilled-patch16-224"
    pixels = transformers.AutoImageProcessor.from_pretrained(repo)(photo, return_tensors="pt")["pixel_values"]
    for source in (repo, "deit_base_distilled_patch16_224"):
        with torch.inference_mode():
            logits = from_pretrained(source)(pixels)
        torch.testing.assert_close(logits[0, :3], torch.tensor([-1.0266, 0.1912, -1.2861]), atol=1e-4, rtol=0)


@pytest.mark.online
@pytest.mark.parametrize("name", list_models(pretrained=True))
def test_every_published_copy_loads(name: str) -> None:
    for source in model_info(name).sources:
        load_source(model_info(name), source, Access())
