"""Decoding: from an image file to upright RGB pixels, as a photo viewer shows it; other files are refused by name."""

from __future__ import annotations

import io
import logging
import math
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from traceback import clear_frames
from typing import IO, Any, NamedTuple

import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..errors import ConfigError, DeitModelsError, ImageError, first_line

logger = logging.getLogger(__name__)

ImageSource = str | PathLike[str] | bytes | PIL.Image.Image | Tensor | Any
"""A path, encoded bytes, a PIL image, an (H, W[, C]) array, or a (C, H, W) tensor; arrays of uint8 or floats 0..1."""

MAX_IMAGE_PIXELS = 178_956_970
"""Images with more pixels are refused before they are decoded: 683 MiB as RGB, Pillow's own limit for an error."""

MAX_DECODING_BYTES = 900 << 20
"""Images that need more memory at a time, in decoding or in conversion to upright RGB, are refused before that."""

HEIF_SUFFIXES = (".heic", ".heif", ".hif")
"""Photographs of phones, which Pillow reads with pillow-heif alone."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")

_ORIENTATION = 0x0112
_Turn = PIL.Image.Transpose
_TURNS = {
    **{2: _Turn.FLIP_LEFT_RIGHT, 3: _Turn.ROTATE_180, 4: _Turn.FLIP_TOP_BOTTOM, 5: _Turn.TRANSPOSE},
    **{6: _Turn.ROTATE_270, 7: _Turn.TRANSVERSE, 8: _Turn.ROTATE_90},
}
# Values of the EXIF orientation by their effect: axes swapped, right edge shown left, bottom edge shown at the top
_ON_ITS_SIDE, _RIGHT_TO_LEFT, _BOTTOM_TO_TOP = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
_LAST_ROW_FIRST = (3, 4, 6, 7)  # or shown as the first column
_STRIP_PIXELS, _DARK = 1 << 18, 16


def decode_image(source: str | PathLike[str] | bytes) -> PIL.Image.Image:
    """Decode an image, a path or encoded bytes, as a photo viewer would show it, as an RGB PIL image.

    The EXIF orientation is applied, transparency is laid over white, the first frame of an animation is taken,
    palettes, CMYK and deep greys are converted, see `to_rgb`. An ordinary RGB file gives exactly Pillow's pixels.

    Raises: ImageError: not a readable image, damaged, or too large for MAX_IMAGE_PIXELS or MAX_DECODING_BYTES; the
        message names the file.
    """
    return _decoded(source, _show)


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
    return _decoded(source, partial(_reduced, side=side))


def _reduced(image: PIL.Image.Image, name: str, *, side: int) -> Reduced | PIL.Image.Image:
    if image.format not in ("JPEG", "MPO"):
        return _show(image, name)
    _check_picture(image, name)
    width, height = image.size
    image.draft(None, (side, side))
    scale = round(max(width / image.width, height / image.height))
    orientation = image.getexif().get(_ORIENTATION, 1)
    shown = _show(image, name)
    if scale == 1:
        return shown
    right, bottom = (height / scale, width / scale) if orientation in _ON_ITS_SIDE else (width / scale, height / scale)
    left = shown.width - right if orientation in _RIGHT_TO_LEFT else 0.0
    top = shown.height - bottom if orientation in _BOTTOM_TO_TOP else 0.0
    return Reduced(shown, (left, top, left + right, top + bottom))


def _decoded(source: str | PathLike[str] | bytes, read: Callable[[PIL.Image.Image, str], Any]) -> Any:
    """The result of `read`, which gets an image that is open and not decoded yet, and its name in errors."""
    name = name_of(source)
    if not isinstance(source, bytes):
        _check_file(Path(source), name)

    def opened() -> Any:
        # Not by its path: Pillow would map greys of a TIFF into memory before they are turned, with the sides of after
        with (
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
            _open(file, name) as image,
        ):
            return read(image, name)

    with explained(name):
        return opened()


def _open(file: IO[bytes], name: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(file)
    except PIL.UnidentifiedImageError:
        file.seek(0)
        head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:] not in _HEIF_BRANDS:
            raise
    if not reads_heif():
        raise ImageError(f"{name}: Pillow reads HEIC with pillow-heif alone; pip install pillow-heif, or convert it")
    return PIL.Image.open(file)


@cache
def reads_heif() -> bool:
    """Whether HEIC photographs can be read; pillow-heif is registered with Pillow where it is installed."""
    try:
        import_module("pillow_heif").register_heif_opener()
    except (ImportError, AttributeError):
        return ".heic" in PIL.Image.registered_extensions()
    return True


def _check_file(path: Path, name: str) -> None:
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        # not the error itself, which has the path in it once more
        why = getattr(error, "strerror", None) or first_line(error)
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({why})"
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
def explained(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError that names the image, and keep its warnings quiet."""
    try:
        with _QUIET:
            yield
    except DeitModelsError as error:
        _let_go(error)
        raise
    except Exception as error:
        _let_go(error)
        # Decoders fail on damaged data in any way they like, so there is no list of types here
        raise ImageError(f"{name}: {_reason(error)}") from error


