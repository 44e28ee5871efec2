"""From a training photograph to the levels a model learns from: crop, flip, augment, and which part to erase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ..errors import ConfigError
from ..hub.manifest import Preprocessing
from .crops import EvalCrop, PaddedCrop, RandomResizedCrop, Resize
from .levels import ErasingBox, Frame, Levels, Plan, cut, to_device
from .randaugment import ENHANCE, RandAugment, Resampling
from .recipe import Recipe

Change = Callable[[Image.Image, Random], Image.Image]
_INTERPOLATIONS = {
    "bicubic": (Resampling.BICUBIC,),
    "bilinear": (Resampling.BILINEAR,),
    "random": (Resampling.BILINEAR, Resampling.BICUBIC),
}


def train_transform(
    recipe: Recipe, preprocessing: Preprocessing, size: tuple[int, int], *, pillow_resize: bool = False
) -> TrainTransform:
    """How a recipe changes an RGB PIL image: crop, flip, augment, in this order; `levels.ToInput` does the rest.

    All randomness follows from torch's global generator: the same seed gives the same levels and box to erase.

    Args:
        recipe: `crop`, `crop_scale`, `interpolation`, `hflip`, `augment`, `color_jitter` and `erase` are read.
        preprocessing: its resize and crop serve `crop="none"`, its mean fills what geometric operations leave empty.
        size: (height, width) of the input in pixels.
        pillow_resize: resize crops with Pillow, as timm does, in twice to four times the time; see `Resize`.

    Shape: an RGB PIL image of any size -> `Levels` of (3, height, width).
    Raises: ConfigError: an `augment` that is neither none, 3-augment nor rand-...-inc1.
    Source: DeiT, table 9; DeiT III (arXiv:2204.07118) for 3-Augment and the simple crop.
    """
    return TrainTransform(recipe, preprocessing, size, pillow_resize=pillow_resize)


class TrainTransform:
    """The transform of `train_transform`; its parts are attributes, for a look or an exchange."""

    def __init__(
        self, recipe: Recipe, preprocessing: Preprocessing, size: tuple[int, int], *, pillow_resize: bool = False
    ) -> None:
        self.crop = _crop(recipe, preprocessing, size, pillow_resize=pillow_resize)
        self.hflip = recipe.hflip
        self.changes = _changes(recipe, preprocessing)
        self.erase = ErasingBox(recipe.erase)
        self.size = size

    def __call__(self, image: Image.Image, rng: Random | None = None) -> Levels:
        """An RGB PIL image to levels of (3, H, W), and the box to erase; by default torch's generator seeds it."""
        # Python's generator draws ten times as fast as torch's, which only seeds it; no other global state is touched
        rng = Random(int(torch.randint(2**62, ()))) if rng is None else rng
        image = self.crop(image, rng)
        if rng.random() < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for change in self.changes:
            image = change(image, rng)
        # Plane by plane as Pillow can: half the time of bringing the channels forward in torch
        planes = bytearray(b"".join([band.tobytes() for band in image.split()]))
        values = torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)
        return Levels(values, self.erase(image.height, image.width, rng))

    def cuts(self, height: int, width: int) -> bool:
        """Whether images of this size are cut as they are, so that `cut_batch` can do it for many at once."""
        return isinstance(self.crop, (PaddedCrop, EvalCrop)) and self.crop.fits(height, width)

    def cut_batch(self, images: Tensor, rows: Sequence[int], seeds: Sequence[int]) -> Levels:
        """Levels of some images of a set in memory, bit for bit those that each image gives with its `sample_rng`.

        Shape: (N, 3, h, w) uint8, of which B rows are taken -> (B, 3, H, W), (B, 5).
        """
        rngs = [sample_rng(seed) for seed in seeds]
        values = cut(images, self._cuts((images.shape[2], images.shape[3]), rows, rngs), self._frame())
        if self.changes:
            values = self._changed(values, rngs)
        return Levels(values, self._boxes(rngs))

    def plan(self, size: tuple[int, int], rows: Sequence[int], seeds: Sequence[int]) -> Plan:
        """What `cut_batch` would do to images of a size, where it does no more than cut, flip and erase."""
        rngs = [sample_rng(seed) for seed in seeds]
        return Plan(self._cuts(size, rows, rngs), self._boxes(rngs))

    def carry_out(self, images: Tensor, plan: Plan) -> Levels:
        """The levels of a `plan`, made on the device where the images are."""
        return Levels(cut(images, to_device(plan.cuts, images.device), self._frame()), plan.erase)

    def _frame(self) -> Frame:
        padding, mode = (
            (self.crop.padding, self.crop.mode) if isinstance(self.crop, PaddedCrop) else ((0, 0), "constant")
        )
        return Frame(self.size, padding, mode)

    def _cuts(self, size: tuple[int, int], rows: Sequence[int], rngs: Sequence[Random]) -> Tensor:
        crop = self.crop
        if not isinstance(crop, (PaddedCrop, EvalCrop)):
            raise ConfigError(f"{crop} resizes every image, so it cannot cut many at once")
        return torch.tensor(
            [(row, *crop.place(*size, rng), rng.random() < self.hflip) for row, rng in zip(rows, rngs, strict=True)]
        )

    def _boxes(self, rngs: Sequence[Random]) -> Tensor:
        return torch.tensor([self.erase.numbers(*self.size, rng) for rng in rngs])

    def _changed(self, values: Tensor, rngs: Sequence[Random]) -> Tensor:
        """Each image as a picture of Pillow's, changed, and back."""
        height, width = self.size
        pixels = values.permute(0, 2, 3, 1).contiguous()
        memory, length = pixels.numpy().data.cast("B"), 3 * height * width
        for number, rng in enumerate(rngs):
            part = memory[number * length : (number + 1) * length]
            before = image = Image.frombytes("RGB", (width, height), part)
            for change in self.changes:
                image = change(image, rng)
            if image is not before:
                part[:] = image.tobytes()
        return pixels.permute(0, 3, 1, 2).contiguous()

    def __repr__(self) -> str:
        parts = [self.crop, f"hflip {self.hflip:g}", *self.changes, self.erase]
        return f"TrainTransform({', '.join(str(part) for part in parts)})"


def sample_rng(seed: int) -> Random:
    """The generator of one sample: the one that a transform makes itself after `torch.manual_seed(seed)`."""
    return Random(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))))


def _crop(recipe: Recipe, preprocessing: Preprocessing, size: tuple[int, int], *, pillow_resize: bool) -> Change:
    if recipe.crop == "none":
        return EvalCrop(preprocessing, size)
    change = Resize(_INTERPOLATIONS[recipe.interpolation], pillow=pillow_resize)
    if recipe.crop == "random_resized":
        return RandomResizedCrop(size, recipe.crop_scale, change)
    if recipe.crop == "pad":
        return PaddedCrop(size, (size[0] // 8, size[1] // 8), "constant", change)
    return PaddedCrop(size, (4, 4), "reflect", change)


def _changes(recipe: Recipe, preprocessing: Preprocessing) -> list[Change]:
    """What happens between the crop and the tensor."""
    jitter: list[Change] = [ColorJitter(recipe.color_jitter)] if recipe.color_jitter else []
    if recipe.augment == "none":
        return jitter
    if recipe.augment == "3-augment":
        return [ThreeAugment(), *jitter]
    if not recipe.augment.startswith("rand-"):
        raise ConfigError(f"augment={recipe.augment!r}; expected none, 3-augment or for example rand-m9-mstd0.5-inc1")
    fill = tuple(min(255, round(255 * value)) for value in preprocessing.mean)
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
