"""Decoding: from an image file to upright RGB pixels, as a photo viewer shows it; other files are refused by name."""

from __future__ import annotations

import io
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..errors import ImageError

ImageSource = str | PathLike[str] | bytes | PIL.Image.Image | Tensor | Any
"""A path, encoded bytes, a PIL image, an (H, W[, C]) array, or a (C, H, W) tensor; arrays of uint8 or floats 0..1."""

MAX_IMAGE_PIXELS = 178_956_970
"""Images with more pixels are refused before they are decoded: 512 MiB as RGB, Pillow's own limit for an error."""

_ORIENTATION = 0x0112
# Values of the EXIF orientation by their effect: axes swapped, right edge shown left, bottom edge shown at the top
_ON_ITS_SIDE, _RIGHT_TO_LEFT, _BOTTOM_TO_TOP = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


def decode_image(source: str | PathLike[str] | bytes) -> PIL.Image.Image:
    """Decode an image as a photo viewer would show it, as an RGB PIL image.

    The EXIF orientation is applied, transparency is laid over white, the first frame of an animation is taken,
    palettes, CMYK and 16-bit greys are converted. An ordinary RGB file gives exactly Pillow's pixels.

    Args:
        source: a path, or the encoded bytes.

    Raises: ImageError: not a readable image, damaged, or more than MAX_IMAGE_PIXELS; the message names the file.
    """
    with _opened(source) as (image, name):
        return _show(image, name)


class Reduced(NamedTuple):
    """An image that was decoded smaller, and the box (left, top, right, bottom) of it that the photograph fills.

    Where a side is no multiple of the reduction, the last row or column of pixels lies in part outside the photograph.
    """

    image: PIL.Image.Image
    box: tuple[float, float, float, float]


def decode_reduced(source: str | PathLike[str] | bytes, *, side: int) -> Reduced | PIL.Image.Image:
    """Decode a JPEG to 1/2, 1/4 or 1/8 of its size if no side falls below `side` pixels; an image as it is otherwise.

    JPEG decoders work pixel by pixel, so a photograph far larger than a model's input is decoded in a fraction of the
    time. The same files are refused as by `decode_image`.

    Raises: ImageError: see `decode_image`.
    """
    with _opened(source) as (image, name):
        _check_picture(image, name)
        width, height = image.size
        image.draft(None, (side, side))  # does nothing to other formats
        scale = round(max(width / image.width, height / image.height))
        orientation = image.getexif().get(_ORIENTATION, 1)
        shown = _show(image, name)
    if scale == 1:
        return shown
    right, bottom = (height / scale, width / scale) if orientation in _ON_ITS_SIDE else (width / scale, height / scale)
    left = shown.width - right if orientation in _RIGHT_TO_LEFT else 0.0
    top = shown.height - bottom if orientation in _BOTTOM_TO_TOP else 0.0
    return Reduced(shown, (left, top, left + right, top + bottom))


@contextmanager
def _opened(source: str | PathLike[str] | bytes) -> Iterator[tuple[PIL.Image.Image, str]]:
    """The image, not decoded yet, and its name in errors."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else fspath(source)
    if not isinstance(source, bytes):
        _check_file(Path(source), name)
    with _explained(name), PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        yield image, name


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


class _Quiet:
    """No warnings from Pillow as long as any thread decodes.

    Differs from `warnings.catch_warnings`: threads that enter and leave in turns do not restore one another's filters.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                # A photo with odd metadata, or above half the pixel limit, gets a warning each: noise in a folder run.
                warnings.simplefilter("ignore", UserWarning)
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_QUIET = _Quiet()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn Pillow's errors into an ImageError that names the image, and keep its warnings quiet."""
    try:
        with _QUIET:
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


def _check_picture(image: PIL.Image.Image, name: str) -> None:
    """Raise ImageError, before decoding, for images that are too large and for PostScript programs."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ImageError(f"{name}: {image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}")
    if image.format == "EPS":
        # Pillow would run Ghostscript on it, also if the file's suffix is another format's
        raise ImageError(f"{name}: a PostScript program, not an image; convert it to PNG first")


def _show(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Decode, turn upright in place, which copies nothing of a photograph that is upright already, convert to RGB."""
    _check_picture(image, name)
    image.load()
    PIL.ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


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
            _check_picture(source, name)
            return to_rgb(PIL.ImageOps.exif_transpose(source))  # a copy: the caller's image stays as it is
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
    import numpy as np  # not a dependency; it is installed where arrays are

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
