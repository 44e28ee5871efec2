"""Shifted patch-token mixup: images mixed cell by cell, with a target for every patch, for models with a patch head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from ..augmentation.mixing import Mixing, check_batch, smooth_one_hot
from ..errors import ConfigError
from ..training.recipe import Recipe


class Targets(NamedTuple):
    """What a batch is to be taken for: `image` (B, K), and `patches` (B, P, K), row by row."""

    image: Tensor
    patches: Tensor


class PatchMixing:
    """Mixes the first half of each batch cell by cell, the second as a whole; each with a random partner of its half.

    A cell is what a patch of the model's last stage stands for. In the first half a box of cells is pasted from the
    partner, the same box for all images; a patch inside has the partner's target. In the second half mixup is applied,
    and every patch has the image's target. All is drawn from torch's global generator.

    Source: the ViT-ResNAS authors' code, section "shifted patch-token mixup" of the paper; the code does not shift.

    Args:
        recipe: `cutmix` is the Beta law's parameter for the boxes, `mixup` that for the mixed images.
        num_classes: K.
        side: cells along a side of the image.

    Raises: ConfigError: a recipe that switches one of the two off.
    """

    def __init__(self, recipe: Recipe, num_classes: int, side: int) -> None:
        if not (recipe.mixup and recipe.cutmix):
            raise ConfigError("mix_mode='patch' mixes both ways; mixup and cutmix must be more than 0")
        self.num_classes, self.side, self.smoothing = num_classes, side, recipe.label_smoothing
        self._boxes, self._mixtures = Beta(recipe.cutmix, recipe.cutmix), Beta(recipe.mixup, recipe.mixup)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        """The mixed batch and its targets; `images` is changed in place and returned.

        Shape: (B, 3, H, W) float and (B,) int64 -> the same (B, 3, H, W), (B, K) and (B, P, K) float32.
        Raises: DataError: see `Mixing`.
        """
        check_batch(images, labels)
        targets = smooth_one_hot(labels, self.num_classes, self.smoothing, device=images.device)
        patches = targets[:, None].repeat(1, self.side**2, 1)
        half = len(images) // 2
        self._paste(images[:half], targets[:half], patches[:half])
        self._mix_up(images[half:], targets[half:], patches[half:])
        return images, Targets(targets, patches)

    def draw_box(self) -> tuple[int, int, int, int]:
        """The cells to paste, as (top, bottom, left, right) with bottom and right excluded; it may be empty."""
        side = self.side
        cells = int(side**2 * float(self._boxes.sample()))
        height = 1 + int(torch.randint(max(1, min(side, cells) - 2), ()))
        width = cells // height
        if width > side:
            height, width = cells // side, side
        # the authors' upper bound is exclusive: a box never touches the last row and column unless it must
        top, left = (int(torch.randint(max(side - size, 1), ())) for size in (height, width))
        return top, top + height, left, left + width

    def _paste(self, images: Tensor, targets: Tensor, patches: Tensor) -> None:
        top, bottom, left, right = self.draw_box()
        partner = torch.randperm(len(images), device=images.device)
        rows, columns = images.shape[-2] // self.side, images.shape[-1] // self.side
        part = (..., slice(top * rows, bottom * rows), slice(left * columns, right * columns))
        images[part] = images[partner][part]
        cells = patches.view(len(patches), self.side, self.side, self.num_classes)
        cells[:, top:bottom, left:right] = targets[partner][:, None, None]
        share = 1 - (bottom - top) * (right - left) / self.side**2
        _blend(targets, partner, share)

    def _mix_up(self, images: Tensor, targets: Tensor, patches: Tensor) -> None:
        share, partner = float(self._mixtures.sample()), torch.randperm(len(images), device=images.device)
        _blend(images, partner, share)
        _blend(targets, partner, share)
        patches.copy_(targets[:, None].expand_as(patches))


def _blend(values: Tensor, partner: Tensor, share: float) -> None:
    """In place: each of a batch mixed with its partner."""
    partners = values[partner]  # a copy, made before the values change
    values.mul_(share).add_(partners, alpha=1 - share)


def make_mixing(recipe: Recipe, num_classes: int, model: nn.Module) -> Mixing | PatchMixing:
    """How the recipe mixes batches for a model.

    Raises: ConfigError: it mixes patch by patch, and the model has no patch head or no square grid of patches.
    """
    if recipe.mix_mode == "batch":
        return Mixing(recipe, num_classes)
    config: Any = getattr(model, "config", None)
    if not getattr(config, "patch_head", False):
        raise ConfigError("mix_mode='patch' needs a model with a patch head, such as vit_resnas_tiny; pass 'batch'")
    height, width = config.grids[-1]
    if height != width:
        raise ConfigError(f"mix_mode='patch' needs a square image; this model's patches are {height}x{width}")
    return PatchMixing(recipe, num_classes, height)
