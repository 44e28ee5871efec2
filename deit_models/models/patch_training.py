"""Training of ViT-ResNAS' patch head: shifted patch-token mixup, and the loss of the head.

Tensors alone: `training` calls this through its protocol `ExtraHeads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta

from ..errors import ConfigError


class PatchLogits(NamedTuple):
    """Logits of each head: (B, num_classes), and (B, patches, num_classes) of the patch head; None: no such head."""

    cls: Tensor
    dist: Tensor | None
    patches: Tensor | None


class PatchTargets(NamedTuple):
    """Soft labels of a mixed batch: `image` (B, K), and `patches` (B, P, K), row by row."""

    image: Tensor
    patches: Tensor


class PatchMixing:
    """Mixes the first half of each batch cell by cell, the second as a whole; each with a random partner of its half.

    A cell is the part of the image that one patch of the model's last stage covers. In the first half a box of cells is
    pasted from the partner, the same box for all images; a patch inside has the partner's target. In the second half
    mixup is applied, and every patch has the image's target. All is drawn from torch's global generator.

    Source: the ViT-ResNAS authors' code, section "shifted patch-token mixup" of the paper; the code does not shift.

    Args:
        side: cells along a side of the image.
        mixup: parameter of the Beta law for the mixed images.
        cutmix: that for the boxes.

    Raises: ConfigError: one of the two is 0.
    """

    def __init__(self, side: int, *, mixup: float, cutmix: float) -> None:
        if not (mixup and cutmix):
            raise ConfigError("mix_mode='patch' mixes both ways; mixup and cutmix must be more than 0")
        self.side = side
        self._boxes, self._mixtures = Beta(cutmix, cutmix), Beta(mixup, mixup)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, PatchTargets]:
        """The mixed batch and its targets; `images` and `targets` are changed in place.

        Shape: (B, 3, H, W) and (B, K) float -> the same (B, 3, H, W), the same (B, K) and (B, P, K).
        """
        patches = targets[:, None].repeat(1, self.side**2, 1)
        half = len(images) // 2
        self._paste(images[:half], targets[:half], patches[:half])
        self._mix_up(images[half:], targets[half:], patches[half:])
        return images, PatchTargets(targets, patches)

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
        cells = patches.view(len(patches), self.side, self.side, targets.shape[1])
        cells[:, top:bottom, left:right] = targets[partner][:, None, None]
        share = 1 - (bottom - top) * (right - left) / self.side**2
        _blend(targets, partner, share)

    def _mix_up(self, images: Tensor, targets: Tensor, patches: Tensor) -> None:
        share, partner = float(self._mixtures.sample()), torch.randperm(len(images), device=images.device)
        _blend(images, partner, share)
        _blend(targets, partner, share)
        patches.copy_(targets[:, None].expand_as(patches))


def _blend(values: Tensor, partner: Tensor, share: float) -> None:
    """Mix each entry of a batch with its partner, in place."""
    partners = values[partner]  # a copy, made before the values change
    values.mul_(share).add_(partners, alpha=1 - share)


class PatchTraining(NamedTuple):
    """Mixing and loss of a model with a patch head; `mix` is None where batches are mixed as for other models."""

    mix: PatchMixing | None

    def loss(
        self, logits: PatchLogits, targets: Tensor | PatchTargets, label_loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Loss of the patch head by `label_loss`; without targets of its own a patch has the target of its image.

        Returns: a scalar; 0 for a model in eval mode, which gives no logits of patches.
        """
        if logits.patches is None:
            return logits.cls.new_zeros(())
        if isinstance(targets, PatchTargets):
            wanted = targets.patches
        else:
            wanted = targets[:, None].expand_as(logits.patches)
        return label_loss(logits.patches.flatten(0, 1), wanted.flatten(0, 1))
