"""Small models of every shape that deploying tells apart, and images for them."""

from typing import Any

import pytest
import torch
from torch import nn

import deit_models
from deit_models.deploy.hardware import quiet
from deit_models.models.layers import ImageClassifier

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "deit3": ("deit3_small_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "one block": ("deit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 3, "qkv_bias": False}),
    "t2t_vit": ("t2t_vit_7", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "token head": ("t2t_vit_24_token_labeling", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "levit": ("levit_128s", {"embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8}),
    "vit_resnas": (
        "vit_resnas_tiny",
        {
            "patch_size": 8,
            "stem_dim": 4,
            "stages": (
                {"embed_dim": 16, "head_dim": 8, "num_heads": (3, 1), "mlp_hidden": (20, 28)},
                {"embed_dim": 24, "head_dim": 6, "num_heads": (2,), "mlp_hidden": (30,)},
            ),
        },
    ),
}


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
