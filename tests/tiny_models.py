"""Models of a few thousand parameters, their files, and what every test of the hub asks of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import deit_models
from deit_models.hub.weights import reference_input
from deit_models.models.layers import ImageClassifier

SHAPE = {"depth": 2, "embed_dim": 16, "num_heads": 2}
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
LAYOUTS = ("native", "timm", "transformers")


def tiny_model(name: str = "deit_micro_distilled_patch4_32", *, seed: int = 0, **overrides: Any) -> ImageClassifier:
    """A registered model shrunk to 2 blocks of width 16, every parameter random, in eval mode."""
    return randomise(deit_models.create_model(name, **{**SHAPE, **overrides}), seed=seed).eval()


def named(model: ImageClassifier) -> ImageClassifier:
    """Seven classes with names, and a licence, in place."""
    model.origin = replace(model.origin, class_names=CLASSES, dataset="CIFAR-10", licence="Apache-2.0")
    return model


def randomise(model: Any, *, seed: int = 0) -> Any:
    """Draw every parameter, in place: fresh biases are 0 and norms 1, which would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


@torch.inference_mode()
def answer(model: nn.Module, config: Any = None) -> Tensor:
    """Logits for the fixed input; of a transformers model, its `logits`."""
    out = model(reference_input(config or model.config))
    return getattr(out, "logits", out)


def assert_same_answer(ours: nn.Module, theirs: nn.Module, *, config: Any = None, atol: float = 1e-5) -> None:
    config = config or ours.config
    assert answer(ours, config).std() > 0.05  # weights that make every answer alike would prove nothing
    torch.testing.assert_close(answer(theirs, config), answer(ours, config), atol=atol, rtol=0)


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


def published_files(model: ImageClassifier, layout: str = "native") -> dict[str, bytes]:
    """What `save_pretrained` writes, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, layout=layout)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def refusal(kind: type[Exception], act: Callable[[], object]) -> str:
    """The message `act` is refused with: one line, and of the package's own errors."""
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert isinstance(caught.value, deit_models.DeitModelsError)
    assert message.strip()
    assert "\n" not in message
    return message


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some grain, as a camera would give."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(0, 9, height)[:, None], torch.linspace(0, 7, width)[None, :]
    smooth = torch.stack([torch.sin(rows * (1 + c)) * torch.cos(columns + c) for c in range(3)], dim=-1)
    grain = torch.randn(height, width, 3, generator=generator)
    return Image.fromarray((127 + 90 * smooth + 6 * grain).clamp(0, 255).to(torch.uint8).numpy(), "RGB")
