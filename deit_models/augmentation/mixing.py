"""Mixup, CutMix and MixToken of a batch with its reverse, one draw for the whole batch, and smoothed targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from ..errors import ConfigError, DataError
from ..images.transforms import to_device
from ..recipes.recipe import Recipe
from .label_maps import LabelMaps
from .levels import Erasing


class Mix(NamedTuple):
    """The mixture of one batch: the share that each image keeps, and the box that CutMix pastes (None: mixup).

    Attributes:
        share: lambda of the papers, from 0 to 1; for a box, the area outside it.
        box: (top, bottom, left, right) in pixels, or of MixToken in tokens, bottom and right excluded.
    """

    share: float
    box: tuple[int, int, int, int] | None


class TokenLabels(NamedTuple):
    """The maps of a run with token labelling, and the grids (height, width) of its model.

    `tokens` is the grid in front of the first block, `patches` that of the patches that are classified.
    """

    maps: LabelMaps
    tokens: tuple[int, int]
    patches: tuple[int, int]


class TokenTargets(NamedTuple):
    """Targets of token labelling.

    Attributes:
        labels: of the images, (B, K).
        patches: of the patches, (B, N, K); the sum is less than 1 where a patch lies outside of its image in part.
        exchanged: for each token in front of the first block whether MixToken takes it from the partner, (T,) bool on
            the images' device; None: the batch is not mixed so.
    """

    labels: Tensor
    patches: Tensor
    exchanged: Tensor | None


class Mixing:
    """Mixes each batch with itself in reverse order by mixup or CutMix, and makes its targets soft.

    One choice, share and box serve the whole batch, or each `mix_size` images of it; all are drawn from torch's global
    generator. Of an odd batch the middle image is its own partner.

    Args:
        recipe: `mixup`, `cutmix`, `mix_prob`, `mix_switch`, `mix_size`, `label_smoothing`, `erase` and
            `erase_after_mixing` are read.
        num_classes: K, the length of a target.
        own: used instead of mixup and CutMix, on images and smoothed targets; it may give further targets.
        tokens: for token labelling; targets are `TokenTargets` then, mixed as the pixels under each patch are. For the
            field `mix_token` images stay as they are, and the box is drawn on the grid of tokens.

    Raises: ConfigError: `num_classes` below 1.
    Source: mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899), switched between as in DeiT, table 9.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        *,
        own: Callable[[Tensor, Tensor], tuple[Tensor, Any]] | None = None,
        tokens: TokenLabels | None = None,
    ) -> None:
        if num_classes < 1:
            raise ConfigError(f"num_classes={num_classes}; expected at least 1")
        self.num_classes = num_classes
        self.own, self.tokens, self.mix_token = own, tokens, recipe.mix_token
        self.from_map = recipe.class_target == "map"
        self.smoothing, self.size = recipe.label_smoothing, recipe.mix_size
        self.erase = Erasing(recipe.erase) if recipe.erase and recipe.erase_after_mixing else None
        # MixToken draws its box as CutMix does; the authors' parameter is 1
        alphas = {"mixup": recipe.mixup, "cutmix": 1.0 if recipe.mix_token else recipe.cutmix}
        self.prob = recipe.mix_prob if any(alphas.values()) else 0.0
        self.switch = 0.0 if not alphas["cutmix"] else 1.0 if not alphas["mixup"] else recipe.mix_switch
        self._laws = {name: Beta(alpha, alpha) for name, alpha in alphas.items() if alpha}

    def __call__(self, images: Tensor, labels: Tensor, places: Tensor | None = None) -> tuple[Tensor, Any]:
        """The mixed batch and its targets; `images` is changed in place and returned.

        `places`, (B, 6), belong to `tokens`, see `TrainingSamples`.

        Shape: (B, 3, H, W) float and (B,) int64, or (B, K) of 0 and 1, which are not smoothed -> the same (B, 3, H, W)
            and (B, K) float32, beside the images.
        Labels may stay on the CPU while images are on a GPU, so that they can be checked without waiting for it.

        Raises: DataError: a label outside 0 ... K - 1 (see `smooth_one_hot`), or another number of labels than images.
        """
        if labels.shape not in (images.shape[:1], (len(images), self.num_classes)):
            raise DataError(f"labels of shape {tuple(labels.shape)} for {len(images)} images; expected one label each")
        targets: Any
        if labels.ndim == 2:
            targets = labels.to(images.device, torch.float32, non_blocking=True)
        else:
            targets = smooth_one_hot(labels, self.num_classes, self.smoothing, device=images.device)
        if self.own is not None:
            images, targets = self.own(images, targets)
        elif self.tokens is not None and places is not None:
            targets = self._with_patches(self.tokens, images, targets, places)
        else:
            targets = self._mixed(images, [targets])[0]
        if self.erase is not None:
            self.erase(images)
        return images, targets

    def _mixed(self, images: Tensor, targets: list[Tensor], grid: tuple[int, int] = (1, 1)) -> list[Tensor]:
        """Mix images in place, each `mix_size` by one draw; gives their targets (B, K), and those of patches."""
        size, done = self.size or len(images), []
        # views, which change in place
        for part, *wanted in zip(*(torch.split(tensor, size) for tensor in (images, *targets)), strict=True):
            mix = self.draw(*part.shape[-2:])
            if mix is not None:
                mix_images(part, mix)
                wanted = mixed_targets(wanted, mix, (part.shape[-2], part.shape[-1]), grid)
            done.append(wanted)
        return [torch.cat(parts) for parts in zip(*done, strict=True)]

    def _with_patches(self, tokens: TokenLabels, images: Tensor, targets: Tensor, places: Tensor) -> TokenTargets:
        """The targets of images and patches, mixed; images are mixed in place, unless their tokens are to be."""
        patches = tokens.maps.cut(places, tokens.patches, images.device)
        # what has no label gets none by smoothing
        off = self.smoothing / self.num_classes
        patches = patches * (1 - self.smoothing) + patches.sum(dim=2, keepdim=True) * off
        if self.from_map:
            targets = mean_of_patches(patches)
        if not self.mix_token:
            targets, patches = self._mixed(images, [targets, patches], tokens.patches)
            return TokenTargets(targets, patches, None)
        mix = self.draw(*tokens.tokens)
        if mix is None:
            return TokenTargets(targets, patches, None)
        targets, patches = mixed_targets([targets, patches], mix, tokens.tokens, tokens.patches)
        return TokenTargets(targets, patches, to_device(inside_box(mix, tokens.tokens).bool().flatten(), images.device))

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


