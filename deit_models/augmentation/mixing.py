"""Mixup and CutMix of a batch with its reverse, one draw for the whole batch, and smoothed targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta

from ..errors import ConfigError, DataError
from ..recipes.recipe import Recipe
from .levels import Erasing


class Mix(NamedTuple):
    """The mixture of one batch: the share that each image keeps, and the box that CutMix pastes (None: mixup).

    Attributes:
        share: lambda of the papers, from 0 to 1; for a box, the area outside it.
        box: (top, bottom, left, right) in pixels, bottom and right excluded.
    """

    share: float
    box: tuple[int, int, int, int] | None


class Mixing:
    """Mixes each batch with itself in reverse order by mixup or CutMix, and makes its targets soft.

    One choice, share and box serve the whole batch, or each `mix_size` images of it; all are drawn from torch's global
    generator. Of an odd batch the middle image is its own partner.

    Args:
        recipe: `mixup`, `cutmix`, `mix_prob`, `mix_switch`, `mix_size`, `label_smoothing`, `erase` and
            `erase_after_mixing` are read.
        num_classes: K, the length of a target.
        own: used instead of mixup and CutMix, on images and smoothed targets; it may give further targets.

    Raises: ConfigError: `num_classes` below 1.
    Source: mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899), switched between as in DeiT, table 9.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        *,
        own: Callable[[Tensor, Tensor], tuple[Tensor, Any]] | None = None,
    ) -> None:
        if num_classes < 1:
            raise ConfigError(f"num_classes={num_classes}; expected at least 1")
        self.num_classes = num_classes
        self.own = own
        self.smoothing, self.size = recipe.label_smoothing, recipe.mix_size
        self.erase = Erasing(recipe.erase) if recipe.erase and recipe.erase_after_mixing else None
        self.prob = recipe.mix_prob if recipe.mixup or recipe.cutmix else 0.0
        self.switch = 0.0 if not recipe.cutmix else 1.0 if not recipe.mixup else recipe.mix_switch
        alphas = {"mixup": recipe.mixup, "cutmix": recipe.cutmix}
        self._laws = {name: Beta(alpha, alpha) for name, alpha in alphas.items() if alpha}

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        """The mixed batch and its targets; `images` is changed in place and returned.

        Shape: (B, 3, H, W) float and (B,) int64, or (B, K) of 0 and 1, which are not smoothed -> the same (B, 3, H, W)
            and (B, K) float32, beside the images.
        Labels may stay on the CPU while images are on a GPU, so that they can be checked without waiting for it.

        Raises: DataError: a label outside 0 ... K - 1 (see `smooth_one_hot`), or another number of labels than images.
        """
        if labels.shape not in (images.shape[:1], (len(images), self.num_classes)):
            raise DataError(f"labels of shape {tuple(labels.shape)} for {len(images)} images; expected one label each")
        if labels.ndim == 2:
            targets = labels.to(images.device, torch.float32, non_blocking=True)
        else:
            targets = smooth_one_hot(labels, self.num_classes, self.smoothing, device=images.device)
        if self.own is not None:
            images, targets = self.own(images, targets)
        else:
            size = self.size or len(images)
            pairs = zip(
                torch.split(images, size), torch.split(targets, size), strict=True
            )  # views, which change in place
            targets = torch.cat([self._mixed(part, wanted) for part, wanted in pairs])
        if self.erase is not None:
            self.erase(images)
        return images, targets

    def _mixed(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mix images in place, by one draw; gives their targets."""
        mix = self.draw(images.shape[-2], images.shape[-1])
        if mix is None:
            return targets
        mix_images(images, mix)
        return mix_targets(targets, mix)

    def draw(self, height: int, width: int) -> Mix | None:
        """The mixture of the next batch, of this size in pixels; None: it is not mixed."""
        if float(torch.rand(())) >= self.prob:  # which is below 1 and may be 0
            return None
        cutmix = float(torch.rand(())) < self.switch
        share = float(self._laws["cutmix" if cutmix else "mixup"].sample())
        if not cutmix:
            return Mix(share, None)
        centre = int(torch.randint(height, ())), int(torch.randint(width, ()))
        box = cutmix_box(height, width, share, centre)
        top, bottom, left, right = box
        # the box may stick out of the image: the area inside counts
        return Mix(1 - (bottom - top) * (right - left) / (height * width), box)


def cutmix_box(height: int, width: int, share: float, centre: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of CutMix as (top, bottom, left, right): sides sqrt(1 - share) of the image's, clipped to it.

    Differs from timm 1.x: an odd side loses one pixel, as in the timm 0.3.2 of the papers and in torchvision.
    """
    scale = math.sqrt(1 - share)
    half_height, half_width = int(height * scale) // 2, int(width * scale) // 2
    row, column = centre
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """In place: each image of (B, 3, H, W) mixed with the one at the mirrored place of the batch."""
    if mix.box is None:
        partners = images.flip(0).mul_(1 - mix.share)  # a copy, made before the images change
        return images.mul_(mix.share).add_(partners)
    top, bottom, left, right = mix.box
    part = images[:, :, top:bottom, left:right]
    part.copy_(part.flip(0))
    return images


def mix_targets(targets: Tensor, mix: Mix) -> Tensor:
    """Targets (B, K) for images mixed by `mix_images`."""
    return targets * mix.share + targets.flip(0) * (1 - mix.share)


def smooth_one_hot(
    labels: Tensor, num_classes: int, smoothing: float, *, device: torch.device | str | None = None
) -> Tensor:
    """1 - smoothing on the label's class, and `smoothing` spread evenly over all classes, this one included.

    Shape: (B,) int64 -> (B, K) float32, on `device` (default: the labels').
    Raises: DataError: a label outside 0 ... K - 1, in labels on the CPU; it is named. Reading labels that are on a GPU
        would make every step wait for it.
    """
    if labels.numel() and labels.device.type == "cpu":
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise DataError(f"label {wrong} with {num_classes} classes; labels run from 0 to {num_classes - 1}")
    off = smoothing / num_classes
    where = labels.to(device=device, dtype=torch.int64, non_blocking=True).view(-1, 1)
    targets = torch.full((len(labels), num_classes), off, dtype=torch.float32, device=where.device)
    return targets.scatter_(1, where, 1 - smoothing + off)
