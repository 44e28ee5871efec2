"""RandAugment with growing strengths and magnitude noise, on PIL images: timm's `rand-m9-mstd0.5-inc1`.

torchvision's class of the same name has other operations, ranges and probabilities; a picture made here at a given
operation and magnitude is timm's, pixel for pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from PIL import Image, ImageEnhance, ImageOps

from ..errors import ConfigError

Resampling = Image.Resampling
MAX_MAGNITUDE = 10.0

Fill = tuple[int, ...]
Geometry = Callable[[Image.Image, float], tuple[float, ...]]
Operation = Callable[[Image.Image, float], Image.Image]


class RandAugment:
    """Draws `layers` operations with replacement, and applies each with probability `prob` at a noisy magnitude.

    Args:
        magnitude: the mean, from 0 (nearly nothing) to 10.
        noise: standard deviation of the magnitude, drawn anew for each operation and clipped to 0 ... 10.
        layers: operations drawn for an image.
        prob: with which each of them is applied.
        interpolations: of geometric operations; one is drawn where there are several.
        fill: RGB of pixels that a geometric operation takes from outside the image.

    Raises: ConfigError: a value out of range.
    Source: RandAugment (arXiv:1909.13719) in timm's form, which DeiT, table 9, trains with.
    """

    def __init__(
        self,
        magnitude: float,
        noise: float = 0.0,
        *,
        layers: int = 2,
        prob: float = 0.5,
        interpolations: tuple[Resampling, ...] = (Resampling.BICUBIC,),
        fill: Fill = (124, 116, 104),
    ) -> None:
        for name, value, high in (("magnitude", magnitude, MAX_MAGNITUDE), ("noise", noise, 100.0), ("prob", prob, 1)):
            if not 0 <= value <= high:
                raise ConfigError(f"RandAugment {name}={value:g}; expected 0 to {high:g}")
        self.magnitude, self.noise, self.layers, self.prob = magnitude, noise, layers, prob
        self.interpolations, self.fill = interpolations, fill

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        interpolations: tuple[Resampling, ...] = (Resampling.BICUBIC,),
        fill: Fill = (124, 116, 104),
    ) -> RandAugment:
        """From timm's notation: `rand`, then any of m (magnitude), mstd (noise), n (layers), p (prob), and inc1.

        Raises: ConfigError: another notation, a part twice or unknown, or no inc1 (strengths that do not all grow with
            the magnitude are not offered).
        """
        first, *parts = text.split("-")
        values = {}
        for part in parts:
            match = re.fullmatch(r"(mstd|m|n|p|inc)(\d+(?:\.\d+)?)", part)
            if match is None or match[1] in values:
                raise ConfigError(f"augment={text!r}: part {part!r}; expected for example rand-m9-mstd0.5-inc1")
            values[match[1]] = float(match[2])
        if first != "rand" or values.pop("inc", 0) != 1:
            raise ConfigError(f"augment={text!r}; expected rand-...-inc1, for example rand-m9-mstd0.5-inc1")
        return cls(
            values.get("m", MAX_MAGNITUDE),
            values.get("mstd", 0.0),
            layers=int(values.get("n", 2)),
            prob=values.get("p", 0.5),
            interpolations=interpolations,
            fill=fill,
        )

    def __call__(self, image: Image.Image, rng: Random) -> Image.Image:
        """An RGB image, changed by some operations or none."""
        for name, magnitude, sign, interpolation in self.draw(rng):
            image = apply_operation(image, name, magnitude, sign=sign, interpolation=interpolation, fill=self.fill)
        return image

    def draw(self, rng: Random) -> list[tuple[str, float, int, Resampling]]:
        """The operations for the next image, with their magnitude, sign and interpolation."""
        drawn = []
        for _ in range(self.layers):
            if rng.random() < self.prob:
                magnitude = min(max(rng.gauss(self.magnitude, self.noise), 0.0), MAX_MAGNITUDE)
                name, sign = rng.choice(OPERATIONS), rng.choice((1, -1))
                drawn.append((name, magnitude, sign, rng.choice(self.interpolations)))
        return drawn

    def __repr__(self) -> str:
        return f"rand-m{self.magnitude:g}-mstd{self.noise:g}-n{self.layers}-p{self.prob:g}-inc1"


def apply_operation(
    image: Image.Image,
    name: str,
    magnitude: float,
    *,
    sign: int = 1,
    interpolation: Resampling = Resampling.BICUBIC,
    fill: Fill = (124, 116, 104),
) -> Image.Image:
    """One of `OPERATIONS` on an RGB image, which is not changed, but perhaps returned.

    The magnitude goes from 0 to 10; AutoContrast, Equalize and Invert have none. The sign, 1 or -1, is the direction of
    a geometric operation, more or less of an enhancement. `fill` is the RGB of pixels from outside the image.

    Raises: ConfigError: no such operation.
    """
    if name in _AFFINE:
        matrix = _AFFINE[name](image, sign * magnitude)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, interpolation, fillcolor=fill)
    if name == "Rotate":
        return image.rotate(sign * magnitude / MAX_MAGNITUDE * 30, interpolation, fillcolor=fill)
    if name in ENHANCE:
        return ENHANCE[name](image, 1 + sign * (magnitude / MAX_MAGNITUDE * 0.9))
    if name in _LEVELS:
        return _LEVELS[name](image, magnitude / MAX_MAGNITUDE)
    raise ConfigError(f"RandAugment has no operation {name!r}; it has {', '.join(OPERATIONS)}")


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    bits = 4 - int(strength * 4)
    # Pillow 13 refuses to keep 0 bits; earlier releases gave black, as torchvision's kernel does
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _solarize_add(image: Image.Image, strength: float) -> Image.Image:
    add = int(strength * 110)
    return image.point([min(255, level + add) if level < 128 else level for level in range(256)] * 3)


# Coefficients take an output pixel to the input pixel it shows, so shearing is about the top left corner
_AFFINE: dict[str, Geometry] = {
    "ShearX": lambda _, m: (1, m / MAX_MAGNITUDE * 0.3, 0, 0, 1, 0),
    "ShearY": lambda _, m: (1, 0, 0, m / MAX_MAGNITUDE * 0.3, 1, 0),
    "TranslateX": lambda image, m: (1, 0, m / MAX_MAGNITUDE * 0.45 * image.width, 0, 1, 0),
    "TranslateY": lambda image, m: (1, 0, 0, 0, 1, m / MAX_MAGNITUDE * 0.45 * image.height),
}
ENHANCE: dict[str, Operation] = {
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}
"""Operations with a factor: 1 changes nothing, 0 takes the property away."""
_LEVELS: dict[str, Operation] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": _posterize,
    "Solarize": lambda image, strength: ImageOps.solarize(image, 256 - min(256, int(strength * 256))),
    "SolarizeAdd": _solarize_add,
}
OPERATIONS = tuple(sorted([*_AFFINE, "Rotate", *ENHANCE, *_LEVELS]))
"""The 15 operations, each drawn with the same probability."""