def mixed_targets(targets: list[Tensor], mix: Mix, size: tuple[int, int], grid: tuple[int, int]) -> list[Tensor]:
    """Mixed targets of images, (B, K), and of the patches of a grid, (B, N, K), if they are given.

    `size` is the (height, width) on which the mixture was drawn: a patch has as much of the partner's target as of its
    area lies in the box.
    """
    labels, *patches = targets
    mixed = [mix_targets(labels, mix)]
    for rows in patches:
        shares = torch.tensor(1 - mix.share)
        if mix.box is not None:
            shares = F.adaptive_avg_pool2d(inside_box(mix, size)[None], grid).flatten()[:, None]
        shares = to_device(shares, rows.device)
        mixed.append(rows * (1 - shares) + rows.flip(0) * shares)
    return mixed


def inside_box(mix: Mix, size: tuple[int, int]) -> Tensor:
    """1 inside the box of a mixture and 0 outside, (height, width) float32."""
    inside = torch.zeros(size)
    if mix.box is not None:
        top, bottom, left, right = mix.box
        inside[top:bottom, left:right] = 1
    return inside


def mean_of_patches(patches: Tensor) -> Tensor:
    """An image's label by its patches, each weighted by its part inside the image: (B, N, K) -> (B, K), sum 1 or 0."""
    total = patches.sum(dim=1)
    return total / total.sum(dim=1, keepdim=True).clamp(min=1e-12)


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
