"""From an image file to the tensor a checkpoint expects: safe decoding, and the evaluation transform."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from .errors import ConfigError, ImageError
from .hub.manifest import Preprocessing, load_manifest

if TYPE_CHECKING:
    from .models.layers import ImageClassifier

ImageSource = str | PathLike[str] | bytes | PIL.Image.Image | Tensor | Any
"""A path, encoded bytes, a PIL image, an (H, W[, C]) array, or a (C, H, W) tensor; arrays of uint8 or floats 0..1."""

MAX_IMAGE_PIXELS = 178_956_970
"""Images with more pixels are refused before they are decoded: 512 MiB as RGB, Pillow's own limit for an error."""


def decode_image(source: str | PathLike[str] | bytes) -> PIL.Image.Image:
    """Decode an image as a photo viewer would show it, as an RGB PIL image.

    The EXIF orientation is applied, transparency is laid over white, the first frame of an animation is taken,
    palettes, CMYK and 16-bit greys are converted. An ordinary RGB file gives exactly Pillow's pixels.

    Args:
        source: a path, or the encoded bytes.

    Raises: ImageError: not a readable image, damaged, or more than MAX_IMAGE_PIXELS; the message names the file.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else fspath(source)
    if not isinstance(source, bytes):
        _check_file(Path(source), name)
    with _explained(name):
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _show(image, name)


def _check_file(path: Path, name: str) -> None:
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ImageError(f"{name}: {reason}; expected an image file") from error
    if not stat.S_ISREG(mode):
        kind = "is a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ImageError(f"{name}: {kind}; expected an image file")
    if size == 0:
        raise ImageError(f"{name}: the file is empty")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError that names the image, and keep its warnings quiet."""
    try:
        with warnings.catch_warnings():
            # A photo with odd metadata, or above half the pixel limit, gets a warning each: noise in a folder run.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            yield
    except ImageError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a format Pillow knows") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    except PermissionError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        # Pillow's decoders raise all of these for damaged data, the AVIF one RuntimeError
        raise ImageError(f"{name}: damaged image ({error})") from error


def _show(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Decode, turn upright, convert to RGB; refuses what is too large, or is a program rather than a picture."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ImageError(f"{name}: {image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}")
    if image.format == "EPS":
        # Pillow would run Ghostscript on it, whatever the file's suffix says
        raise ImageError(f"{name}: a PostScript program, not an image; convert it to PNG first")
    image.load()
    return to_rgb(PIL.ImageOps.exif_transpose(image))


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any Pillow mode to RGB: alpha over white, 16-bit greys scaled to 8 bits rather than clipped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255, which turns a 16-bit photograph white
        return image.convert("I").point(lambda level: level * (1 / 257)).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = PIL.Image.new("RGBA", rgba.size, "white")
        return PIL.Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def load_image(source: ImageSource) -> PIL.Image.Image:
    """Any of the accepted image forms as an RGB PIL image; see `ImageSource`.

    Raises: ImageError: cannot be decoded, or an array whose shape, type or range is not an image's.
    """
    if isinstance(source, (str, PathLike, bytes)):
        return decode_image(source)
    if isinstance(source, PIL.Image.Image):
        name = getattr(source, "filename", "") or "PIL image"
        with _explained(name):
            return _show(source, name)
    if isinstance(source, Tensor):
        tensor = source.detach()
    elif hasattr(source, "__array_interface__"):
        tensor = _array_to_tensor(source)
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor[None]
    else:
        raise ImageError(
            f"{type(source).__name__} is not an image; pass a path, bytes, a PIL image, an array or a tensor"
        )
    return _tensor_to_rgb(tensor, shape=tuple(source.shape))


def _array_to_tensor(source: Any) -> Tensor:
    import numpy as np  # not a dependency: whoever has an array has numpy

    try:
        # A copy in C order: torch takes neither read-only arrays nor negative strides (`bgr[..., ::-1]`).
        return torch.from_numpy(np.array(source, order="C"))
    except TypeError as error:
        raise ImageError(
            f"array of type {source.dtype} is not an image; expected uint8 or floats from 0 to 1"
        ) from error


def _tensor_to_rgb(tensor: Tensor, shape: tuple[int, ...]) -> PIL.Image.Image:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4) or 0 in tensor.shape:
        raise ImageError(
            f"shape {shape} is not an image; expected an (H, W, C) array or a (C, H, W) tensor, C = 1, 3 or 4"
        )
    if tensor.is_floating_point():
        low, high = (float(bound) for bound in tensor.aminmax())
        if not (low >= 0 and high <= 1):
            raise ImageError(f"float image with values from {low:g} to {high:g}; expected 0 to 1, not yet normalised")
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    elif tensor.dtype != torch.uint8:
        raise ImageError(f"image of type {tensor.dtype}; expected uint8 or floats from 0 to 1")
    return to_rgb(TF.to_pil_image(tensor.cpu()))


