"""Small models of every shape that deploying tells apart, and images for them."""

from typing import Any

import families
import pytest
import torch
from torch import nn

import deit_models
from deit_models import model_info
from deit_models.deploy.hardware import quiet
from deit_models.models.layers import ImageClassifier

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    kind: (name, families.TINY[model_info(name).family]) for kind, name in families.KINDS.items()
}
TINY["vit_resnas"] = ("vit_resnas_tiny", {**TINY["vit_resnas"][1], "patch_size": 8})
TINY["one block"] = (TINY["deit"][0], {**TINY["deit"][1], "depth": 1, "qkv_bias": False})


def build(kind: str) -> ImageClassifier:
    """A small model whose every number is random: fresh ones hide mistakes behind zeros and ones."""
    name, options = TINY[kind]
    model = deit_models.create_model(name, num_classes=5, img_size=64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.5 if parameter.ndim == 1 else 0.2, generator=generator)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.uniform_(-1, 1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def normalised(model: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
    """What the evaluation transform makes of pixels."""
    spec = model.origin.preprocessing
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    return (images.float() / 255 - mean) / std


def needs(*names: str) -> None:
    """Skip a test whose libraries are not installed."""
    for name in names:
        with quiet():
            pytest.importorskip(name, reason="needs the extra [export]")
