"""Every family gives the CPU's logits: float32 within 1e-4 at a spread of 1, half precision by the likeliest class."""

from typing import Any

import gpu_toys
import pytest
import torch
from torch import Tensor

import deit_models
from deit_models.models.layers import ImageClassifier

pytestmark = pytest.mark.gpu

FLOAT32_TOLERANCE = 1e-4
AGREEMENT = 0.9
"""Of random weights and ten classes: the two likeliest are closer together than trained ones' are."""
MEMBERS = [*((family, False) for family in gpu_toys.SMALL), *((family, True) for family in gpu_toys.FULL)]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=MEMBERS, ids=lambda member: f"{member[0]} {'full' if member[1] else 'small'}", scope="module")
def member(request: pytest.FixtureRequest, device: torch.device) -> tuple[ImageClassifier, Tensor, Tensor]:
    """A model on the device, images and its logits for them by the CPU in float64."""
    family, full = request.param
    if full and device.type != "cuda":
        pytest.skip("in the rehearsal on the CPU: small members only")
    if full:
        torch.manual_seed(0)
        model = deit_models.create_model(gpu_toys.FULL[family], num_classes=10).eval()
    else:
        model = gpu_toys.small(family)
    images = gpu_toys.random_images(model, 32 if full else 64)
    gpu_toys.as_trained(model, images)
    with torch.inference_mode():
        expected = model.double()(images.double())
    return model.float().to(device), images, expected


@pytest.mark.usefixtures("exact")
@torch.inference_mode()
def test_float32(member: Any, device: torch.device) -> None:
    model, images, expected = member
    found = model(images.to(device)).cpu()
    assert float(expected.std(0).mean()) > 0.5, "the model does not look at the images"
    assert float((found - expected).abs().max()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("precision", HALVES)
@torch.inference_mode()
def test_half_precision(member: Any, device: torch.device, precision: str) -> None:
    model, images, expected = member
    with torch.autocast(device.type, HALVES[precision]):
        found = model(images.to(device)).float().cpu()
    assert found.isfinite().all()
    assert float((found.argmax(1) == expected.argmax(1)).double().mean()) >= AGREEMENT
