"""Same weights, same logits: our models against those of other libraries."""

import pytest
import torch
from torch import Tensor, nn

from deit_models import create_model
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
