"""Decoding as a photo viewer would, and refusing what is not an image."""

import io
import os
import struct
import threading
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from deit_models.errors import ConfigError, DeitModelsError, ImageError
from deit_models.images.decoding import (
    _QUIET,
    MAX_IMAGE_PIXELS,
    Reduced,
    _bytes_a_pixel,
    _log_guess,
    decode_image,
    decode_reduced,
    load_image,
    load_item,
    load_planes,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def gradient(width: int = 60, height: int = 40) -> PIL.Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def encode(image: PIL.Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def store(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def png_header(width: int, height: int, *, bits: int = 8, data: bytes = bytes(64), colours: int = 2) -> bytes:
    """A PNG that claims a size, with next to no data behind the claim."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def assert_near(pixel: object, expected: tuple[int, int, int], tolerance: int = 0) -> None:
    assert np.abs(np.subtract(pixel, expected)).max() <= tolerance, f"{pixel} is not {expected}"


# What a photo viewer would show


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": True})])
def test_an_ordinary_file_gives_exactly_pillows_pixels(tmp_path: Path, form: str, options: dict[str, object]) -> None:
    path = store(tmp_path, "photo.img", encode(gradient(), form, **options))
    assert np.array_equal(np.asarray(decode_image(path)), np.asarray(PIL.Image.open(path).convert("RGB")))


def test_path_text_and_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    path = store(tmp_path, "photo.png", encode(gradient(), "PNG"))
    assert decode_image(path) == decode_image(str(path)) == decode_image(path.read_bytes())


def test_a_file_name_in_any_script_is_read(tmp_path: Path) -> None:
    path = store(tmp_path, "Übung 猫 🐈.png", encode(gradient(), "PNG"))
    assert decode_image(path).size == (60, 40)


def test_animated_gif_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    path = store(tmp_path, "moving.gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert_near(decode_image(path).getpixel((4, 4)), RED)


def test_cmyk_jpeg_shows_its_colours_and_not_their_negative(tmp_path: Path) -> None:
    path = store(tmp_path, "print.jpg", encode(PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    image = decode_image(path)
    assert image.mode == "RGB"
    assert_near(image.getpixel((8, 8)), RED, tolerance=3)


def test_16_bit_grey_png_keeps_its_range_and_is_not_clipped_to_white(tmp_path: Path) -> None:
    levels = np.array([[0, 257 * 64, 257 * 128, 65535]], dtype=np.uint16)
    path = store(tmp_path, "scan.png", encode(PIL.Image.fromarray(levels), "PNG"))
    assert [decode_image(path).getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 64, 128, 255)]


def test_palette_image_shows_its_colours(tmp_path: Path) -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    decoded = decode_image(store(tmp_path, "palette.png", encode(image, "PNG")))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]


def test_palette_image_with_a_transparent_colour_lies_over_white(tmp_path: Path) -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    decoded = decode_image(store(tmp_path, "palette.png", encode(image, "PNG", transparency=1)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), WHITE),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), WHITE),
        ("LA", (64, 255), (64, 64, 64)),
    ],
)
def test_alpha_lies_over_white(
    tmp_path: Path, mode: str, colour: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    path = store(tmp_path, "alpha.png", encode(PIL.Image.new(mode, (4, 4), colour), "PNG"))
    assert_near(decode_image(path).getpixel((1, 1)), expected, tolerance=1)


def test_a_transparent_colour_of_an_rgb_png_lies_over_white(tmp_path: Path) -> None:
    path = store(tmp_path, "key.png", encode(PIL.Image.new("RGB", (4, 4), RED), "PNG", transparency=RED))
    assert_near(decode_image(path).getpixel((1, 1)), WHITE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    # as shown: left half red, right half blue, a green top left corner
    shown = np.zeros((32, 64, 3), np.uint8)
    shown[:, :32], shown[:, 32:], shown[:8, :8] = RED, BLUE, GREEN
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = PIL.Image.fromarray(np.ascontiguousarray(undo(shown)))
    path = store(tmp_path, "phone.jpg", encode(stored, "JPEG", quality=95, exif=exif, subsampling=0))
    decoded = decode_image(path)
    assert decoded.size == (64, 32)
    assert np.abs(np.asarray(decoded).astype(int) - shown).mean() < 4
    assert load_image(decoded).size == (64, 32), "turned twice"


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_damaged_exif_does_not_cost_the_photo(tmp_path: Path, exif: bytes) -> None:
    path = store(tmp_path, "photo.jpg", encode(gradient(), "JPEG", exif=exif))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(path).size == (60, 40)


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_tiff_is_turned_alike_from_its_path_and_from_its_bytes(tmp_path: Path, mode: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = gradient().convert("L")
    stored.putpixel((0, 0), 255)
    stored = stored.convert(mode) if mode != "I;16" else stored.convert("I").point(lambda v: v * 257 + 0).convert(mode)
    path = store(tmp_path, "scan.tif", encode(stored, "TIFF", exif=exif))
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(path.read_bytes())))
    assert decode_image(path) == decode_image(path.read_bytes())
    assert decode_image(path).size == upright.size == ((60, 40) if orientation == 3 else (40, 60))
    assert np.array_equal(np.asarray(decode_image(path).convert("L")), np.asarray(load_image(upright).convert("L")))


def exif_with(orientation: int, tag: int, kind: int, value: bytes, count: int = 1) -> bytes:
    """EXIF of an orientation and another tag, of any type; `value` has four bytes."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI", tag, kind, count) + value
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x011A, 3, b"\1\0\0\0"), (0x0213, 12, b"\0\0\xff\x7f"), (0x8769, 2, b"abc\0"), (0x927C, 0x77, b"\xff" * 4)],
)
def test_photo_is_turned_though_another_tag_is_broken(tag: int, kind: int, value: bytes) -> None:
    data = encode(gradient(), "JPEG", exif=exif_with(6, tag, kind, value))
    assert decode_image(data).size == (40, 60)
    with warnings.catch_warnings():  # Pillow's own `open` warns of some
        warnings.simplefilter("ignore")
        with PIL.Image.open(io.BytesIO(data)) as image:
            assert load_image(load_image(image)).size == (40, 60)
            assert image.size == (60, 40)


