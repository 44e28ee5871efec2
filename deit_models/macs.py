"""Multiply-accumulates of one image, in closed form from a config: no model is built.

Counted is what torch's FLOP counter counts, halved: matrix products and convolutions, in eval mode, all heads that are
asked then. Biases, norms, softmax, activations, positions and pooling are free, as in the papers' figures.
"""

from __future__ import annotations

from math import prod
from typing import Any

from .errors import ConfigError
from .models.deit import DeiTConfig
from .models.levit import LeViTConfig
from .models.t2t_vit import T2TViTConfig
from .models.vit_resnas import ViTResNASConfig

_Grid = tuple[int, int]


def count_macs(config: Any) -> int:
    """Multiply-accumulates of one image.

    Args:
        config: of any family in this package; a model has its own under `model.config`.

    Raises: ConfigError: another family's.
    """
    for kind, count in _FAMILIES:
        if isinstance(config, kind):
            return count(config)
    known = ", ".join(kind.__name__ for kind, _ in _FAMILIES)
    raise ConfigError(f"no formula for the multiply-accumulates of a {type(config).__name__}; there is one for {known}")


def _convolution(grid: _Grid, kernel: int, in_dim: int, out_dim: int) -> int:
    """A convolution with a square kernel whose output has the sides `grid`; patches are one with a large stride."""
    return prod(grid) * kernel**2 * in_dim * out_dim


def _attention(queries: int, keys: int, key_dim: int, value_dim: int) -> int:
    """Scores and weighted values, all heads together."""
    return queries * keys * (key_dim + value_dim)


def _block(tokens: int, dim: int, attn_dim: int, mlp_hidden: int) -> int:
    """A plain transformer block: q, k, v and output projections, attention, two layers of the MLP."""
    return tokens * dim * (4 * attn_dim + 2 * mlp_hidden) + _attention(tokens, tokens, attn_dim, attn_dim)


def _deit(config: DeiTConfig) -> int:
    tokens = config.num_prefix_tokens + prod(config.grid)
    patches = _convolution(config.grid, config.patch_size, config.in_chans, config.embed_dim)
    blocks = config.depth * _block(tokens, config.embed_dim, config.attn_dim, config.mlp_hidden)
    return patches + blocks + (1 + config.distilled) * config.embed_dim * config.num_classes


def _t2t_vit(config: T2TViTConfig) -> int:
    (height, width), dim = config.image_hw, config.embed_dim
    layer = _token_performer if config.tokens_type == "performer" else _token_transformer
    split = 9 * config.token_dim  # a token and its neighbours
    macs = layer(height * width // 4**2, 49 * config.in_chans, config.token_dim)
    macs += layer(height * width // 8**2, split, config.token_dim)
    patches = prod(config.grid)
    macs += patches * split * dim
    macs += config.depth * _block(1 + patches, dim, config.attn_dim, config.mlp_hidden)
    # the class token's head, and with a token head one answer for every patch
    return macs + (1 + config.token_head * patches) * dim * config.num_classes


def _token_performer(tokens: int, in_dim: int, dim: int) -> int:
    features = dim // 2
    layers = 3 * in_dim * dim + dim * dim + 2 * dim * dim  # k, q, v; output; MLP
    # random features of keys and queries, the norm, keys with values, queries with both
    return tokens * (layers + 2 * dim * features + features + 2 * dim * features)


def _token_transformer(tokens: int, in_dim: int, dim: int) -> int:
    layers = 3 * in_dim * dim + dim * dim + 2 * dim * dim
    return tokens * layers + _attention(tokens, tokens, dim, dim)


def _levit(config: LeViTConfig) -> int:
    (height, width), first = config.image_hw, config.embed_dim[0]
    macs, channels = 0, config.in_chans
    for part in (8, 4, 2, 1):
        height, width = -(-height // 2), -(-width // 2)
        macs += _convolution((height, width), 3, channels, first // part)
        channels = first // part
    for stage, dim in enumerate(config.embed_dim):
        here = prod(config.grids[stage])
        macs += config.depth[stage] * _levit_layer(config, here, dim, config.num_heads[stage])
        if stage + 1 < len(config.embed_dim):
            macs += _levit_shrink(config, here, prod(config.grids[stage + 1]), dim, config.embed_dim[stage + 1])
    return macs + (1 + config.distilled) * config.embed_dim[-1] * config.num_classes


def _levit_layer(config: LeViTConfig, here: int, dim: int, heads: int) -> int:
    keys, values = heads * config.key_dim, heads * config.attn_ratio * config.key_dim
    layers = dim * (2 * keys + values) + values * dim + 2 * config.mlp_ratio * dim**2
    return here * layers + _attention(here, here, keys, values)


def _levit_shrink(config: LeViTConfig, here: int, there: int, dim: int, out_dim: int) -> int:
    # as many heads as key widths fit into a position, values four times as wide as keys, an MLP of ratio 2
    keys = dim // config.key_dim * config.key_dim
    values = 4 * keys
    layers = dim * keys + values * out_dim + 4 * out_dim**2
    return here * dim * (keys + values) + there * layers + _attention(there, here, keys, values)


def _vit_resnas(config: ViTResNASConfig) -> int:
    (height, width), side, channels = config.image_hw, config.patch_size, config.in_chans
    macs, before, prefix = 0, 0, config.num_prefix_tokens
    if config.stem == "conv":
        half, side, channels = (-(-height // 2), -(-width // 2)), side // 2, config.stem_dim
        macs += _convolution(half, 3, config.in_chans, channels) + 2 * _convolution(half, 3, channels, channels)
    macs += _convolution(config.grids[0], side, channels, config.stages[0].embed_dim)
    for stage, grid in zip(config.stages, config.grids, strict=True):
        dim = stage.embed_dim
        if before:
            macs += _convolution(grid, 3, before, dim) + prefix * before * dim
        for heads, hidden in zip(stage.num_heads, stage.mlp_hidden, strict=True):
            macs += _block(prefix + prod(grid), dim, heads * stage.head_dim, hidden)
        before = dim
    # the patch head is asked in training alone
    return macs + prefix * before * config.num_classes


_FAMILIES: tuple[tuple[type[Any], Any], ...] = (
    (DeiTConfig, _deit),
    (T2TViTConfig, _t2t_vit),
    (LeViTConfig, _levit),
    (ViTResNASConfig, _vit_resnas),
)
"""A family's config and its formula."""