def _let_go(error: BaseException | None) -> None:
    """No error that is kept, as by a run that counts its failures, keeps half a decoded image with it."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image in a format Pillow knows"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, PermissionError):
        return f"cannot be read ({error.strerror})"
    text = first_line(error)[:200]
    return text if isinstance(error, PIL.Image.DecompressionBombError) else f"damaged image ({text})"


def _check_picture(image: PIL.Image.Image, name: str) -> None:
    """Raise ImageError, before decoding, for what is too large, a program, or misread by Pillow."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ImageError(f"{name}: {image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}")
    if image.format == "EPS":
        # Pillow would run Ghostscript on it, also if the file's suffix is another format's
        raise ImageError(f"{name}: a PostScript program, not an image; convert it to PNG first")
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(_BITS, (1,)))
    signed, planes = 2 in tags.get(_SIGNED, ()), tags.get(_PLANES) == 2 and tags.get(_COMPRESSION, 1) == 1
    if (signed and bits <= 8) or (planes and bits > 8):
        # Pillow would read values below 0 as the brightest, and of each plane the first half
        raise ImageError(f"{name}: {bits} bits, signed or by planes, which Pillow misreads; convert it to PNG first")
    needed = image.width * image.height * _bytes_a_pixel(image)
    if needed > MAX_DECODING_BYTES:
        raise ImageError(
            f"{name}: {image.width}x{image.height} pixels, which take {needed / 2**20:.0f} MiB to decode from "
            f"{image.format}, more than {MAX_DECODING_BYTES >> 20}; make it smaller, or convert it to JPEG or PNG"
        )


_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_DECODERS = {"WEBP": 12, "AVIF": 14, "HEIF": 14, "JPEG2000": 17, "JPEG": 0, "MPO": 0, "PNG": 0, "GIF": 0, "BMP": 0}
"""Bytes a pixel, as measured: of Pillow's modes, where not 4; of decoders beside the image, where not those of TIFF."""


def _bytes_a_pixel(image: PIL.Image.Image) -> float:
    """Peak of memory until the image is shown."""
    stored, form, tags = _STORED.get(image.mode, 4), image.format or "PNG", getattr(image, "tag_v2", {})
    beside = _DECODERS.get(form, 4)
    if not getattr(image, "tile", ()) and form != "WEBP":  # decoded already
        beside = 0
    elif form == "TIFF":  # a strip or row of tiles at a time
        rows = tags.get(_STRIP_ROWS, tags.get(_TILE_ROWS, image.height))
        packed = tags.get(_COMPRESSION, 1) != 1
        beside = sum(tags.get(_BITS, (8,))) / 8 * min(rows / image.height, 1) if packed else 0
    elif hasattr(image, "layer") and not _in_one_scan(image):  # coefficients of the whole JPEG
        most = max(wide * high for _, wide, high, _ in image.layer)
        beside = 2 * sum(wide * high for _, wide, high, _ in image.layer) / most
    kept = beside if form in ("WEBP", "AVIF", "HEIF") else 0
    as_it_is = image.mode == "RGB" and "transparency" not in image.info
    turned = image.getexif().get(_ORIENTATION, 1) in _TURNS
    return max(stored + beside, stored + kept + (4 if turned or not as_it_is else 0))


