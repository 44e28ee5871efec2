"""Fuzz the reading of images: `python tests/fuzz/images.py --seed 0 --count 1000`.

Small pictures in the formats and modes that Pillow writes are damaged, byte by byte or by a format's own structure, and
read as bytes or as a file, exactly and fast, up to the model's input; arrays, tensors and PIL images of odd kinds too.
Outcomes:

    refused     an `ImageError`, in one short line
    decoded     pixels of a plausible size, the same in every way of reading
    same        an undamaged file, and the very picture
    FAULT       anything else
"""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from damage import BYTES
from fuzzing import WrongError, main, run_cases

from deit_models import DeitModelsError, ImageError
from deit_models.checkpoint import Preprocessing
from deit_models.images.decoding import MAX_IMAGE_PIXELS, decode_image, decode_reduced, load_image
from deit_models.images.transforms import EvalTransform

__all__ = ["case", "run_cases"]

SIZE = (40, 28)
TRANSFORMS = tuple(
    EvalTransform(Preprocessing(resize=resize, crop=(32, 32)), fast_pixels=fast)
    for resize in (36, (36, 36))
    for fast in (False, True)
)


def picture(mode: str) -> PIL.Image.Image:
    """Colours that differ at every corner, in a mode of Pillow's; "first" is the red of them, as greys."""
    colours = [PIL.Image.linear_gradient("L").resize(SIZE).rotate(angle) for angle in (0, 90, 180)]
    rgb = PIL.Image.merge("RGB", colours)
    if mode in ("RGBA", "LA", "PA"):
        whole = rgb if mode == "RGBA" else rgb.convert(mode[0])
        whole = whole.convert("RGBA" if mode == "RGBA" else mode)
        if mode != "PA":
            whole.putalpha(PIL.Image.radial_gradient("L").resize(SIZE))
        return whole
    if mode == "first":
        return colours[0]
    if mode == "I;16":
        return PIL.Image.frombytes("I;16", SIZE, b"".join(struct.pack("<H", v * 257) for v in colours[0].tobytes()))
    if mode == "F":
        return PIL.Image.frombytes("F", SIZE, b"".join(struct.pack("<f", v / 255) for v in colours[0].tobytes()))
    return rgb.convert(mode)


_TURNED = {n: PIL.Image.Transpose[f"ROTATE_{angle}"] for n, angle in ((3, 180), (6, 90), (8, 270))}
"""By EXIF orientation: how the stored pixels lie, of a picture that is shown upright."""


def _exif(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E], exif[0x011A], exif[0x0132], exif[0x9286] = "words", 72.0, "2024:01:02 03:04:05", b"ASCII\0\0\0x"
    return exif.tobytes()