class EvalTransform:
    """The evaluation transform of a checkpoint: resize, centre crop, scale to 0..1, normalise.

    Resizing is Pillow's, antialiased, since that is what the published accuracies were measured with.
    """

    def __init__(self, preprocessing: Preprocessing, *, normalise: bool = True) -> None:
        """Take a checkpoint's preprocessing; without `normalise` what comes out is the uint8 pixels, cropped."""
        self.preprocessing = preprocessing
        self.normalise = normalise
        try:
            self._interpolation = InterpolationMode(preprocessing.interpolation)
        except ValueError:
            modes = ", ".join(mode.value for mode in InterpolationMode)
            raise ConfigError(f"interpolation={preprocessing.interpolation!r}; expected one of {modes}") from None

    def __call__(self, image: ImageSource) -> Tensor:
        """One image, in any accepted form, to (3, H, W) float32, or uint8. Raises: ImageError: see `load_image`."""
        spec, levels = self.preprocessing, self.levels(image)
        if not self.normalise:
            return levels
        # Divided as ToTensor does; to_dtype(scale=True) multiplies by 1/255, which differs in the last bit
        return TF.normalize(levels.to(torch.float32).div(255), list(spec.mean), list(spec.std))

    def levels(self, image: ImageSource) -> Tensor:
        """The same before it is scaled and normalised, (3, H, W) uint8. Raises: ImageError: see `load_image`."""
        spec = self.preprocessing
        rgb = load_image(image)
        size = [spec.resize] if isinstance(spec.resize, int) else list(spec.resize)
        resized = TF.resize(rgb, size, interpolation=self._interpolation)
        return TF.pil_to_tensor(TF.center_crop(resized, list(spec.crop)))

    def __repr__(self) -> str:
        spec = self.preprocessing
        return f"EvalTransform({spec}, mean {spec.mean}, std {spec.std})"


def transform_for(
    model: ImageClassifier, *, style: Literal["checkpoint", "timm", "transformers"] = "checkpoint"
) -> EvalTransform:
    """The evaluation transform that belongs to a model's weights.

    Args:
        model: from `create_model` or `from_pretrained`.
        style: "checkpoint" is what the weights' publisher evaluated with: the authors' transform for the checkpoints of
            the manifest, the repository's or folder's own otherwise. "timm" crops as timm evaluates the same weights
            (0.9 of the resized side at 224, all of it at 384). "transformers" resizes to exactly 256x256 at 224, giving
            up the aspect, as its image processor does by default; the mean and standard deviation stay the weights'.

    Raises: ConfigError: a model built by hand, whose weights are unknown; an unknown style.
    """
    if model.origin is None:
        raise ConfigError("this model was not made by create_model or from_pretrained; build an EvalTransform by hand")
    spec = model.origin.preprocessing
    if style == "timm":
        known = load_manifest().get(model.origin.name)
        crop_pct = known.timm_crop_pct if known is not None and known.timm_crop_pct is not None else 0.875
        spec = replace(spec, resize=int(max(spec.crop) / crop_pct))
    elif style == "transformers":
        height, width = spec.crop
        spec = replace(spec, resize=(int(height / 0.875), int(width / 0.875)))
    elif style != "checkpoint":
        raise ConfigError(f"style={style!r}; expected 'checkpoint', 'timm' or 'transformers'")
    return EvalTransform(spec)