def _in_one_scan(image: Any) -> bool:
    """Whether the first scan of an opened JPEG, whose header was read last, has all colours at all precision."""
    if "progressive" in image.info:
        return False
    at, colours = image.fp.tell(), len(image.layer)
    header = b"\xff\xda" + (6 + 2 * colours).to_bytes(2, "big") + bytes([colours])
    image.fp.seek(max(at - 8 - 2 * colours, 0))
    found = image.fp.read(len(header)) == header
    image.fp.seek(at)
    return found


def _show(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Decode, turn upright, which copies nothing of a photograph that is upright already, convert to RGB."""
    deep = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(getattr(image, "tile", ""))
    _check_picture(image, name)
    image.load()
    _check_picture(image, name)  # an icon may be larger than it says
    colours = getattr(image, "tag_v2", {}).get(_PALETTE, ())
    if image.mode == "P" and 0 < max(colours, default=0) < 256:  # written with 8 bits in the place of 16
        image = image.copy()
        image.putpalette([level for at in range(len(colours) // 3) for level in colours[at :: len(colours) // 3]])
    if deep and 0 < max(high for _, high in _extrema(image)[: 1 if image.mode == "LA" else 3]) < _DARK:
        raise ImageError(f"{name}: colours of 16 bits of which no more than 12 are used; convert it to 8 bits first")
    try:
        # Not Pillow's `exif_transpose`, which writes the other tags anew, damaged ones too
        return to_rgb(image, image.getexif().get(_ORIENTATION, 1))
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def _extrema(image: PIL.Image.Image) -> Any:
    return image.getextrema()


def to_rgb(image: PIL.Image.Image, orientation: int = 1) -> PIL.Image.Image:
    """Any Pillow mode to RGB, with alpha over white, turned upright from an EXIF orientation.

    Greys of more than 8 bits are scaled, never clipped: from the bits that the format declares (12-bit TIFF, PGM,
    JPEG 2000, PNG with more than 12 bits in use); else from the fewest of 1, 8, 10, 12, 14 and 16 bits, 15 for signed
    numbers, that hold the largest value. Floats up to 1 are scaled from 1. A depth that was guessed is logged once.

    Raises: ImageError: greys that could mean anything: values below 0, above 65535 or not finite, and images with
        nothing above 15 that are not of zeros and ones.
    """
    alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
    hides_all = alpha and image.format == "TGA" and not _extrema(image)[-1][1]
    if hides_all or _EXTRA not in getattr(image, "tag_v2", (_EXTRA,)):
        alpha = False  # a fourth sample, as of satellites, that nothing calls alpha
    transparent = alpha or "transparency" in image.info
    if image.mode == "RGB" and not transparent and orientation not in _TURNS:
        return image
    # Pillow's own conversion clips at 255, which turns a 16-bit photograph white
    deep = _shallow(image) if image.mode.startswith(("I", "F")) else None
    # In strips, so that there are never more than two copies of a large image
    shown = PIL.Image.new("RGB", image.size[::-1] if orientation in _ON_ITS_SIDE else image.size)
    for top, strip in _strips(image):
        piece = (deep(strip) if deep else _over_white(strip) if transparent else strip).convert("RGB")
        if orientation in _TURNS:
            piece = piece.transpose(_TURNS[orientation])
        at = image.height - top - strip.height if orientation in _LAST_ROW_FIRST else top
        shown.paste(piece, (at, 0) if orientation in _ON_ITS_SIDE else (0, at))
    return shown


def _strips(image: PIL.Image.Image) -> Iterator[tuple[int, PIL.Image.Image]]:
    """The rows of an image, some at a time, each with the number of its first row."""
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _over_white(strip: PIL.Image.Image) -> PIL.Image.Image:
    rgba = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba)


_BITS, _COMPRESSION, _PHOTOMETRIC, _STRIP_ROWS = 258, 259, 262, 278
_LARGEST, _PLANES, _PALETTE, _TILE_ROWS, _EXTRA, _SIGNED = 281, 284, 320, 323, 338, 339
"""TIFF tags: bits; 1: none; 0: the largest value is black; rows stored together; largest value; 2: by planes; ..."""


def _shallow(image: PIL.Image.Image) -> Callable[[PIL.Image.Image], PIL.Image.Image]:
    """The conversion of a grey image of more than 8 bits, or of floats, to 8 bits; see `to_rgb`."""
    kind = "F" if image.mode == "F" else "I"
    low, high, mean = _range(image, kind)
    if not math.isfinite(mean):
        raise ImageError("grey values that are no numbers, or not finite; convert it to 8 or 16 bits first")
    declared = _declared_bits(image, high)
    if low < 0 or round(high) > 65535 or (declared is None and 1 < high < _DARK):
        why = "which could mean anything; convert it to 8 or 16 bits first"
        raise ImageError(f"grey values from {low:g} to {high:g}, {why}")
    depths = (1, 8, 10, 12, 14, *([15] if image.mode == "I" else []), 16)
    bits = declared or next(depth for depth in depths if round(high) < 1 << depth)
    if declared is None and bits < 16 and high > 1:
        _log_guess(image.mode, bits)
    # floats are rounded, whole numbers rounded down
    scale, more = 255 / ((1 << bits) - 1), 0.5 if image.mode == "F" else 1e-6
    zero_is_white = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0

    def convert(strip: PIL.Image.Image) -> PIL.Image.Image:
        shallow = strip.convert(kind).point(lambda level: level * scale + more).convert("L")
        return PIL.ImageOps.invert(shallow) if zero_is_white else shallow

    return convert


def _declared_bits(image: PIL.Image.Image, high: float) -> int | None:
    """The depth that a file says its greys have, where it is to be believed.

    White is 65535 in a PNG, so a dim one is shown dim; one with 12 bits in use would be black, and cameras write those.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS) == (12,):
        return 12
    told = tags.get(_LARGEST, (0,))[0]
    if told in (255, 1023, 4095, 16383, 65535) and high <= told:  # other values are this picture's own
        return int(told).bit_length()
    sure = image.format in ("PPM", "JPEG2000") or (image.format == "PNG" and high >= 1 << 12)
    return 16 if sure and high <= 65535 else None


