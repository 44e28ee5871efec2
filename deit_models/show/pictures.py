"""Pictures of heat maps, drawn with Pillow alone: the crop that a model gets, and colours over it."""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from ..config import is_finite
from ..errors import ConfigError, shown
from ..files import printable
from ..images.decoding import ImageSource, load_planes, name_of
from ..images.transforms import EvalTransform, seen_box
from ..predict import Prediction

COLOURS = (
    *((22, 0, 62), (67, 0, 95), (120, 0, 108), (176, 0, 102), (234, 1, 71)),
    *((254, 93, 25), (255, 152, 43), (255, 200, 85), (255, 245, 109)),
)
"""Colours from cold to hot, with even steps of lightness (CIE L* 5 to 95), so that equal steps of heat look equal."""
LEAST_SIDE, MOST_SIDE = 384, 1024
"""Pixels of the longer side of a `view`: small photographs are enlarged, large ones reduced."""


def view(model_transform: EvalTransform, image: ImageSource) -> PIL.Image.Image:
    """The part of an image that the model gets, in the photograph's own resolution and aspect, as an RGB picture.

    Raises: ImageError: the image cannot be decoded. ConfigError: a model for other than 1 or 3 channels.
    """
    spec = model_transform.preprocessing
    channels = len(spec.mean)
    if channels not in (1, 3):
        raise ConfigError(f"{name_of(image)}: the model takes {channels} channels; only 1 or 3 can be shown")
    picture = load_planes(image, channels)[0].convert("RGB")
    left, top, right, bottom = seen_box(spec, picture.height, picture.width)
    border = max(0, math.ceil(-left), math.ceil(-top))
    if border:  # black, as in the model's input
        padded = PIL.Image.new("RGB", (picture.width + 2 * border, picture.height + 2 * border))
        padded.paste(picture, (border, border))
        picture = padded
    longer = max(right - left, bottom - top)
    scale = min(max(longer, LEAST_SIDE), MOST_SIDE) / longer
    size = (max(1, round(scale * (right - left))), max(1, round(scale * (bottom - top))))
    # a rounding error must not reach beyond the picture
    box = (left + border, top + border, min(right + border, picture.width), min(bottom + border, picture.height))
    return picture.resize(size, Resampling.BICUBIC, box)


def overlay(picture: PIL.Image.Image, heat: Tensor, *, strength: float = 0.5) -> PIL.Image.Image:
    """A picture with a heat map in colours over it, see `COLOURS`; the result has the picture's size.

    Args:
        picture: the crop that the model gets, from `view`.
        heat: (H, W) of any size, from 0 to 1, as `heat_maps` gives for one image.
        strength: share of the colours; the rest is the picture's.

    Raises: ConfigError: a map of another shape or range, or a strength that is no share.
    """
    if heat.ndim != 2 or not heat.numel() or not bool(((heat >= 0) & (heat <= 1)).all()):
        raise ConfigError(f"heat of shape {tuple(heat.shape)}; expected (H, W), with values from 0 to 1")
    if not is_finite(strength) or not 0 <= strength <= 1:
        raise ConfigError(f"strength={shown(strength)}; expected a share from 0 to 1")
    enlarged = F.interpolate(heat.detach().float().cpu()[None, None], picture.size[::-1], mode="bilinear")[0, 0]
    return PIL.Image.blend(picture.convert("RGB"), TF.to_pil_image(coloured(enlarged)), strength)


def coloured(heat: Tensor) -> Tensor:
    """The colours of values from 0 to 1, (H, W) -> (3, H, W) uint8."""
    anchors = torch.tensor(COLOURS, dtype=torch.float32)
    place = heat * (len(anchors) - 1)
    below = place.floor().long().clamp(max=len(anchors) - 2)
    rest = (place - below)[..., None]
    return (anchors[below] * (1 - rest) + anchors[below + 1] * rest).round().to(torch.uint8).permute(2, 0, 1)


def with_groups(picture: PIL.Image.Image, groups: Tensor) -> PIL.Image.Image:
    """A picture with patches in one colour that became one token, and white lines between tokens.

    Patches that are a token by themselves keep their own colours. `groups` is (h, w): the number of the token of each
    patch, as `deploy.network.merged_patches` gives it for one image.
    """
    tokens = groups.flatten().cpu()
    hues = [colorsys.hsv_to_rgb(0.618 * number % 1, 0.9, 1.0) for number in range(int(tokens.max()) + 1)]
    tint = torch.where((tokens.bincount() > 1)[:, None], torch.tensor(hues), torch.nan)[tokens]
    tint = tint.T.reshape(3, *groups.shape)
    large, tint = (F.interpolate(some[None].float(), picture.size[::-1])[0] for some in (groups.cpu()[None], tint))
    pixels = TF.pil_to_tensor(picture.convert("RGB")) / 255
    pixels = torch.where(tint.isnan(), pixels, 0.55 * pixels + 0.45 * tint)
    edge = torch.zeros_like(large)
    edge[:, 1:] += large[:, 1:] != large[:, :-1]
    edge[:, :, 1:] += large[:, :, 1:] != large[:, :, :-1]
    edge = F.max_pool2d(edge, 3, stride=1, padding=1)
    return TF.to_pil_image(torch.where(edge > 0, 1.0, pixels))