@cache
def written() -> tuple[tuple[str, bytes], ...]:
    """A picture in every format and mode that this Pillow writes."""
    jpeg = [
        ({}, "RGB"),
        ({"progressive": True, "subsampling": 0}, "RGB"),
        ({}, "L"),
        ({}, "CMYK"),
        ({"quality": 5}, "RGB"),
    ]
    forms: list[tuple[str, dict[str, Any], str]] = [("JPEG", options, mode) for options, mode in jpeg]
    forms += [("JPEG", {"turned": n, "comment": b"x"}, "RGB") for n in (1, 3, 6, 8)]
    forms += [("PNG", {}, mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    forms += [
        ("PNG", {"transparency": 3}, "P"),
        ("PNG", {"turned": 6}, "RGB"),
        ("PNG", {"transparency": (1, 2, 3)}, "RGB"),
    ]
    forms += [
        ("GIF", {}, "P"),
        ("GIF", {"animated": True}, "P"),
        ("WEBP", {"lossless": True}, "RGBA"),
        ("WEBP", {}, "RGB"),
    ]
    forms += [("WEBP", {"animated": True}, "RGB"), ("WEBP", {"turned": 6}, "RGB"), ("PNG", {"animated": True}, "RGB")]
    forms += [("AVIF", {}, "RGB"), ("AVIF", {"animated": True}, "RGB"), ("AVIF", {}, "RGBA"), ("JPEG2000", {}, "RGB")]
    forms += [("JPEG2000", {}, "LA"), ("MPO", {"animated": True}, "RGB"), ("ICO", {}, "RGBA"), ("ICNS", {}, "RGBA")]
    forms += [
        ("TIFF", {"compression": c}, "RGB") for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    ]
    forms += [("TIFF", {}, mode) for mode in ("1", "L", "LA", "P", "CMYK", "I;16", "F", "I", "RGBA", "LAB", "YCbCr")]
    forms += [("TIFF", {"animated": True}, "RGB"), ("TIFF", {"compression": "group4"}, "1")]
    forms += [("BMP", {}, mode) for mode in ("1", "L", "P", "RGB", "RGBA")] + [
        ("PPM", {}, mode) for mode in ("1", "L", "RGB", "I")
    ]
    forms += [("TGA", {"compression": c}, mode) for c in (None, "tga_rle") for mode in ("L", "RGBA", "P")]
    forms += [
        ("PCX", {}, "P"),
        ("PCX", {}, "RGB"),
        ("SGI", {}, "RGB"),
        ("DDS", {}, "RGBA"),
        ("QOI", {}, "RGB"),
    ]
    forms += [
        ("DIB", {}, "RGB"),
        ("MSP", {}, "1"),
        ("XBM", {}, "1"),
        ("SPIDER", {}, "F"),
        ("EPS", {}, "RGB"),
        ("PFM", {}, "F"),
    ]
    return tuple(entry for entry in (_written(*form) for form in forms) if entry is not None)


def _written(kind: str, options: dict[str, Any], mode: str) -> tuple[str, bytes] | None:
    out, options = io.BytesIO(), dict(options)
    image = picture(mode)
    if "turned" in options:
        turned = options.pop("turned")
        options["exif"] = _exif(turned)
        image = image.transpose(_TURNED[turned]) if turned in _TURNED else image
    if options.pop("animated", False):
        options |= {"save_all": True, "append_images": [image.rotate(180)]}
    try:
        image.save(out, kind, **options)
        if kind == "TIFF":
            PIL.Image.open(out).load()
    except (OSError, ValueError, KeyError):
        return None  # a Pillow without it; 12.3 does not read the YCbCr that it writes
    return f"{kind} {mode}", out.getvalue()


# Damage by structure


def png_chunk(rng: random.Random, data: bytes) -> bytes:
    """A PNG with one chunk changed, and its checksum right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    n = rng.randrange(len(chunks))
    kind, content = chunks[n]
    how = rng.randrange(8)
    if how == 0:
        chunks[0] = (b"IHDR", rng.choice(BYTES)(rng, chunks[0][1]))
    elif how == 1:
        del chunks[n]
    elif how == 2:
        chunks.insert(n, rng.choice(chunks))
    elif how == 3:
        bomb = zlib.compress(b"\0" * 3_000_000)
        chunks.insert(
            1, rng.choice(((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb)))
        )
    elif how == 4:
        size = rng.choice(
            ((1, 2**24), (2**24, 1), (60_000, 1), (1, 60_000), (2**31 - 1, 2**31 - 1), (13_000, 13_000), (0, 5))
        )
        chunks[0] = (b"IHDR", struct.pack(">II", *size) + chunks[0][1][8:])
    elif how == 5:
        chunks.insert(
            1,
            (
                rng.choice((b"eXIf", b"tRNS", b"gAMA", b"pHYs", b"acTL", b"fcTL", b"PLTE", b"cHRM")),
                rng.randbytes(rng.randrange(30)),
            ),
        )
    else:
        chunks[n] = (kind, rng.choice(BYTES)(rng, content))
    body = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(body)


def tiff_entry(rng: random.Random, data: bytes) -> bytes:
    """A TIFF, or the EXIF of a JPEG, with one field of its directory changed."""
    start = data.find(b"II*\0") if b"II*\0" in data[:200] else data.find(b"MM\0*")
    if start < 0:
        return rng.choice(BYTES)(rng, data)
    order = "<" if data[start : start + 2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(order + "I", data, start + 4)
        (count,) = struct.unpack_from(order + "H", data, start + at)
        entry = start + at + 2 + 12 * rng.randrange(max(count, 1))
        out = bytearray(data)
        how, small, large = (
            rng.randrange(3),
            rng.choice((0, 1, 2, 3, 5, 7, 12, 13, 255)),
            rng.choice((0, 1, 2**16, 2**31, 2**32 - 1, 65500)),
        )
        form, offset, value = ((order + "H", 2, small), (order + "I", 4, large), (order + "I", 8, large))[how]
        struct.pack_into(form, out, entry + offset, value)
    except struct.error:
        return rng.choice(BYTES)(rng, data)
    return bytes(out)


def jpeg_segment(rng: random.Random, data: bytes) -> bytes:
    """A JPEG with one segment before its scan changed, doubled, or gone."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append((data[at + 1], data[at + 4 : at + 2 + size]))
        at += 2 + size
    if not segments:
        return rng.choice(BYTES)(rng, data)
    n = rng.randrange(len(segments))
    how = rng.randrange(5)
    frames = [m for m, (marker, _) in enumerate(segments) if marker in (0xC0, 0xC1, 0xC2)]
    if how == 0:
        del segments[n]
    elif how == 1:
        segments.insert(n, rng.choice(segments))
    elif how == 2 and frames:
        marker, content = segments[frames[0]]
        height, width = rng.choice(((65500, 1), (1, 65500), (65500, 65500), (6000, 6000), (0, 8), (9, 0)))
        segments[frames[0]] = (marker, content[:1] + struct.pack(">HH", height, width) + content[5:])
    else:
        segments[n] = (segments[n][0], rng.choice(BYTES)(rng, segments[n][1])[:65_000])
    body = (bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content for marker, content in segments)
    return data[:2] + b"".join(body) + data[at:]


# Cases


def case(rng: random.Random, place: Path) -> tuple[str, Callable[[], str]]:
    how = rng.random()
    if how < 0.08:
        return "arrays and tensors", lambda: read_object(strange_object(rng))
    label, data = rng.choice(written())
    kind = label.split(" ")[0]
    if how < 0.14:
        return "undamaged", partial(read_sound, label, data, place / _name(rng))
    if how < 0.16:
        return "extreme sizes", partial(read, *extreme(rng), place / _name(rng))
    damage = rng.choice(BYTES)
    structure = {"PNG": png_chunk, "JPEG": jpeg_segment, "MPO": jpeg_segment, "TIFF": tiff_entry, "WEBP": tiff_entry}
    if kind in structure and rng.random() < 0.5:
        damage = rng.choice((structure[kind], tiff_entry)) if kind != "TIFF" else tiff_entry
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = damage(rng, data)
    return kind, partial(read, label, data, place / _name(rng))


def _name(rng: random.Random) -> str:
    return rng.choice(("a.jpg", "a.png", "a.tif", "a", "é\n.gif", "a.webp", "-", "a.eps"))


def extreme(rng: random.Random) -> tuple[str, bytes]:
    """Sound images of a few bytes that are long, thin, or large."""
    size = rng.choice(
        ((1, 1), (60_000, 1), (1, 60_000), (1_000_000, 1), (2, 500_000), (6000, 6000), (1, 4), (65_000, 30))
    )
    out = io.BytesIO()
    kind, mode = rng.choice((("PNG", "L"), ("PNG", "1"), ("PNG", "RGBA"), ("TIFF", "L"), ("GIF", "P"), ("BMP", "1")))
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    PIL.Image.new(mode, size).save(out, kind, **options) if max(size) < 65_536 or kind != "GIF" else out.write(
        b"GIF89a"
    )
    return f"{kind} {mode} {size}", out.getvalue()


def strange_object(rng: random.Random) -> Any:
    import numpy

    shape = rng.choice(
        (
            (9, 8, 3),
            (3, 9, 8),
            (9, 8),
            (9, 8, 4),
            (9, 8, 1),
            (1, 9, 8),
            (0, 8, 3),
            (9, 8, 2),
            (2, 3, 9, 8),
            (5, 9, 8),
            (),
        )
    )
    values = torch.rand(shape) * rng.choice((1, 1, 1, 255, -1, 65_535))
    if rng.random() < 0.2 and values.numel():
        values.view(-1)[0] = rng.choice((float("nan"), float("inf")))
    types = [
        torch.uint8,
        torch.int16,
        torch.int64,
        torch.bool,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
    ]
    tensor = values.to(rng.choice((*types, torch.float32, torch.float32, torch.float8_e4m3fn, torch.uint16)))
    how = rng.randrange(6)
    if how == 0:
        return rng.choice(
            (None, 3, b"", "", "a\0b", [1, 2], {"a": 1}, object(), Path("/"), Path("/dev/zero"), "/dev/tty", "x" * 5000)
        )
    if how == 1:
        return picture(
            rng.choice(
                ("1", "L", "LA", "PA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "RGBX")
            )
        )
    if how == 2:
        floats = values.requires_grad_()
        return rng.choice(
            (tensor.to("meta"), values.detach().to_sparse(), floats, tensor[..., ::2] if shape else tensor)
        )
    try:
        return (
            tensor
            if how == 3
            else tensor.numpy()[..., ::-1]
            if how == 4 and shape
            else numpy.asarray(tensor.numpy(), dtype=object)
        )
    except TypeError:
        return tensor


# The judge


def read_object(source: Any) -> str:
    image = load_image(source)
    _plausible(image)
    _input(TRANSFORMS[0], source)
    return "decoded"


def read_sound(label: str, data: bytes, path: Path) -> str:
    """An undamaged file must not be refused, unless it is a program; lossless formats give the very picture."""
    kind, mode = label.split(" ")
    try:
        read(label, data, path)
        found = decode_image(data)
    except ImageError as error:
        if kind == "EPS":
            return "refused"
        raise WrongError(f"an undamaged {label} is refused: {error}") from error
    if kind == "PNG" and mode == "RGB" and found.size == SIZE and found.tobytes() != picture("RGB").tobytes():
        raise WrongError(f"an undamaged {label} gives other pixels")
    # of every format and mode: not black, not white, and bright where the picture is
    if kind not in ("AVIF", "ICNS", "MSP", "XBM") and found.size == SIZE and mode in ("RGB", "L", "F", "I;16", "CMYK"):
        grey = {"L": "L", "F": "first", "I;16": "first"}
        expected = picture(grey.get(mode, "RGB")).convert("RGB").resize((4, 4))
        worst = max(abs(a - b) for a, b in zip(found.resize((4, 4)).tobytes(), expected.tobytes(), strict=True))
        if worst > 60:
            raise WrongError(f"an undamaged {label} is {worst} levels from the picture")
    return "same"


def _fax_of_one_size(label: str, *outcomes: Any) -> bool:
    """Whether these are pixels of one size of a bilevel TIFF: libtiff leaves memory as it is behind a bad code word."""
    sizes = {None if isinstance(outcome, DeitModelsError) else outcome[0] for outcome in outcomes}
    return label == "TIFF 1" and len(sizes) == 1


def read(label: str, data: bytes, path: Path) -> str:
    """Every way of reading gives the same: pixels of one size, or a refusal."""
    path.write_bytes(data)
    ways = (lambda: decode_image(data), lambda: decode_image(path), lambda: decode_reduced(path, side=8))
    first, again, reduced = (_outcome(way) for way in ways)
    if isinstance(first, DeitModelsError) and isinstance(again, DeitModelsError):
        if not isinstance(reduced, DeitModelsError):
            raise WrongError(f"{label}: reduced {_short(reduced)}, but {_short(first)}")
        raise first
    if first != again and not _fax_of_one_size(label, first, again):
        raise WrongError(f"{label}: as bytes {_short(first)}, as a file {_short(again)}")
    if isinstance(reduced, DeitModelsError):
        raise WrongError(f"{label}: decodes, but not reduced: {reduced}")
    for transform in TRANSFORMS if max(first[0]) < 2000 else TRANSFORMS[1:3]:
        _input(transform, path)
    return "decoded"


def _outcome(act: Callable[[], Any]) -> Any:
    """The refusal; or size and pixels, of a large image only some: the image itself is not kept beside the next."""
    try:
        found = act()
    except DeitModelsError as error:
        return error
    image = getattr(found, "image", found)
    _plausible(image)
    return image.size, (
        image if max(image.size) < 2000 else image.resize((9, 9), PIL.Image.Resampling.NEAREST)
    ).tobytes()


def _short(outcome: Any) -> str:
    return f"refused ({outcome})"[:120] if isinstance(outcome, DeitModelsError) else f"decoded {outcome[0]}"


def _plausible(image: PIL.Image.Image) -> None:
    if image.mode != "RGB" or min(image.size) < 1 or image.width * image.height > MAX_IMAGE_PIXELS:
        raise WrongError(f"decodes to {image.mode} {image.size}")


def _input(transform: EvalTransform, source: Any) -> None:
    found = transform(source)
    if found.shape != (3, 32, 32) or found.dtype != torch.float32 or not bool(found.isfinite().all()):
        raise WrongError(f"the input is {found.dtype} {tuple(found.shape)}, finite: {bool(found.isfinite().all())}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(__doc__.splitlines()[0], case))