def _range(image: PIL.Image.Image, kind: str) -> tuple[float, float, float]:
    """Least and largest value, and a mean, which is not finite if any value is not."""
    low, high, mean = math.inf, -math.inf, 0.0
    for _, strip in _strips(image):
        wide = strip.convert(kind)
        least, largest = _extrema(wide)
        low, high = min(low, least), max(high, largest)
        if kind == "F":
            mean += _extrema(wide.resize((1, 1), PIL.Image.Resampling.BOX))[0]
    return low, high, mean


@cache
def _log_guess(mode: str, bits: int) -> None:
    logger.warning("a grey image of Pillow's mode %s is taken for one of %d bits, by its largest value", mode, bits)


def load_image(source: ImageSource) -> PIL.Image.Image:
    """Any of the accepted image forms as an RGB PIL image; see `ImageSource`.

    Raises: ImageError: cannot be decoded, or an array whose shape, type or range is not an image's.
    """
    if isinstance(source, (str, PathLike, bytes)):
        return decode_image(source)
    if isinstance(source, PIL.Image.Image):
        name = name_of(source)
        with explained(name):
            image = _show(source, name)
        return image.copy() if image is source else image  # the caller's image stays as it is
    return to_rgb(TF.to_pil_image(_array_levels(source, (1, 3, 4))))


