"""Pictures of heat maps, drawn with Pillow alone: the crop that a model gets, and colours over it."""

from __future__ import annotations

import math

import PIL.Image
import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from ..config import is_finite
from ..errors import ConfigError, shown
from ..images.decoding import ImageSource, load_planes, name_of
from ..images.transforms import EvalTransform, seen_box

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
