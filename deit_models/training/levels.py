"""Augmented images on their way to the model: bytes until they are a batch where the model is, then its input.

Normalising and erasing come last and are cheap in bulk. Left to the training process they leave a quarter of the bytes
to pass through shared memory and to a GPU, and spare the workers, which are the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ..hub.manifest import Preprocessing
from .loading import Batch


class Levels(NamedTuple):
    """Images before normalising, and what to erase of them; of one image as below, or with a batch axis in front.

    Attributes:
        values: (3, H, W) uint8.
        erase: (5,) int64: top, left, height, width of the box, height 0 for none, and the seed of its noise.
    """

    values: Tensor
    erase: Tensor


class ErasingBox:
    """With some probability a box of an image to erase, to become noise.

    Area 2 % to a third of the image's, aspect log-uniform from 0.3 to 1/0.3, ten tries; never the full width or height.

    Source: random erasing (arXiv:1708.04896), timm's mode "pixel", which DeiT, table 9, trains with.
    """

    def __init__(self, prob: float = 0.25) -> None:
        self.prob = prob

    def __call__(self, height: int, width: int, rng: Random) -> Tensor:
        """`Levels.erase` of an image of this size."""
        box = self.draw(height, width, rng) if rng.random() < self.prob else None
        return torch.zeros(5, dtype=torch.int64) if box is None else torch.tensor([*box, rng.getrandbits(62)])

    @staticmethod
    def draw(height: int, width: int, rng: Random) -> tuple[int, int, int, int] | None:
        """A box (top, left, height, width) of an image; None: none of ten fitted."""
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            rows, columns = box_sides(area, math.exp(rng.uniform(math.log(0.3), -math.log(0.3))))
            if rows < height and columns < width:
                return rng.randint(0, height - rows), rng.randint(0, width - columns), rows, columns
        return None

    def __repr__(self) -> str:
        return f"erase {self.prob:g}"


def box_sides(area: float, aspect: float) -> tuple[int, int]:
    """Height and width in whole pixels of a box with this area and width / height."""
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


class ToInput:
    """Turns a batch of levels into the model's input on a device: divided by 255, normalised, boxes made noise.

    Noise is normal, pixel by pixel, and the same for the same seed and kind of device.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        scale = 255 * torch.tensor(preprocessing.std, dtype=torch.float64)
        offset = -255 * torch.tensor(preprocessing.mean, dtype=torch.float64) / scale
        self._factor = (1 / scale).float().view(3, 1, 1).to(device)
        self._offset = offset.float().view(3, 1, 1).to(device)
        self._noise = torch.Generator(device)
        self.device = device

    def __call__(self, levels: Levels) -> Tensor:
        """(B, 3, H, W) float32 on the device."""
        images = levels.values.to(self.device, non_blocking=True) * self._factor
        images += self._offset
        for image, (top, left, height, width, seed) in zip(images, levels.erase.tolist(), strict=True):
            if height:
                self._noise.manual_seed(seed)
                # Drawn in one piece and copied: normal_ on the box itself takes eight times as long
                noise = torch.randn(len(image), height, width, generator=self._noise, device=self.device)
                image[:, top : top + height, left : left + width] = noise
        return images


class InputBatches:
    """A loader's batches, ready for the model; read it as often as the loader."""

    def __init__(self, loader: Iterable[tuple[Levels, Tensor, Tensor]], to_input: ToInput) -> None:
        self.loader, self.to_input = loader, to_input

    def __iter__(self) -> Iterator[Batch]:
        for levels, labels, failed in self.loader:
            yield self.to_input(levels), labels, failed