def name_of(source: ImageSource) -> str:
    """An image's name in errors."""
    if isinstance(source, (str, PathLike)):
        return fspath(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return getattr(source, "filename", "") or ("PIL image" if isinstance(source, PIL.Image.Image) else "image")


def load_planes(source: ImageSource, channels: int) -> list[PIL.Image.Image]:
    """An image as pictures that are to be treated alike: one in RGB, or in grey one for each of the `channels`.

    Raises: ConfigError: a file or PIL image for neither 1 nor 3 channels. ImageError: see `load_image`.
    """
    if channels in (1, 3):
        image = load_image(source)
        return [image if channels == 3 else image.convert("L")]
    if isinstance(source, (str, PathLike, bytes, PIL.Image.Image)):
        raise ConfigError(
            f"{name_of(source)}: the model takes {channels} channels, and image files are read as 3 or 1; pass arrays "
            f"(H, W, {channels}) or tensors ({channels}, H, W)"
        )
    return [TF.to_pil_image(plane) for plane in _array_levels(source, (channels,))]


def load_item(source: ImageSource) -> PIL.Image.Image | Tensor:
    """An RGB PIL image; of arrays and tensors with other than 1 or 3 channels their levels, (C, H, W) uint8."""
    if not hasattr(source, "ndim"):
        return load_image(source)
    levels = _array_levels(source, None)
    return to_rgb(TF.to_pil_image(levels)) if len(levels) in (1, 3) else levels


def _array_levels(source: Any, channels: tuple[int, ...] | None) -> Tensor:
    """An array or tensor as (C, H, W) uint8, where C is one of `channels`, or any number."""
    if isinstance(source, Tensor):
        tensor = source.detach()
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise ImageError(f"a tensor without plain values is not an image: {tensor.layout} on {tensor.device}")
    elif hasattr(source, "__array_interface__"):
        tensor = _array_to_tensor(source)
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor[None]
    else:
        raise ImageError(
            f"{type(source).__name__} is not an image; pass a path, bytes, a PIL image, an array or a tensor"
        )
    wanted = channels or tensor.shape[:1]
    if tensor.ndim != 3 or tensor.shape[0] not in wanted or 0 in tensor.shape:
        known = " or ".join(", ".join(map(str, wanted)).rsplit(", ", 1)) if channels else "any"
        raise ImageError(
            f"shape {tuple(source.shape)} is not an image; expected an (H, W, C) array or a (C, H, W) tensor, "
            f"C = {known}"
        )
    return _to_bytes(tensor).cpu()


def _array_to_tensor(source: Any) -> Tensor:
    import numpy as np  # not a dependency; it is installed where arrays are

    try:
        # A copy in C order: torch takes neither read-only arrays nor negative strides (`bgr[..., ::-1]`).
        return torch.from_numpy(np.array(source, order="C"))
    except (TypeError, ValueError) as error:  # ValueError: foreign byte order
        raise ImageError(
            f"array of type {source.dtype} is not an image; expected uint8 or floats from 0 to 1"
        ) from error


def _to_bytes(tensor: Tensor) -> Tensor:
    """Floats from 0 to 1 as uint8. Raises: ImageError: other floats, other types."""
    if tensor.is_floating_point():
        low, high = (float(bound) for bound in tensor.float().aminmax())  # float8 has none
        if not (low >= 0 and high <= 1):
            raise ImageError(f"float image with values from {low:g} to {high:g}; expected 0 to 1, not yet normalised")
        return (tensor.float() * 255).round().to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise ImageError(f"image of type {tensor.dtype}; expected uint8 or floats from 0 to 1")
    return tensor