# Explanations: one row a method


class MapRow(NamedTuple):
    """A row of an `explanation`: its caption, its picture, and the class that its map is for, if any."""

    caption: str
    picture: PIL.Image.Image
    target: int | None = None


_SIDE, _GAP, _BARS = 300, 20, 360  # pixels: most of a picture's side, between parts, width of the bars
_INK, _PALE, _PLAIN, _MARKED = (34, 34, 34), (232, 234, 237), (110, 128, 150), (176, 0, 102)


def explanation(
    picture: PIL.Image.Image, rows: Sequence[MapRow], predictions: Sequence[Prediction], *, title: str
) -> PIL.Image.Image:
    """One picture of several rows: the photograph, a heat map over it, and bars of the likeliest classes.

    The bar of the class that a map is for has another colour. Pillow's own font has English letters alone: accents are
    left out, other letters become question marks, and the number of such a class stands beside them.

    Args:
        picture: the crop that the model gets, from `view`.
        rows: an `overlay` each, of the same aspect, with a caption.
        predictions: the likeliest classes, likeliest first.
        title: of the whole, such as the model's name and the file's.

    """
    scale = _SIDE / max(picture.size)
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    small = picture.convert("RGB").resize(size, Resampling.LANCZOS)
    bars_left = 3 * _GAP + 2 * small.width
    bar = max(44, small.height // max(len(predictions), 1))
    step = max(small.height, bar * len(predictions)) + 24 + _GAP
    size = (bars_left + _BARS + _GAP, 3 * _GAP + 26 + step * len(rows) + 24)
    page = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(page)
    _write(draw, (_GAP, _GAP), title, size=22, width=size[0] - 2 * _GAP)
    for number, row in enumerate(rows):
        top = 2 * _GAP + 26 + number * step
        _write(draw, (_GAP, top), row.caption, size=16, width=size[0] - 2 * _GAP)
        page.paste(small, (_GAP, top + 24))
        page.paste(row.picture.resize(small.size, Resampling.LANCZOS), (2 * _GAP + small.width, top + 24))
        for place, prediction in enumerate(predictions):
            _bar(draw, (bars_left, top + 24 + bar * place), prediction, marked=prediction.index == row.target)
    _legend(page, draw, (2 * _GAP + small.width, size[1] - _GAP - 18), small.width)
    return page


def _bar(draw: PIL.ImageDraw.ImageDraw, place: tuple[int, int], prediction: Prediction, *, marked: bool) -> None:
    """A class: its label and percentage (or value) above a bar."""
    left, top = place
    share = prediction.probability
    number = f"{100 * share:.1f} %" if 0 <= share <= 1 else f"{share:.5g}"  # values of a regression
    label = _drawable(prediction.label)
    if "?" in label and "?" not in prediction.label:
        label = f"class {prediction.index}: {label}"
    _write(draw, (left, top), label, size=16, width=_BARS - 80)
    draw.text((left + _BARS, top), number, fill=_INK, font=PIL.ImageFont.load_default(16), anchor="ra")
    draw.rectangle((left, top + 21, left + _BARS - 1, top + 31), fill=_PALE)
    if filled := round(min(max(share, 0), 1) * _BARS):
        draw.rectangle((left, top + 21, left + filled - 1, top + 31), fill=_MARKED if marked else _PLAIN)


def _legend(page: PIL.Image.Image, draw: PIL.ImageDraw.ImageDraw, place: tuple[int, int], width: int) -> None:
    """The colours from cold to hot, with a word at each end."""
    left, top = place
    font = PIL.ImageFont.load_default(14)
    start, end = left + round(font.getlength("least ")), left + width - round(font.getlength(" most"))
    draw.text((left, top), "least", fill=_INK, font=font)
    draw.text((left + width, top), "most", fill=_INK, font=font, anchor="ra")
    page.paste(TF.to_pil_image(coloured(torch.linspace(0, 1, max(end - start, 2)).expand(12, -1))), (start, top + 3))


def _write(draw: PIL.ImageDraw.ImageDraw, place: tuple[int, int], text: str, *, size: int, width: int) -> None:
    """Text on one line of at most `width` pixels; the end of a longer one is left out."""
    font, text = PIL.ImageFont.load_default(size), _drawable(text)
    if draw.textlength(text, font=font) > width:
        while text and draw.textlength(f"{text}...", font=font) > width:
            text = text[:-1]
        text = f"{text}..."
    draw.text(place, text, fill=_INK, font=font)


def _drawable(text: str) -> str:
    """Text in letters that Pillow's own font has: without accents, and with question marks for other letters."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", printable(text)) if not unicodedata.combining(c))
    return plain.encode("ascii", "replace").decode()
