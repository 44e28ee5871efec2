"""The evaluation transform of a checkpoint: from an image to the model's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from ..checkpoint import Preprocessing, load_manifest
from ..errors import ConfigError, ImageError
from ..models.layers import ImageClassifier
from ..registry import own_model
from .decoding import (
    MAX_IMAGE_PIXELS,
    ImageSource,
    Reduced,
    decode_reduced,
    explained,
    load_image,
    load_planes,
    name_of,
)

MAX_RESIZED_PIXELS = MAX_IMAGE_PIXELS // 4
"""Images that would have more pixels once their shorter side is resized, as a strip of 60000x1 would, are refused."""
_REDUCED_SIDES = 2
"""A reduced JPEG keeps so many times the side to resize to; below that, predictions change."""
_IN_TORCH = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
_MOST_IN_TORCH = 1 << 24
"""Pixels of an image that torch resizes; it copies them more than once."""


class EvalTransform:
    """The evaluation transform of a checkpoint: resize, centre crop, scale to 0..1, normalise.

    Resizing is Pillow's, antialiased: the published accuracies were measured so.
    """

    def __init__(self, preprocessing: Preprocessing, *, normalise: bool = True, fast_pixels: bool = False) -> None:
        """Take a checkpoint's preprocessing.

        Args:
            preprocessing: sizes, interpolation, mean and standard deviation.
            normalise: if off, the output is the cropped uint8 pixels.
            fast_pixels: nearly the same pixels in less time: JPEG files far larger than the input are decoded at a
                fraction of their size, the others resized by torch instead of Pillow.

        """
        self.preprocessing = preprocessing
        self.normalise = normalise
        self.fast_pixels = fast_pixels
        self._interpolation = InterpolationMode(preprocessing.interpolation)

    def __call__(self, image: ImageSource) -> Tensor:
        """One image, in any accepted form, to (C, H, W) float32, or uint8. Raises: ImageError: see `load_image`."""
        return self.to_input(self.levels(image))

    def levels(self, image: ImageSource) -> Tensor:
        """The pixels before they are scaled and normalised, (C, H, W) uint8.

        C is the length of the preprocessing's mean. Files and PIL images are read for 3 channels and, as greys, for 1;
        arrays and tensors for any number.

        Raises: ImageError: see `load_image`, and an aspect so extreme that the resized image would be too large.
            ConfigError: a file or PIL image for another number of channels.
        """
        spec, name = self.preprocessing, name_of(image)
        with explained(name):
            if self.fast_pixels and spec.resize is not None and len(spec.mean) == 3:
                return _cropped(self._resized_fast(image, spec.resize), spec)
            planes = load_planes(image, len(spec.mean))
            return torch.cat([TF.pil_to_tensor(resize_and_crop(plane, spec, name)) for plane in planes])

    def to_input(self, levels: Tensor) -> Tensor:
        """Levels of one image or of a whole batch to the model's input, with the same bits."""
        return EvalInput(self.preprocessing, levels.device, normalise=self.normalise)(levels)

    def _resized_fast(self, image: ImageSource, resize: int | tuple[int, int]) -> Tensor:
        if isinstance(image, (str, PathLike, bytes)):
            side = resize if isinstance(resize, int) else max(resize)
            found = decode_reduced(image, side=_REDUCED_SIDES * side)
        else:
            found = load_image(image)
        if isinstance(found, Reduced):
            # Pillow's resize takes a box between pixels. Without it the picture lies up to a pixel aside, which changes
            # predictions more than the reduction does
            left, top, right, bottom = found.box
            width, height = right - left, bottom - top
            size = _resized_to(self.preprocessing, resize, height, width)
            check_resized(name_of(image), height, width, size)
            if len(size) == 1:
                size = [int(size[0] * side / min(width, height)) for side in (height, width)]
            resample = PIL.Image.Resampling[self._interpolation.name.partition("_")[0]]
            return TF.pil_to_tensor(found.image.resize((size[1], size[0]), resample, found.box))
        size = _resized_to(self.preprocessing, resize, found.height, found.width)
        check_resized(name_of(image), found.height, found.width, size)
        if self._interpolation in _IN_TORCH and found.width * found.height <= _MOST_IN_TORCH:
            # as a batch of one with its channels last, in which the resize is vectorised
            return TF.resize(TF.pil_to_tensor(found)[None], size, interpolation=self._interpolation)[0]
        return TF.pil_to_tensor(TF.resize(found, size, interpolation=self._interpolation))

    def __repr__(self) -> str:
        spec = self.preprocessing
        return f"EvalTransform({spec}, mean {spec.mean}, std {spec.std})"


