"""Convnets that serve as teachers for small images: ResNet-20, and a wider network that trains in few epochs.

On the command line: `deit-models distill ... --teacher examples/teachers.py:resnet20 --teacher-weights FILE`.
Networks first, then the factories, then `train_teacher`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import deit_models
from deit_models.data.records import ImageRecords
from deit_models.images.transforms import EvalTransform
from deit_models.recipes.recipe import Recipe
from deit_models.training.run import TrainResult
from deit_models.training.teacher import Teacher, load_teacher


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    Source: He et al. 2016, section 4.2; the shortcuts between stages are 1x1 convolutions (their option B).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The residual step."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class Whitening(nn.Conv2d):
    """Frozen first layer: 2x2 patches onto the principal directions of the training images' patches, both signs.

    Shape: (B, 3, H, W) -> (B, 24, H - 1, W - 1).
    Source: Jordan, 94 % on CIFAR-10 in 3.29 seconds on a single GPU, 2024, arXiv:2404.00498, section 3.2.
    """

    def __init__(self) -> None:
        super().__init__(3, 24, 2, bias=False)
        self.weight.requires_grad_(False)

    def fit(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the filters, in place, from images in the form of the network's input, (N, 3, H, W) float."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        values, directions = torch.linalg.eigh(torch.cov(patches.T.double()))
        filters = (directions.T / (values + eps).sqrt()[:, None]).view(12, 3, 2, 2)
        self.weight.data.copy_(torch.cat([filters, -filters]))


class Stage(nn.Module):
    """A 3x3 convolution, halving, then `extra` more 3x3 convolutions with a shortcut around them."""

    def __init__(self, c_in: int, c_out: int, extra: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.MaxPool2d(2))
        self.enter_norm = nn.BatchNorm2d(c_out)
        self.convs = nn.ModuleList(nn.Conv2d(c_out, c_out, 3, padding=1, bias=False) for _ in range(extra))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c_out) for _ in range(extra))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H // 2, W // 2)."""
        x = inner = F.gelu(self.enter_norm(self.enter(x)))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            inner = F.gelu(norm(conv(inner)))
        return x + inner


class StagedConvNet(nn.Module):
    """Whitening, one stage a width, the largest value of each channel, a linear layer: (B, 3, H, W) -> (B, K).

    Most of the work is done at half the image's size and below, so it is cheap for its accuracy.
    Source: after Jordan 2024 (see `Whitening`); the shortcuts as in his larger networks.
    """

    def __init__(self, widths: tuple[int, ...], *, extra: int, num_classes: int) -> None:
        super().__init__()
        self.whitening = Whitening()
        stages, c_in = [], 24
        for width in widths:
            stages.append(Stage(c_in, width, extra))
            c_in = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; divided by 8, so that the first steps are small ones."""
        return self.head(self.stages(F.gelu(self.whitening(x))).amax(dim=(2, 3))) / 8


def resnet20(num_classes: int = 10) -> nn.Sequential:
    """ResNet-20 with random weights, 0.27 M parameters, 41 M MACs: (B, 3, 32, 32) -> (B, num_classes)."""
    blocks = []
    c_in = 16
    for stage, width in enumerate((16, 32, 64)):
        for number in range(3):
            blocks.append(BasicBlock(c_in, width, stride=2 if stage and not number else 1))
            c_in = width
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)]
    return nn.Sequential(*stem, *blocks, *head).to(memory_format=torch.channels_last)


def _staged(widths: tuple[int, ...], extra: int, num_classes: int) -> StagedConvNet:
    return StagedConvNet(widths, extra=extra, num_classes=num_classes).to(memory_format=torch.channels_last)


def cifar_small(num_classes: int = 10) -> StagedConvNet:
    """For CIFAR-10 on a CPU: 1.97 M parameters, 118 M MACs at 32 pixels."""
    return _staged((64, 256, 256), 1, num_classes)


def cifar_large(num_classes: int = 10) -> StagedConvNet:
    """For CIFAR-10 on a GPU."""
    return _staged((128, 384, 512), 2, num_classes)


def tiny_imagenet_large(num_classes: int = 200) -> StagedConvNet:
    """For Tiny ImageNet's 200 classes at 64 pixels on a GPU."""
    return _staged((128, 256, 512, 768), 2, num_classes)


def train_teacher(
    factory: Callable[[int], nn.Module], recipe: Recipe, train: ImageRecords, val: ImageRecords, **options: Any
) -> tuple[Teacher, TrainResult]:
    """Teacher in bf16, trained unless that is done; with its averaged weights if the recipe averages.

    Args:
        factory: makes the network for a number of classes; a `Whitening` in it is fitted to 5,000 training images.
        recipe: of the training, and the seed of the weights.
        train: training images.
        val: images to score on.
        **options: of `deit_models.train`; `out` and `preprocessing` are needed.

    The averaged network's file is `out/ema/model.safetensors`, else `out/model/model.safetensors`.
    """
    torch.manual_seed(recipe.seed)
    network = factory(len(train.classes))
    to_input = EvalTransform(options["preprocessing"])
    for module in network.modules():
        if isinstance(module, Whitening):
            module.fit(torch.stack([to_input(train[index][0]) for index in range(min(len(train), 5000))]))
    result = deit_models.train(network, recipe=recipe, train=train, val=val, **options)
    name = "ema" if recipe.ema_decay else "model"
    network.load_state_dict(load_file(Path(options["out"]) / name / "model.safetensors"))
    return load_teacher(
        network,
        num_classes=len(train.classes),
        student=options["preprocessing"],
        device=options.get("device"),
        precision="bf16",
    ), result


def run_options(out: Path, name: str) -> dict[str, Any]:
    """Options of `deit_models.train` for one of several runs: its folder in `out`, and a printed line an epoch."""
    return {"out": out / name, "on_epoch": lambda row: print(json.dumps({"run": name, **row}), flush=True)}
