"""Augmentation of training images: crop, flip, random changes, and which part to erase; from images to levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..checkpoint import Preprocessing
from ..errors import ConfigError
from ..images.decoding import ImageSource, load_planes
from ..images.transforms import check_resized, resize_and_crop, seen_box, to_device
from ..recipes.recipe import Recipe
from .levels import ErasingBox, Levels, Plan, box_sides, cut, greyed
from .randaugment import ENHANCE, RandAugment, Resampling

Box = tuple[float, float, float, float]
"""Top, left, bottom and right of a crop as fractions of the image's sides."""


class Resize:
    """Antialiased resize, with one of some interpolations drawn for each image; with `pillow` by Pillow, as timm does.

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
        # Pillow stores four bytes a pixel, and torch's kernel takes them: no repacking. Called directly, because
        # torchvision's wrappers take as much time again
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

    def box(self, height: int, width: int, rng: Random) -> Box:
        """The next crop of an image of this size, drawn as a call draws it."""
        top, left, rows, columns = self.draw(height, width, rng)
        self.resize.draw(rng)
        return top / height, left / width, (top + rows) / height, (left + columns) / width

    def __repr__(self) -> str:
        return f"random resized crop {self.size[0]}x{self.size[1]}, area {self.scale:g} to 1"


class PaddedCrop:
    """The image resized to cover `size`, padded, and cut at a random place: CIFAR's crop, and DeiT III's simple one.

    An image that has the size already is not resized.
    """

    def __init__(self, size: tuple[int, int], padding: tuple[int, int], mode: str, resize: Resize) -> None:
        self.size, self.padding, self.mode, self.resize = size, padding, mode, resize

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        resized = covering(self.size, image.height, image.width)
        check_resized("image", image.height, image.width, resized)
        image = self.resize(image, resized, rng)
        top, left = self._place(image.height, image.width, rng)
        vertical, horizontal = self.padding
        image = TF.pad(image, [horizontal, vertical], padding_mode=self.mode)
        height, width = self.size
        return image.crop((left, top, left + width, top + height))

    def fits(self, height: int, width: int) -> bool:
        """Whether an image of this size is not resized, and large enough to be mirrored at its border."""
        vertical, horizontal = self.padding
        return covering(self.size, height, width) == (height, width) and height > vertical and width > horizontal

    def place(self, height: int, width: int, rng: Random) -> tuple[int, int]:
        """The next crop of an image that `fits`, as (top, left) in the padded image."""
        self.resize.draw(rng)
        return self._place(height, width, rng)

    def box(self, height: int, width: int, rng: Random) -> Box:
        """The next crop of an image of this size, drawn as a call draws it; it may lie outside of the image in part."""
        height, width = covering(self.size, height, width)
        top, left = (
            start - padding for start, padding in zip(self.place(height, width, rng), self.padding, strict=True)
        )
        return top / height, left / width, (top + self.size[0]) / height, (left + self.size[1]) / width

    def _place(self, height: int, width: int, rng: Random) -> tuple[int, int]:
        vertical, horizontal = self.padding
        return (
            rng.randint(0, height + 2 * vertical - self.size[0]),
            rng.randint(0, width + 2 * horizontal - self.size[1]),
        )

    def __repr__(self) -> str:
        return f"pad {self.padding[0]} pixels ({self.mode}), random crop {self.size[0]}x{self.size[1]}"


def covering(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """The smallest (height, width) of an image's aspect that covers `size`; the longer side is rounded down."""
    height, width = size
    if columns * height <= rows * width:
        return max(height, width * rows // columns), width
    return height, max(width, height * columns // rows)


class EvalCrop:
    """The evaluation transform's crop, at any size: nothing random."""

    padding, mode = (0, 0), "constant"

    def __init__(self, preprocessing: Preprocessing, size: tuple[int, int]) -> None:
        self.spec = preprocessing if preprocessing.crop == size else preprocessing.at_size(size)

    def __call__(self, image: Image.Image, _: Random) -> Image.Image:
        return resize_and_crop(image, self.spec)

    def fits(self, height: int, width: int) -> bool:
        """Whether an image of this size comes out unchanged."""
        return (height, width) == self.spec.crop and self.spec.resize in (None, (height, width), min(height, width))

    def place(self, height: int, width: int, _: Random) -> tuple[int, int]:  # noqa: ARG002
        """The whole image, as (top, left)."""
        return 0, 0

    def box(self, height: int, width: int, _: Random) -> Box:
        """The crop of an image of this size."""
        left, top, right, bottom = seen_box(self.spec, height, width)
        return top / height, left / width, bottom / height, right / width

    def __repr__(self) -> str:
        return str(self.spec)


_Crop = RandomResizedCrop | PaddedCrop | EvalCrop
_Change = Callable[[Image.Image, Random], Image.Image]
_INTERPOLATIONS = {
    "bicubic": (Resampling.BICUBIC,),
    "bilinear": (Resampling.BILINEAR,),
    "random": (Resampling.BILINEAR, Resampling.BICUBIC),
}


class TrainTransform:
    """The changes of a recipe to an image: crop, flip, augment, in this order; `TrainInput` does the rest.

    All randomness follows from torch's global generator: the same seed gives the same levels and box to erase.
    The parts `crop`, `hflip`, `changes` and `erase` are attributes and may be exchanged. For other than three channels,
    by the length of the preprocessing's mean, each channel is changed in the same way, as a picture in grey.

    Shape: an RGB PIL image of any size, or see `load_planes` -> `Levels` of (C, height, width).
    Source: DeiT, table 9; DeiT III (arXiv:2204.07118) for 3-Augment and the simple crop.
    """

    def __init__(self, recipe: Recipe, preprocessing: Preprocessing, size: tuple[int, int]) -> None:
        """Build the parts.

        Args:
            recipe: `crop`, `crop_scale`, `interpolation`, `hflip`, `augment`, `color_jitter`, `erase`
                and `erase_after_mixing` are read.
            preprocessing: its resize and crop serve `crop="none"`, its mean fills places that geometric operations
                leave empty.
            size: (height, width) of the input in pixels.

        Raises: ConfigError: an `augment` that is neither none, 3-augment nor rand-...-inc1.
        """
        self.crop = _crop(recipe, preprocessing, size)
        self.hflip = recipe.hflip
        self.changes = _changes(recipe, preprocessing)
        self.erase = ErasingBox(0.0 if recipe.erase_after_mixing else recipe.erase)
        self.preprocessing, self.size, self.channels = preprocessing, size, len(preprocessing.mean)

    def __call__(self, image: ImageSource, rng: Random | None = None) -> Levels:
        """An image to levels of (C, H, W), and the box to erase; by default torch's generator seeds it."""
        rng = drawn_rng() if rng is None else rng
        if self.channels == 3:
            values = self._levels(image if isinstance(image, Image.Image) else load_planes(image, 3)[0], rng)
        else:
            state, planes = rng.getstate(), []
            for plane in load_planes(image, self.channels):
                rng.setstate(state)
                planes.append(self._levels(plane.convert("RGB"), rng)[:1])
            values = torch.cat(planes)
        return Levels(values, torch.tensor(self.erase(values.shape[1], values.shape[2], rng)))

    def seen(self, height: int, width: int, rng: Random) -> tuple[float, ...]:
        """The crop that a call makes of an image of this size with the same `rng`, and 1 if it mirrors it, else 0."""
        return (*self.crop.box(height, width, rng), float(rng.random() < self.hflip))

    def _levels(self, image: Image.Image, rng: Random) -> Tensor:
        """Levels (3, H, W) of a changed RGB image."""
        image = self.crop(image, rng)
        if rng.random() < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for change in self.changes:
            image = change(image, rng)
        # Plane by plane as Pillow can: half the time of bringing the channels forward in torch
        planes = bytearray(b"".join([band.tobytes() for band in image.split()]))
        return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)

    def cuts(self, height: int, width: int) -> bool:
        """Whether images of this size are cut without resizing, which `cut_batch` does for many at once."""
        cutter = not isinstance(self.crop, RandomResizedCrop) and self.crop.fits(height, width)
        return cutter and self.channels in (1, 3)

    def cut_batch(self, images: Tensor, rows: Sequence[int], seeds: Sequence[int]) -> Levels:
        """Levels of some images of a set in memory, bit for bit those that each image gives with its `sample_rng`.

        Shape: (N, 3, h, w) uint8, of which B rows are taken -> (B, C, H, W), (B, 5).
        """
        rngs = [sample_rng(seed) for seed in seeds]
        values = self._cut(images, self._cuts((images.shape[2], images.shape[3]), rows, rngs))
        if self.changes:
            values = self._changed(values, rngs)
        return Levels(values, self._boxes(rngs))

    def plan(self, size: tuple[int, int], rows: Sequence[int], seeds: Sequence[int]) -> Plan:
        """The work of `cut_batch` on images of a size, for a transform that does no more than cut, flip and erase."""
        rngs = [sample_rng(seed) for seed in seeds]
        return Plan(self._cuts(size, rows, rngs), self._boxes(rngs))

    def carry_out(self, images: Tensor, plan: Plan) -> Levels:
        """The levels of a `plan`, made on the device where the images are."""
        return Levels(self._cut(images, to_device(plan.cuts, images.device)), plan.erase)

    def _cut(self, images: Tensor, cuts: Tensor) -> Tensor:
        crop = self._cutter()
        values = cut(images, cuts, self.size, padding=crop.padding, mode=crop.mode)
        return greyed(values) if self.channels == 1 else values

    def _cuts(self, size: tuple[int, int], rows: Sequence[int], rngs: Sequence[Random]) -> Tensor:
        place = self._cutter().place
        return torch.tensor(
            [(row, *place(*size, rng), rng.random() < self.hflip) for row, rng in zip(rows, rngs, strict=True)]
        )

    def _cutter(self) -> PaddedCrop | EvalCrop:
        if isinstance(self.crop, RandomResizedCrop):
            raise ConfigError(f"{self.crop} resizes every image, so it cannot cut many at once")
        return self.crop

    def _boxes(self, rngs: Sequence[Random]) -> Tensor:
        return torch.tensor([self.erase(*self.size, rng) for rng in rngs])

    def _changed(self, values: Tensor, rngs: Sequence[Random]) -> Tensor:
        """Apply the changes to each image, as a picture of Pillow's."""
        height, width = self.size
        pixels = values.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
        memory, length = pixels.numpy().data.cast("B"), 3 * height * width
        for number, rng in enumerate(rngs):
            part = memory[number * length : (number + 1) * length]
            before = image = Image.frombytes("RGB", (width, height), part)
            for change in self.changes:
                image = change(image, rng)
            if image is not before:
                part[:] = image.tobytes()
        return pixels.permute(0, 3, 1, 2)[:, : self.channels].contiguous()

    def __repr__(self) -> str:
        parts = [self.crop, f"hflip {self.hflip:g}", *self.changes, self.erase]
        return f"TrainTransform({', '.join(str(part) for part in parts)})"


def drawn_rng() -> Random:
    """A generator seeded by torch's global one."""
    # Python's generator draws ten times as fast as torch's, which only seeds it; no other global state is touched
    return Random(int(torch.randint(2**62, ())))


def sample_rng(seed: int) -> Random:
    """The generator of one sample: the one that a transform makes itself after `torch.manual_seed(seed)`."""
    return Random(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))))


