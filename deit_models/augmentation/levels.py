"""Training images as bytes, and the steps that the training process does for a whole batch: cut, normalise, erase.

Normalising and erasing are cheap in bulk. Done by the training process, they leave a quarter of the bytes to pass
through shared memory and to a GPU, and spare the workers, which are the bottleneck. Small sets may lie on the device
from the beginning: then batches are cut from them there.
"""

from __future__ import annotations

import math
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import Preprocessing
from ..images.transforms import to_device


class Levels(NamedTuple):
    """Images before normalising, and boxes to erase; of one image as below, or with a batch axis in front.

    Attributes:
        values: (C, H, W) uint8.
        erase: (5,) int64: top, left, height, width of the box, height 0 for none, and the seed of its noise.
    """

    values: Tensor
    erase: Tensor


class Plan(NamedTuple):
    """Crops of images that lie in memory on the device, planned on the host: (B, 4) and (B, 5) int64.

    Attributes:
        cuts: row of the set, top and left of the crop in the padded image, 1 to mirror it.
        erase: as in `Levels`.
    """

    cuts: Tensor
    erase: Tensor


def cut(images: Tensor, cuts: Tensor, size: tuple[int, int], *, padding: tuple[int, int], mode: str) -> Tensor:
    """Pad (above and beside; "constant" or "reflect"), crop and mirror a batch, with no copy of the padded images.

    Shape: (N, C, h, w) uint8 and (B, 4) int64 (see `Plan`), on one device -> (B, C, H, W) uint8, `size` being (H, W).
    """
    (_, _, height, width), (rows, columns) = images.shape, size
    index, top, left, mirrored = cuts[:, :, None].unbind(1)
    down, across = torch.arange(rows, device=images.device), torch.arange(columns, device=images.device)
    down = top + down - padding[0]
    across = left + torch.where(mirrored > 0, columns - 1 - across, across) - padding[1]
    if mode == "reflect":
        down, across = _mirrored_inside(down, height), _mirrored_inside(across, width)
    places = down.clamp(0, height - 1)[:, :, None] * width + across.clamp(0, width - 1)[:, None, :]
    pixels = images.flatten(2)[index[:, 0]].gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    values = pixels.view(*pixels.shape[:2], rows, columns)
    if mode == "reflect" or padding == (0, 0):
        return values
    inside = ((down >= 0) & (down < height))[:, :, None] & ((across >= 0) & (across < width))[:, None, :]
    return values.mul_(inside[:, None])


def greyed(images: Tensor) -> Tensor:
    """Colours to greys as Pillow converts them: (B, 3, H, W) -> (B, 1, H, W) uint8."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[:, None]


def _mirrored_inside(places: Tensor, length: int) -> Tensor:
    """Places outside 0 ... length - 1, reflected at the edge pixel, which is not repeated."""
    return length - 1 - (length - 1 - places.abs()).abs()


class ErasingBox:
    """With some probability draws a box of an image, which becomes noise.

    Area 2 % to a third of the image's, aspect log-uniform from 0.3 to 1/0.3, ten tries; never the full width or height.

    Source: random erasing (arXiv:1708.04896), timm's mode "pixel", which DeiT, table 9, trains with.
    """

    def __init__(self, prob: float = 0.25) -> None:
        self.prob = prob

    def __call__(self, height: int, width: int, rng: Random) -> tuple[int, int, int, int, int]:
        """The numbers of `Levels.erase` for an image of this size."""
        box = self.draw(height, width, rng) if rng.random() < self.prob else None
        return (0, 0, 0, 0, 0) if box is None else (*box, rng.getrandbits(62))

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


class Erasing:
    """With some probability makes a box of each image of a batch noise, as `ErasingBox` and `TrainInput` do.

    All is drawn from generators that torch's global one seeds.
    """

    def __init__(self, prob: float) -> None:
        self.box = ErasingBox(prob)

    def __call__(self, images: Tensor) -> None:
        """In place: (B, C, H, W) float, of mean 0 and deviation 1."""
        rng = Random(int(torch.randint(2**62, ())))
        boxes = torch.tensor([self.box(images.shape[2], images.shape[3], rng) for _ in images])
        erase(images, boxes, torch.Generator(images.device))


def erase(images: Tensor, boxes: Tensor, generator: torch.Generator) -> None:
    """In place: normal noise in the `boxes` (B, 5) of images (B, C, H, W), see `Levels.erase`; the first box seeds it.

    `boxes` stay on the host, so that nothing waits for a GPU.
    """
    hit = boxes[:, 2].nonzero().flatten()
    if not len(hit):
        return
    generator.manual_seed(int(boxes[hit[0], 4]))
    noise = torch.randn(len(hit), *images.shape[1:], generator=generator, device=images.device)
    paste(noise, images, to_device(hit, images.device), to_device(boxes[hit], images.device))


def box_sides(area: float, aspect: float) -> tuple[int, int]:
    """Height and width in whole pixels of a box with this area and width / height."""
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


class TrainInput:
    """Turns a batch of levels into the model's input on a device: divided by 255, normalised, boxes made noise.

    Noise is normal, pixel by pixel. The first box of a batch seeds it: the same for the same batch and kind of device.
    Nothing waits for a GPU: `Levels.erase`, which says where boxes are, stays on the host.

    Differs from `EvalInput`: multiplies by one factor instead of dividing twice, which saves time.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        scale = 255 * torch.tensor(preprocessing.std, dtype=torch.float64)
        offset = -255 * torch.tensor(preprocessing.mean, dtype=torch.float64) / scale
        self._factor = (1 / scale).float().view(-1, 1, 1).to(device)
        self._offset = offset.float().view(-1, 1, 1).to(device)
        self._noise = torch.Generator(device)
        self.device = device

    def __call__(self, levels: Levels) -> Tensor:
        """(B, C, H, W) float32 on the device."""
        images = levels.values.to(self.device, non_blocking=True) * self._factor
        images += self._offset
        erase(images, levels.erase, self._noise)
        return images


def paste(noise: Tensor, images: Tensor, where: Tensor, boxes: Tensor) -> None:
    """In place: (K, C, H, W) noise in the `boxes` (K, 5) of those `images` whose numbers are in `where` (K,)."""
    top, left, height, width, _ = boxes[:, :, None].unbind(1)
    down, across = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows, columns = (down >= top) & (down < top + height), (across >= left) & (across < left + width)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    images.index_copy_(0, where, torch.where(inside, noise, images[where]))