class EvalInput:
    """Turns pixels into the model's input on a device: one image or a batch, (..., C, H, W) uint8 to float32."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device, *, normalise: bool = True) -> None:
        self.device, self.normalise = device, normalise
        spec = preprocessing
        values = torch.tensor([[255.0] * len(spec.mean), spec.mean, spec.std], dtype=torch.float32)
        # Tensors on the device: torch turns division by a number into multiplication there, and uploads lists anew.
        # Divided as ToTensor does; to_dtype(scale=True) multiplies by 1/255, which differs in the last bit
        self._full, self._mean, self._std = to_device(values.view(3, -1, 1, 1), device)

    def __call__(self, values: Tensor) -> Tensor:
        """The input, on the device; the same pixels there if nothing is to be normalised."""
        values = to_device(values, self.device)
        if not self.normalise:
            return values
        return values.to(torch.float32).div_(self._full).sub_(self._mean).div_(self._std)


def check_resized(name: str, height: float, width: float, size: Sequence[int]) -> None:
    """Raise ImageError if an image has too many pixels once it is resized to `size`: shorter side, or height, width.

    Once its columns alone are resized, too, which comes first.
    """
    rows, columns = size if len(size) == 2 else (int(size[0] * side / min(height, width)) for side in (height, width))
    rows = max(rows, round(height))
    if rows * columns > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{name}: {width:.0f}x{height:.0f} pixels, which become {columns}x{rows} when resized, more than "
            f"{MAX_RESIZED_PIXELS}; cut it to a less extreme aspect first"
        )


def resize_and_crop(image: PIL.Image.Image, spec: Preprocessing, name: str = "image") -> PIL.Image.Image:
    """The pixels of an image that a model gets. Raises: ImageError: it would become too large."""
    if spec.resize is not None:
        size = _resized_to(spec, spec.resize, image.height, image.width)
        check_resized(name, image.height, image.width, size)
        image = TF.resize(image, size, interpolation=InterpolationMode(spec.interpolation))
    cropped: PIL.Image.Image = _cropped(image, spec)
    return cropped


def _resized_to(spec: Preprocessing, resize: int | tuple[int, int], height: float, width: float) -> list[int]:
    """The shorter side, or the height and width, that an image is resized to."""
    if isinstance(resize, int):
        return [resize]
    if spec.fit == "squash":
        return list(resize)
    ratio = min(height / resize[0], width / resize[1])
    return [round(height / ratio), round(width / ratio)]


def seen_box(spec: Preprocessing, height: int, width: int) -> tuple[float, float, float, float]:
    """The part of an image that a model gets, as (left, top, right, bottom) in the image's own pixels.

    It may lie between pixels; a border that is added to a small image lies outside of the image.
    """
    size = [height, width] if spec.resize is None else _resized_to(spec, spec.resize, height, width)
    if len(size) == 1:
        size = [int(size[0] * side / min(height, width)) for side in (height, width)]
    starts = []
    for side, crop in zip(size, spec.crop, strict=True):
        beside = (side - crop) / 2
        starts.append(round(beside) if spec.rounding == "even" and beside > 0 else int(beside))
    rows, columns = height / size[0], width / size[1]
    (top, left), (crop_height, crop_width) = starts, spec.crop
    return left * columns, top * rows, (left + crop_width) * columns, (top + crop_height) * rows


def _cropped(image: Any, spec: Preprocessing) -> Any:
    if spec.rounding == "even":
        return TF.center_crop(image, list(spec.crop))
    top, left = (int((side - crop) / 2) for side, crop in zip(TF.get_size(image), spec.crop, strict=True))
    return TF.crop(image, top, left, *spec.crop)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a GPU copies from pinned memory while the program goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def transform_for(
    model: ImageClassifier, *, style: Literal["checkpoint", "timm", "transformers"] = "checkpoint"
) -> EvalTransform:
    """The evaluation transform that belongs to a model's weights.

    Args:
        model: from `create_model` or `from_pretrained`.
        style: "checkpoint" is that of the weights' publisher: the authors' transform for the checkpoints of the
            manifest, the repository's or folder's own otherwise. "timm" crops as timm evaluates the same weights
            (0.9 of the resized side at 224, all of it at 384). "transformers" resizes to exactly 256x256 at 224, giving
            up the aspect, as its image processor does by default; the mean and standard deviation stay the weights'.

    Raises: ConfigError: a model built by hand, whose weights are unknown; an unknown style.
    """
    model = model if hasattr(model, "origin") else own_model(model)
    if model.origin is None:
        raise ConfigError("this model was not made by create_model or from_pretrained; build an EvalTransform by hand")
    spec = model.origin.preprocessing
    if style == "timm":
        known = load_manifest().get(model.origin.name)
        crop_pct = known.timm_crop_pct if known is not None and known.timm_crop_pct is not None else 0.875
        height, width = (int(side / crop_pct) for side in spec.crop)
        square = replace(spec, resize=height, fit="squash")
        spec = square if height == width else replace(spec, resize=(height, width), fit="cover")
    elif style == "transformers":
        height, width = spec.crop
        spec = replace(spec, resize=(int(height / 0.875), int(width / 0.875)), fit="squash")
    elif style != "checkpoint":
        raise ConfigError(f"style={style!r}; expected 'checkpoint', 'timm' or 'transformers'")
    return EvalTransform(spec)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The input of a model. Raises: ConfigError: a network of another library, or one whose weights are unknown."""
    inner = own_model(model, others=True)
    if isinstance(inner, ImageClassifier) and inner.origin is not None:
        return inner.origin.preprocessing
    raise ConfigError("this model does not say how its input is normalised; pass it along, as a Preprocessing")