def test_whatever_a_decoder_raises_is_an_image_error() -> None:
    class Odd(PIL.Image.Image):
        error: BaseException = KeyError("chunk")

        def load(self) -> object:
            raise self.error

    for error in (KeyError("chunk"), MemoryError(), RecursionError(), struct.error("short"), Exception("a\nb" * 500)):
        odd = Odd()
        odd._size, odd.error = (4, 4), error
        assert_refused(odd, "PIL image: ", "more memory" if isinstance(error, MemoryError) else "damaged")
    odd.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load_image(odd)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white_images_become_rgb(tmp_path: Path, mode: str) -> None:
    path = store(tmp_path, "photo.png", encode(PIL.Image.new(mode, (8, 8), "white"), "PNG"))
    assert_near(decode_image(path).getpixel((3, 3)), WHITE)


# Greys of more than 8 bits

RAMP = np.tile(np.linspace(0, 1, 16), (2, 1))


def tiff(array: np.ndarray, **tags: int) -> bytes:
    """An uncompressed grey TIFF with any bits, sign and meaning of zero, as Pillow does not write them."""
    kind, order = array.dtype.kind, array.dtype.byteorder
    mark = ">" if order == ">" else "<"
    data = array.tobytes() if "bits" not in tags else packed_12(array)
    fields = {
        **{256: array.shape[1], 257: array.shape[0], 258: tags.get("bits", 8 * array.dtype.itemsize), 259: 1},
        **{262: tags.get("photometric", 1), 273: 0, 277: 1, 278: array.shape[0], 279: len(data)},
        **({281: tags["largest"]} if "largest" in tags else {}),
        339: {"u": 1, "i": 2, "f": 3}[kind],
    }
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(struct.pack(mark + "HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    head = (b"MM\0*" if mark == ">" else b"II*\0") + struct.pack(mark + "I", 8)
    return head + struct.pack(mark + "H", len(fields)) + entries + bytes(4) + data


def packed_12(array: np.ndarray) -> bytes:
    """Two values in three bytes."""
    first, second = array.reshape(-1, 2).astype(int).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    "array",
    [
        (RAMP * 255).astype("<i2"),
        (RAMP * 1023).astype("<u2"),
        (RAMP * 16383).astype(">u2"),
        (RAMP * 32767).astype("<i2"),
        (RAMP * 65535).astype(">u2"),
        (RAMP * 4095).astype(">i4"),
        (RAMP * 65535).astype("<i4"),
        RAMP.astype(">f4"),
        (RAMP * 255).astype("<f4"),
        (RAMP * 1023).astype("<f4"),
    ],
    ids=lambda array: f"{array.dtype.str}-{array.max():g}",
)
def test_deep_greys_are_scaled_by_their_own_range(tmp_path: Path, array: np.ndarray) -> None:
    shown = np.asarray(decode_image(store(tmp_path, "scan.tif", tiff(array))))[..., 0]
    assert np.abs(shown - RAMP * 255).max() <= 1.5
    assert (shown[:, 0] == 0).all()
    assert (shown[:, -1] == 255).all()


def test_declared_depth_wins_over_the_largest_value() -> None:
    dim = (RAMP * 900).astype("<u2")
    assert np.asarray(decode_image(tiff(dim, bits=12))).max() == 900 * 255 // 4095
    pgm = b"P5 16 2 65535\n" + dim.astype(">u2").tobytes()
    assert np.asarray(decode_image(pgm)).max() == 900 // 257


@pytest.mark.parametrize("high", [6000, 12345, 30000])
def test_a_dim_png_of_16_bits_stays_dim(high: int, caplog: pytest.LogCaptureFixture) -> None:
    _log_guess.cache_clear()
    shown = decode_image(encode(PIL.Image.fromarray((RAMP * high).astype(np.uint16)), "PNG"))
    assert shown.getextrema() == ((0, high // 257),) * 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("largest", "white"), [(4095, 4095), (1023, 1023), (16383, 16383), (65535, 65535), (900, 1023)]
)
def test_largest_sample_of_a_tiff_tells_its_depth(largest: int, white: int) -> None:
    shown = np.asarray(decode_image(tiff((RAMP * 900).astype("<u2"), largest=largest)))
    assert shown.max() == 900 * 255 // white


def test_grey_png_of_16_bits_with_alpha_and_12_bits_in_use_is_not_shown_black() -> None:
    rows = b"".join(
        b"\0" + np.stack([RAMP[0] * 4095, RAMP[0] * 0 + 65535], 1).astype(">u2").tobytes() for _ in range(2)
    )
    assert_refused(png_header(16, 2, bits=16, data=rows, colours=4), "16 bits of which no more than 12")


@pytest.mark.parametrize("array", [(RAMP * 65535).astype("<u2"), RAMP.astype("<f4")], ids=["uint16", "float"])
def test_zero_is_white_where_a_tiff_says_so(array: np.ndarray) -> None:
    shown = np.asarray(decode_image(tiff(array, photometric=0)))[0, :, 0]
    assert shown[0] == 255
    assert shown[-1] == 0


def test_masks_of_zeros_and_ones_are_black_and_white() -> None:
    mask = np.eye(4)
    for array in (mask.astype(bool), mask.astype(np.uint16), mask.astype(np.int32), mask.astype(np.float32)):
        assert np.array_equal(np.asarray(load_image(PIL.Image.fromarray(array)))[..., 1], 255 * mask), array.dtype


def test_a_guessed_depth_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _log_guess.cache_clear()
    for _ in range(3):
        decode_image(tiff((RAMP * 4095).astype("<u2")))
        decode_image(tiff((RAMP * 65535).astype("<u2")))
        decode_image(tiff(RAMP.astype("<f4")))
    assert [record.getMessage() for record in caplog.records] == [
        "a grey image of Pillow's mode I;16 is taken for one of 12 bits, by its largest value"
    ]


@pytest.mark.parametrize(
    ("array", "part"),
    [
        ((RAMP * 2000 - 1000).astype("<i2"), "from -1000 to 1000"),
        ((RAMP * 255 - 128).astype("<i1"), "signed"),
        ((RAMP * 100).astype("<i1"), "signed"),
        ((RAMP * 7).astype("<u2"), "from 0 to 7"),
        ((RAMP * 10**6).astype("<i4"), "to 1e+06"),
        ((RAMP * 1.5).astype("<f4"), "to 1.5"),
        ((RAMP - 0.25).astype("<f4"), "from -0.25"),
        (np.where(RAMP == 1, np.nan, RAMP).astype("<f4"), "no numbers"),
        (np.where(RAMP == 0, np.inf, RAMP).astype("<f4"), "not finite"),
    ],
)
def test_greys_that_could_mean_anything_are_refused(tmp_path: Path, array: np.ndarray, part: str) -> None:
    assert_refused(store(tmp_path, "scan.tif", tiff(array)), "scan.tif", part)


def test_colours_of_16_bits_with_12_in_use_are_not_shown_black() -> None:
    rows = b"".join(b"\0" + (np.linspace(0, 4095, 24).astype(">u2")).tobytes() for _ in range(2))
    dark = png_header(8, 2, bits=16, data=rows)
    assert_refused(dark, "16 bits of which no more than 12")
    assert decode_image(png_header(8, 2, bits=16, data=bytes(len(rows)))).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("fourth", [0, 90, 255])
def test_fourth_sample_that_is_not_called_alpha_hides_nothing(fourth: int) -> None:
    data = encode(PIL.Image.new("RGBA", (8, 6), (*RED, fourth)), "TIFF")
    at = data.index(struct.pack("<HHI", 338, 3, 1))
    satellite = data[:at] + struct.pack("<H", 65000) + data[at + 2 :]
    assert decode_image(satellite).getextrema() == ((255, 255), (0, 0), (0, 0))
    assert_near(decode_image(data).getpixel((0, 0)), (255, 255 - fourth, 255 - fourth))


def test_alpha_of_a_tga_that_would_hide_everything_is_none() -> None:
    hidden = PIL.Image.new("RGBA", (8, 6), (*RED, 0))
    assert_near(decode_image(encode(hidden, "TGA")).getpixel((0, 0)), RED)
    hidden.putpixel((0, 0), (*BLUE, 255))
    assert [decode_image(encode(hidden, "TGA")).getpixel((x, 0)) for x in (0, 1)] == [BLUE, WHITE]


@pytest.mark.parametrize("scale", [1, 257])
def test_palette_of_a_tiff_with_8_bits_in_the_place_of_16_is_not_black(scale: int) -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([*RED, 20, 40, 60] + [0] * 762)
    image.putpixel((1, 0), 1)
    data = encode(image, "TIFF")
    colours = [level * 256 for plane in range(3) for level in image.getpalette()[plane::3]]
    at = data.index(struct.pack("<768H", *colours))
    data = data[:at] + struct.pack("<768H", *(level // 256 * scale for level in colours)) + data[at + 1536 :]
    assert [decode_image(data).getpixel((x, 0)) for x in (0, 1)] == [RED, (20, 40, 60)]


def test_colours_of_16_bits_plane_by_plane_are_refused_where_pillow_misreads_them() -> None:
    planes = (np.stack([RAMP] * 3, axis=-1) * 65535).astype("<u2")
    assert decode_image(tiff(planes[..., 0])).getextrema() == ((0, 255),) * 3
    tifffile = pytest.importorskip("tifffile")
    for options in ({}, {"compression": "zlib"}):
        out = io.BytesIO()
        tifffile.imwrite(out, planes.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", **options)
        if options:
            assert np.abs(np.asarray(decode_image(out.getvalue()))[..., 1] - RAMP * 255).max() <= 1
        else:
            assert_refused(out.getvalue(), "16 bits, signed or by planes")


def test_an_image_that_was_decoded_before_needs_no_file() -> None:
    for form in ("JPEG", "WEBP", "TIFF"):
        with io.BytesIO(encode(gradient(), form)) as file:
            image = PIL.Image.open(file)
            image.load()
        assert load_image(image).size == (60, 40)


def test_jpeg_in_one_scan_needs_the_image_alone() -> None:
    exif = exif_with(1, 0x011A, 3, b"\1\0\0\0")
    for options in (
        {},
        {"exif": exif, "comment": b"x"},
        {"quality": 5, "optimize": True, "icc_profile": bytes(70_000)},
    ):
        for mode, size in (("RGB", 4), ("L", 1 + 4), ("CMYK", 4 + 4)):
            with PIL.Image.open(io.BytesIO(encode(gradient().convert(mode), "JPEG", **options))) as image:
                assert _bytes_a_pixel(image) == size
                image.draft(None, (9, 9))
                assert image.size == decode_reduced(encode(gradient(), "JPEG", **options), side=9).image.size
    with PIL.Image.open(io.BytesIO(encode(gradient(), "JPEG", progressive=True, subsampling=0))) as image:
        assert _bytes_a_pixel(image) == 4 + 6


# What is refused, by name and in one line


def assert_refused(source: object, *parts: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert isinstance(caught.value, (DeitModelsError, ValueError))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_file_is_refused(tmp_path: Path, form: str) -> None:
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, form)
    assert_refused(store(tmp_path, "half.jpg", data[: len(data) // 2]), "half.jpg")


def test_corrupt_png_is_refused(tmp_path: Path) -> None:
    data = bytearray(encode(gradient(), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    assert_refused(store(tmp_path, "corrupt.png", bytes(data)), "corrupt.png", "damaged")


@pytest.mark.skipif(not PIL.features.check("avif"), reason="this Pillow reads no AVIF")
def test_corrupt_avif_is_refused(tmp_path: Path) -> None:
    data = bytearray(encode(gradient(), "AVIF"))
    start = data.index(b"mdat") + 4
    data[start:] = b"\xff" * (len(data) - start)  # Pillow's AVIF decoder raises RuntimeError
    assert_refused(store(tmp_path, "corrupt.avif", bytes(data)), "corrupt.avif", "damaged")


def test_damaged_bytes_never_raise_anything_but_image_error() -> None:
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        good = np.frombuffer(encode(gradient(16, 16), form), dtype=np.uint8)
        for _ in range(60):
            data = good.copy()
            data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
            with suppress(ImageError):
                decode_image(data.tobytes())


def test_empty_file_is_refused(tmp_path: Path) -> None:
    assert_refused(store(tmp_path, "empty.jpg", b""), "empty.jpg", "empty")


def test_empty_bytes_are_refused() -> None:
    assert_refused(b"", "0 bytes")


def test_directory_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, str(tmp_path), "is a directory")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "gone.jpg", "gone.jpg", "no such file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert_refused(tmp_path / "pipe.jpg", "pipe.jpg", "not a regular file")


def test_impossible_path_is_refused() -> None:
    assert_refused("a\0b.jpg", "cannot be read")
    assert_refused("x" * 5000, "cannot be read")


def test_text_file_named_jpg_is_refused(tmp_path: Path) -> None:
    assert_refused(store(tmp_path, "notes.jpg", b"remember the milk\n" * 50), "notes.jpg", "not an image")


def test_postscript_named_jpg_is_not_run(tmp_path: Path) -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert_refused(store(tmp_path, "drawing.jpg", program), "drawing.jpg", "PostScript")


@pytest.mark.parametrize("side", [13_400, 30_000, 200_000])
def test_decompression_bomb_is_refused_without_a_memory_spike(tmp_path: Path, side: int) -> None:
    path = store(tmp_path, "bomb.png", png_header(side, side))
    resource = pytest.importorskip("resource", reason="peak memory is measured on Unix only")
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        assert_refused(path, "bomb.png")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 64 << 10  # KiB on Linux


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured with Linux")
@pytest.mark.parametrize(
    ("mode", "form", "turned"), [("RGBA", "PNG", 8), ("LA", "TIFF", 3), ("I", "TIFF", 1), ("RGB", "PNG", 6)]
)
def test_conversion_takes_two_copies_at_most(tmp_path: Path, mode: str, form: str, turned: int) -> None:
    resource = pytest.importorskip("resource")
    exif = PIL.Image.Exif()
    exif[0x0112] = turned
    path = store(tmp_path, "a", encode(PIL.Image.new(mode, (3000, 4000)), form, exif=exif))
    decode_image(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    decode_image(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert peak - before < (8 + 2) * 3000 * 4000, "some for strips"


def with_size(data: bytes, at: int, form: str, *sides: int) -> bytes:
    return (
        data[:at]
        + b"".join(side.to_bytes(3, "little") if form == "WEBP" else side.to_bytes(2, "big") for side in sides)
        + data[at + (6 if form == "WEBP" else 4) :]
    )


def test_decoders_that_need_much_memory_take_smaller_images() -> None:
    webp = encode(
        PIL.Image.new("RGBA", (40, 30)), "WEBP", save_all=True, append_images=[PIL.Image.new("RGBA", (40, 30), RED)]
    )
    assert_refused(with_size(webp, webp.index(b"VP8X") + 12, "WEBP", 9999, 9999), "MiB to decode from WEBP")
    for options in ({"progressive": True}, {"progressive": True, "subsampling": 0}):
        jpeg = encode(gradient(), "JPEG", **options)
        assert_refused(with_size(jpeg, jpeg.index(b"\xff\xc2") + 5, "JPEG", 13000, 13000), "MiB to decode from JPEG")


def test_a_kept_error_keeps_no_pixels() -> None:
    for form in ("JPEG", "WEBP", "PNG"):
        data = encode(gradient(200, 200), form)
        with pytest.raises(ImageError) as caught:
            decode_image(data[: len(data) // 2])
        error: BaseException | None = caught.value
        assert error.__cause__ is not None
        while error is not None:
            held = [value for frame, _ in walk_tb(error.__traceback__) for value in frame.f_locals.values()]
            assert not [value for value in held if isinstance(value, PIL.Image.Image)]
            error = error.__cause__ or error.__context__


@pytest.fixture
def pillow_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)


@pytest.mark.usefixtures("pillow_without_limit")
def test_the_pixel_limit_holds_where_pillows_was_switched_off(tmp_path: Path) -> None:
    side = int(MAX_IMAGE_PIXELS**0.5) + 1
    assert_refused(store(tmp_path, "bomb.png", png_header(side, side)), "bomb.png", f"{side}x{side}")


def test_an_image_above_pillows_warning_limit_warns_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encode(gradient(), "PNG")).size == (60, 40)


def test_an_undecoded_pil_image_of_a_truncated_file_is_refused(tmp_path: Path) -> None:
    data = encode(gradient(200, 200), "JPEG")
    with PIL.Image.open(store(tmp_path, "half.jpg", data[: len(data) // 2])) as image:
        assert_refused(image, "half.jpg", "damaged")


# Arrays and tensors


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_array_and_tensor_of_the_same_image_agree(channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 5, channels), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    assert load_image(array) == load_image(tensor)
    assert load_image(array).size == (5, 6)


def test_grey_array_without_channels_is_an_image() -> None:
    assert load_image(np.full((4, 6), 9, np.uint8)).getpixel((5, 3)) == (9, 9, 9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_array_from_0_to_1_gives_the_same_pixels_as_uint8(dtype: type) -> None:
    array = np.asarray(gradient())
    assert load_image((array / 255).astype(dtype)) == load_image(array)


def test_reversed_channels_of_an_array_are_read() -> None:
    array = np.asarray(gradient())
    assert np.array_equal(np.asarray(load_image(array[..., ::-1])), array[..., ::-1])


def test_read_only_array_is_read_without_a_warning_and_unchanged() -> None:
    array = np.asarray(gradient())
    assert not array.flags.writeable
    assert np.array_equal(np.asarray(load_image(array)), array)


def test_tensor_that_requires_grad_is_read() -> None:
    assert load_image(torch.rand(3, 4, 5, requires_grad=True)).size == (5, 4)


def test_pil_image_is_turned_upright() -> None:
    image = gradient()
    image.getexif()[0x0112] = 6
    assert load_image(image).size == (40, 60)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros((3, 8, 9), np.uint8), "(3, 8, 9)"),
        (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "(2, 4, 4, 3)"),
        (np.zeros(7, np.uint8), "(7,)"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (np.full((4, 4, 3), None), "object"),
        (np.full((4, 4, 3), "a"), "<U1"),
        (np.full((4, 4, 3), 200.0), "200"),
        (np.full((4, 4, 3), -0.5), "-0.5"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (torch.zeros(8, 9, 3, dtype=torch.uint8), "(8, 9, 3)"),
        (torch.zeros(8, 9, dtype=torch.uint8), "(8, 9)"),
        (7, "int"),
        (None, "NoneType"),
        ([[1, 2]], "list"),
    ],
)
def test_what_is_no_image_is_refused_with_what_was_given(bad: object, part: str) -> None:
    assert_refused(bad, part)


def test_planes_of_other_channel_counts_come_from_arrays_and_tensors_alone() -> None:
    levels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 4)
    for source in (levels, levels.permute(1, 2, 0).numpy(), levels / 255):
        planes = load_planes(source, 2)
        assert [plane.mode for plane in planes] == ["L", "L"]
        assert torch.equal(torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]), levels)
        assert torch.equal(load_item(source), levels)
    assert load_planes(gradient(), 1) == [gradient().convert("L")]
    assert load_item(levels[:1]).mode == "RGB"
    with pytest.raises(ConfigError, match=r"photo\.png: the model takes 4 channels.*arrays \(H, W, 4\)"):
        load_planes("photo.png", 4)
    with pytest.raises(ImageError, match=r"shape \(2, 3, 4\) .* C = 5$"):
        load_planes(levels, 5)


# Decoding smaller


def smooth(width: int, height: int) -> PIL.Image.Image:
    """Colours that tell every corner from the others."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("side", "size"), [(400, (811, 606)), (303, (406, 303)), (304, (811, 606)), (151, (203, 152)), (10, (102, 76))]
)
def test_jpeg_is_decoded_smaller_but_no_side_below_what_is_asked(side: int, size: tuple[int, int]) -> None:
    found = decode_reduced(encode(smooth(811, 606), "JPEG"), side=side)
    image = found.image if isinstance(found, Reduced) else found
    assert image.size == size
    assert min(image.size) >= side


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_box_is_where_the_photograph_lies_in_every_orientation(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(201, 137), "JPEG", quality=100, exif=exif, subsampling=0)  # neither a multiple of 8
    found = decode_reduced(data, side=17)
    assert isinstance(found, Reduced)
    left, top, right, bottom = found.box
    whole = decode_image(data)
    assert (8 * (right - left), 8 * (bottom - top)) == whole.size
    assert 0 <= left < right <= found.image.width
    assert 0 <= top < bottom <= found.image.height
    ours = np.asarray(found.image.resize((10, 10), box=found.box)).astype(int)
    plain = np.asarray(whole.resize((10, 10))).astype(int)
    assert np.abs(ours - plain).mean() < 0.5
    assert np.abs(ours - plain).max() <= 3


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_decoded_smaller_with_their_colours(mode: str) -> None:
    data = encode(smooth(256, 256).convert(mode), "JPEG", quality=95)
    found = decode_reduced(data, side=60)
    assert isinstance(found, Reduced)
    assert found.image.mode == "RGB"
    expected = np.asarray(decode_image(data).resize((16, 16))).astype(int)
    assert np.abs(np.asarray(found.image.resize((16, 16))).astype(int) - expected).max() <= 4


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP"])
def test_other_formats_are_decoded_as_they_are(form: str) -> None:
    data = encode(smooth(256, 256), form)
    assert decode_reduced(data, side=16) == decode_image(data)


def noise_as_jpeg() -> bytes:
    return encode(PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)), "JPEG")


def test_decoding_smaller_refuses_the_same_files(tmp_path: Path) -> None:
    whole = noise_as_jpeg()
    for data, reason in (
        (whole[: len(whole) // 2], "damaged image"),
        (b"", "the file is empty"),
        (b"milk, eggs", "not an image"),
        (png_header(20_000, 20_000), "400000000 pixels"),
    ):
        with pytest.raises(ImageError, match=rf"photo\.jpg: .*{reason}"):
            decode_reduced(store(tmp_path, "photo.jpg", data), side=32)


@pytest.mark.usefixtures("pillow_without_limit")
def test_the_pixel_limit_is_for_the_files_size_and_not_for_what_is_left_of_it(tmp_path: Path) -> None:
    whole = noise_as_jpeg()
    side = int(MAX_IMAGE_PIXELS**0.5) + 1
    frame = whole.index(b"\xff\xc0") + 5  # the height and the width
    large = whole[:frame] + 2 * side.to_bytes(2, "big") + whole[frame + 4 :]
    with pytest.raises(ImageError, match=f"{side}x{side} pixels"):
        decode_reduced(store(tmp_path, "photo.jpg", large), side=32)


def test_threads_that_decode_leave_the_warnings_of_others_as_they_were() -> None:
    data = encode(gradient(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    both, done = threading.Barrier(2), threading.Barrier(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)

        def first() -> None:  # in first, out first
            with _QUIET:
                both.wait(10)
                decode_image(data)
            done.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        both.wait(10)
        with _QUIET:
            done.wait(10)
            warnings.warn("odd metadata", UserWarning, stacklevel=1)  # still quiet for the one that stays
        thread.join(10)
        assert warnings.filters == before


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, 8, 8, device="meta"),
        torch.zeros(3, 8, 8).to_sparse(),
        torch.full((3, 8, 8), 2.0).to(torch.float8_e4m3fn),
    ],
    ids=["meta", "sparse", "float8"],
)
def test_tensors_without_plain_values_are_no_images(tensor: torch.Tensor) -> None:
    with pytest.raises(ImageError):
        load_image(tensor)


def test_array_of_foreign_byte_order_is_refused() -> None:
    with pytest.raises(ImageError, match="is not an image"):
        load_image(np.zeros((8, 8, 3), dtype=">u2"))