def _crop(recipe: Recipe, preprocessing: Preprocessing, size: tuple[int, int]) -> _Crop:
    if recipe.crop == "none":
        return EvalCrop(preprocessing, size)
    change = Resize(_INTERPOLATIONS[recipe.interpolation])
    if recipe.crop == "random_resized":
        return RandomResizedCrop(size, recipe.crop_scale, change)
    if recipe.crop == "pad":
        return PaddedCrop(size, (size[0] // 8, size[1] // 8), "constant", change)
    return PaddedCrop(size, (4, 4), "reflect", change)


def _changes(recipe: Recipe, preprocessing: Preprocessing) -> list[_Change]:
    """The random changes after the crop."""
    jitter: list[_Change] = [ColorJitter(recipe.color_jitter)] if recipe.color_jitter else []
    if recipe.augment == "none":
        return jitter
    if recipe.augment == "3-augment":
        return [ThreeAugment(), *jitter]
    fill = tuple(max(0, min(255, round(255 * value))) for value in preprocessing.for_channels(3).mean)
    return [RandAugment.parse(recipe.augment, interpolations=_INTERPOLATIONS[recipe.interpolation], fill=fill)]


class ThreeAugment:
    """One of greyscale, solarising at half the brightness, and a Gaussian blur of 0.1 to 2 pixels, equally often.

    Source: DeiT III (arXiv:2204.07118), with the figures of the authors' code.
    """

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        """An RGB image, changed."""
        which = rng.randrange(3)
        if which == 0:
            return image.convert("L").convert("RGB")
        if which == 1:
            return ImageOps.solarize(image, 128)
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))

    def __repr__(self) -> str:
        return "3-augment"


class ColorJitter:
    """Brightness, contrast and saturation, in random order, each by a factor from 1 - `amount` to 1 + `amount`.

    The same rule and pictures as torchvision's ColorJitter without hue.
    """

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        """An RGB image, changed."""
        for name in rng.sample(("Brightness", "Contrast", "Color"), 3):
            image = ENHANCE[name](image, rng.uniform(max(0.0, 1 - self.amount), 1 + self.amount))
        return image

    def __repr__(self) -> str:
        return f"color jitter {self.amount:g}"
