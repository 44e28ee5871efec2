"""A space of a few thousand networks for 16-pixel images, and a super-network of it with telling weights."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deit_models.checkpoint import Preprocessing
from deit_models.data.records import ArrayRecords
from deit_models.models.layers import ImageClassifier
from deit_models.models.vit_resnas import ViTResNAS, ViTResNASConfig
from deit_models.nas.settings import Sampling
from deit_models.nas.space import SearchSpace, StageChoices
from deit_models.nas.supernet import SuperNetwork

SETTINGS: dict[str, Any] = {"img_size": 16, "patch_size": 4, "stem_dim": 4, "num_classes": 3}
STAGES = (
    {"embed_dim": 20, "head_dim": 8, "num_heads": (3, 1), "mlp_hidden": (30, 50)},
    {"embed_dim": 24, "head_dim": 6, "num_heads": (5,), "mlp_hidden": (7,)},
)
RESNAS = ViTResNASConfig(img_size=32, patch_size=4, stem_dim=6, num_classes=5, stages=STAGES)
RESNAS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"img_size": (16, 40), "in_chans": 1},
    {"distilled": True, "num_classes": 11},
    {"patch_head": True, "qkv_bias": False},
    {"stem": "patch", "patch_size": 7, "img_size": 28, "in_chans": 2},
    {"stem_dim": 3, "patch_size": 2, "img_size": (8, 20)},
    {"stages": STAGES[1:], "img_size": 12},
]
"""Every option that changes the multiply-accumulates of a ViT-ResNAS."""


@cache  # models of one shape, trained differently, are measured once
def measured(model_class: type[ImageClassifier], config: Any) -> int:
    """Multiply-accumulates by torch's counter while the model runs."""
    with torch.device("meta"):
        model, x = model_class(config).eval(), torch.empty(1, config.in_chans, *config.image_hw)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def toy_space(**settings: Any) -> SearchSpace:
    return SearchSpace(
        stages=(
            StageChoices(
                embed_dim=(16, 12, 8), head_dim=4, num_heads=(3, 2, 1), mlp_hidden=(24, 16, 8), depth=2, removable=(1,)
            ),
            StageChoices(
                embed_dim=(24, 20), head_dim=8, num_heads=(2, 1), mlp_hidden=(32, 24), depth=3, removable=(0, 2)
            ),
        ),
        settings={**SETTINGS, **settings},
        preprocessing=Preprocessing(resize=16, crop=(16, 16)),
    )


def largest_network(space: SearchSpace, *, seed: int = 0) -> ViTResNAS:
    """Random numbers everywhere, in eval mode: fresh weights hide mistakes behind zeros and ones."""
    network = ViTResNAS(space.config_of(space.largest())).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.1, 0.5 if parameter.ndim == 1 else 0.3, generator=generator)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3, generator=generator)
    return network


def supernet(space: SearchSpace, *, images: int = 2, warmup_epochs: int = 0) -> SuperNetwork:
    return SuperNetwork(largest_network(space), space, Sampling(images=images, warmup_epochs=warmup_epochs)).eval()


def noise(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def coloured(count: int, *, seed: int = 0) -> ArrayRecords:
    """Images in three shades with noise, which a network learns in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = [i % 3 for i in range(count)]
    levels = torch.randint(0, 120, (count, 16, 16, 3), generator=generator)
    for image, label in zip(levels, labels, strict=True):
        image[..., label] += 100
    return ArrayRecords("shades", levels.byte().numpy(), labels, ["red", "green", "blue"])
