"""Which part of a training image is taken, and at what size: random boxes, padded crops, the evaluation transform's."""

from __future__ import annotations

import math
from random import Random

import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from ..errors import ConfigError
from ..hub.manifest import Preprocessing
from .levels import box_sides
from .randaugment import Resampling


class Resize:
    """Antialiased resize, with one of some interpolations drawn for each image.

    Differs from Pillow's by default: torch's integer kernel, which takes a quarter to a half of the time. About 0.3 %
    of the levels (of 255) come out different by 1, hardly any by 2; Pillow 13, which began to resize tall crops column
    by column first, differs more from the Pillow 11 before it.
    """

    def __init__(self, interpolations: tuple[Resampling, ...], *, pillow: bool = False) -> None:
        self.interpolations, self.pillow = interpolations, pillow

    def __call__(self, image: Image.Image, size: tuple[int, int], rng: Random) -> Image.Image:
        """An RGB image at `size`, (height, width) in pixels."""
        interpolation = self.draw(rng)
        if (image.height, image.width) == size:
            return image
        height, width = size
        if self.pillow:
            return image.resize((width, height), interpolation)
        # Four bytes a pixel are what Pillow stores and what torch's kernel computes with: no repacking.
        # interpolate itself, because torchvision's wrappers around it cost as much again
        pixels = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
        planes = pixels.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
        planes = torch.nn.functional.interpolate(planes, size, mode=interpolation.name.lower(), antialias=True)
        return Image.frombytes("RGB", (width, height), planes.permute(0, 2, 3, 1).numpy().tobytes(), "raw", "RGBX")

    def draw(self, rng: Random) -> Resampling:
        """The interpolation of the next image; drawn whether or not it is resized."""
        return rng.choice(self.interpolations)


class RandomResizedCrop:
    """A box of random area and aspect, resized to `size`, (height, width) in pixels.

    The rule is torchvision's and timm's: area uniform from `scale` to 1, aspect log-uniform from 3/4 to 4/3, ten tries,
    then the centre with the nearest aspect allowed.
    """

    def __init__(self, size: tuple[int, int], scale: float, resize: Resize) -> None:
        if not 0 < scale <= 1:
            raise ConfigError(f"crop_scale={scale:g}; expected above 0 and at most 1")
        self.size, self.scale, self.resize = size, scale, resize

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        top, left, height, width = self.draw(image.height, image.width, rng)
        return self.resize(image.crop((left, top, left + width, top + height)), self.size, rng)

    def draw(self, height: int, width: int, rng: Random) -> tuple[int, int, int, int]:
        """The next box of an image of this size, as (top, left, height, width)."""
        for _ in range(10):
            area = rng.uniform(self.scale, 1) * height * width
            rows, columns = box_sides(area, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))))
            if 0 < rows <= height and 0 < columns <= width:
                return rng.randint(0, height - rows), rng.randint(0, width - columns), rows, columns
        rows, columns = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        return (height - rows) // 2, (width - columns) // 2, rows, columns

    def __repr__(self) -> str:
        return f"random resized crop {self.size[0]}x{self.size[1]}, area {self.scale:g} to 1"


class PaddedCrop:
    """The image resized to cover `size`, padded, and cut at a random place: CIFAR's crop, and DeiT III's simple one.

    An image that has the size already is not resized.
    """

    def __init__(self, size: tuple[int, int], padding: tuple[int, int], mode: str, resize: Resize) -> None:
        self.size, self.padding, self.mode, self.resize = size, padding, mode, resize

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        image = self.resize(image, covering(self.size, image), rng)
        top, left = self._place(image.height, image.width, rng)
        vertical, horizontal = self.padding
        image = TF.pad(image, [horizontal, vertical], padding_mode=self.mode)
        height, width = self.size
        return image.crop((left, top, left + width, top + height))

    def fits(self, height: int, width: int) -> bool:
        """Whether an image of this size is not resized, and large enough to be mirrored at its border."""
        vertical, horizontal = self.padding
        return _covering(self.size, height, width) == (height, width) and height > vertical and width > horizontal

    def place(self, height: int, width: int, rng: Random) -> tuple[int, int]:
        """The next crop of an image that `fits`, as (top, left) in the padded image."""
        self.resize.draw(rng)
        return self._place(height, width, rng)

    def _place(self, height: int, width: int, rng: Random) -> tuple[int, int]:
        vertical, horizontal = self.padding
        return (
            rng.randint(0, height + 2 * vertical - self.size[0]),
            rng.randint(0, width + 2 * horizontal - self.size[1]),
        )

    def __repr__(self) -> str:
        return f"pad {self.padding[0]} pixels ({self.mode}), random crop {self.size[0]}x{self.size[1]}"


def covering(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    """The smallest (height, width) of the image's aspect that covers `size`; the longer side is rounded down."""
    return _covering(size, image.height, image.width)


def _covering(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    height, width = size
    if columns * height <= rows * width:
        return max(height, width * rows // columns), width
    return height, max(width, height * columns // rows)


class EvalCrop:
    """The evaluation transform's crop, at any size: nothing random."""

    def __init__(self, preprocessing: Preprocessing, size: tuple[int, int]) -> None:
        self.spec = preprocessing if preprocessing.crop == size else preprocessing.at_size(size)

    def __call__(self, image: Image.Image, _: Random) -> Image.Image:
        resize = [self.spec.resize] if isinstance(self.spec.resize, int) else list(self.spec.resize)
        image = TF.resize(image, resize, interpolation=InterpolationMode(self.spec.interpolation))
        return TF.center_crop(image, list(self.spec.crop))

    def fits(self, height: int, width: int) -> bool:
        """Whether an image of this size comes out unchanged."""
        resized = self.spec.resize if isinstance(self.spec.resize, tuple) else (height, width)
        shorter = min(height, width) if isinstance(self.spec.resize, tuple) else self.spec.resize
        return (height, width) == self.spec.crop == resized and min(height, width) == shorter

    def place(self, height: int, width: int, _: Random) -> tuple[int, int]:  # noqa: ARG002
        """The whole image, as (top, left)."""
        return 0, 0

    def __repr__(self) -> str:
        return str(self.spec)
