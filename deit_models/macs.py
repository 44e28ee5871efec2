"""Multiply-accumulates of one image, in closed form from a config: no model is built, so a search may ask thousands.

Counted is what torch's FLOP counter counts, at two FLOPs a multiply-accumulate: matrix products and convolutions, those
of attention too. Free are biases, norms, activations, softmax, scaling, pooling and whatever else works element by
element. BatchNorm is free as well: it can be folded away. The size is the config's own; all heads are counted.

Reading order: `count_macs`, what families share, one function a family, and the table of them. To add a family, write
its function and put it in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from .errors import ConfigError
from .models.deit import DeiTConfig
from .models.layers import ImageClassifier
from .models.levit import SHRINK_ATTN_RATIO, SHRINK_MLP_RATIO, LeViTConfig
from .models.t2t_vit import T2TViTConfig
from .models.vit_resnas import ViTResNASConfig
from .registry import model_spec


def count_macs(model: ImageClassifier | str | Any) -> int:
    """Multiply-accumulates of one image through matrix products and convolutions, at the config's input size.

    Args:
        model: a config such as `DeiTConfig(...)`, a model, of which the config is read, or a registered name.

    Raises: UnknownModelError: no such name. ConfigError: a config of another family; `model_info(name).macs` measures
        any registered model.
    """
    config = model.config if isinstance(model, ImageClassifier) else model
    if isinstance(model, str):
        config = model_spec(model).config
    # the very type: what a subclass of a config makes of its fields is not known here
    count = _FAMILIES.get(type(config))
    if count is None:
        known = ", ".join(sorted(family.__name__ for family in _FAMILIES))
        raise ConfigError(
            f"cannot count the MACs of {type(config).__name__}; expected {known}, a model of theirs or its name. "
            f"Any registered model is measured by model_info(name).macs"
        )
    return count(config)


# What families share. Widths of attention are those of all heads together: how they are split changes nothing.


def _linear(tokens: int, *widths: int) -> int:
    """Linear layers one after the other, each applied to every token; `widths` from the input to the last output."""
    return tokens * sum(before * after for before, after in pairwise(widths))


def _convolution(positions: int, in_chans: int, *, out_chans: int, kernel_size: int) -> int:
    """A convolution with a square kernel; `positions` are those of its output. Padding counts as if it were image."""
    return positions * out_chans * in_chans * kernel_size**2


def _attention(queries: int, keys: int, *, key_width: int, value_width: int) -> int:
    """Scores, one for each query and key, and the mean of the values that each query takes by them.

    This is 2 N^2 D where N tokens of width D attend to themselves. Projections are counted by `_linear`.
    """
    return queries * keys * (key_width + value_width)


def _block(tokens: int, width: int, *, attn_dim: int, mlp_hidden: int) -> int:
    """A `transformer.Block`: the projections to q, k and v and back, attention, MLP. LayerScale is free."""
    projections = _linear(tokens, width, 3 * attn_dim) + _linear(tokens, attn_dim, width)
    attention = _attention(tokens, tokens, key_width=attn_dim, value_width=attn_dim)
    return projections + attention + _linear(tokens, width, mlp_hidden, width)


def _blocks(tokens: int, config: DeiTConfig | T2TViTConfig) -> int:
    """All blocks of a network whose blocks are alike."""
    return config.depth * _block(
        tokens, config.embed_dim, attn_dim=config.embed_dim, mlp_hidden=int(config.embed_dim * config.mlp_ratio)
    )


# Families


def _deit(config: DeiTConfig) -> int:
    """DeiT and DeiT III: patches, blocks, and one head for each prefix token."""
    patches, prefix = math.prod(config.grid), config.num_prefix_tokens
    embedding = _convolution(patches, config.in_chans, out_chans=config.embed_dim, kernel_size=config.patch_size)
    blocks = _blocks(prefix + patches, config)
    return embedding + blocks + _linear(prefix, config.embed_dim, config.num_classes)


def _t2t_vit(config: T2TViTConfig) -> int:
    """T2T-ViT: two token layers, the projection to tokens, blocks, and the head; a token head reads every patch."""
    patches, dim = math.prod(config.grid), config.token_dim
    layer = _token_performer if config.tokens_type == "performer" else _token_transformer
    # the strides are 4, 2 and 2, so that the first layer has 16 windows for each token of the last, the second 4;
    # cutting windows out copies numbers and is free
    tokens = layer(16 * patches, config.in_chans * 7 * 7, dim=dim) + layer(4 * patches, dim * 3 * 3, dim=dim)
    tokens += _linear(patches, dim * 3 * 3, config.embed_dim)
    blocks = _blocks(1 + patches, config)
    read = 1 + patches if config.token_head else 1
    return tokens + blocks + _linear(read, config.embed_dim, config.num_classes)


def _token_performer(tokens: int, in_dim: int, *, dim: int) -> int:
    """A `t2t_vit.TokenPerformer`, linear in the number of tokens; MLP and output projection keep the width."""
    features = dim // 2
    layers = _linear(tokens, in_dim, 3 * dim) + _linear(tokens, dim, dim) + _linear(tokens, dim, dim, dim)
    # random features of keys and queries; their |x|^2 is an element-wise square and a sum, hence free
    random_features = 2 * _linear(tokens, dim, features)
    # keys with values, queries with that, and queries with the sum of the keys, which is what each row is divided by
    mixing = 2 * tokens * features * dim + tokens * features
    return layers + random_features + mixing


def _token_transformer(tokens: int, in_dim: int, *, dim: int) -> int:
    """A `t2t_vit.TokenTransformer`: full attention with one head; MLP and output projection keep the width."""
    layers = _linear(tokens, in_dim, 3 * dim) + _linear(tokens, dim, dim) + _linear(tokens, dim, dim, dim)
    return layers + _attention(tokens, tokens, key_width=dim, value_width=dim)


def _levit(config: LeViTConfig) -> int:
    """LeViT: the stem, stages of attention and MLP with a shrinking attention between them, and the heads.

    The score biases are looked up and added, which is free; so is the mean over all positions.
    """
    total, last = _levit_stem(config), len(config.embed_dim) - 1
    for stage, depth in enumerate(config.depth):
        total += depth * (_levit_attention(config, stage) + _levit_mlp(config, stage, ratio=config.mlp_ratio))
        if stage < last:
            total += _levit_shrink(config, stage) + _levit_mlp(config, stage + 1, ratio=SHRINK_MLP_RATIO)
    num_heads = 2 if config.distilled else 1
    return total + _linear(num_heads, config.embed_dim[-1], config.num_classes)


def _levit_stem(config: LeViTConfig) -> int:
    """Four 3x3 convolutions of stride 2; the last gives the first stage's map, the others 64, 16 and 4 times it."""
    tokens, dim = math.prod(config.grids[0]), config.embed_dim[0]
    chans = (config.in_chans, dim // 8, dim // 4, dim // 2, dim)
    positions = [tokens * 4**halvings for halvings in (3, 2, 1, 0)]
    return sum(
        _convolution(count, before, out_chans=after, kernel_size=3)
        for count, (before, after) in zip(positions, pairwise(chans), strict=True)
    )


def _levit_attention(config: LeViTConfig, stage: int) -> int:
    """A `levit.Attention`, where values are `attn_ratio` times as wide as keys."""
    tokens, width = math.prod(config.grids[stage]), config.embed_dim[stage]
    keys = config.num_heads[stage] * config.key_dim
    values = config.attn_ratio * keys
    projections = _linear(tokens, width, 2 * keys + values) + _linear(tokens, values, width)
    return projections + _attention(tokens, tokens, key_width=keys, value_width=values)


def _levit_shrink(config: LeViTConfig, stage: int) -> int:
    """A `levit.ShrinkAttention`: every second row and column becomes a query, all are keys and values."""
    tokens, queries = math.prod(config.grids[stage]), math.prod(config.grids[stage + 1])
    width, out_width = config.embed_dim[stage], config.embed_dim[stage + 1]
    keys = width // config.key_dim * config.key_dim  # as many heads as fit
    values = SHRINK_ATTN_RATIO * keys
    projections = _linear(tokens, width, keys + values) + _linear(queries, width, keys)
    projections += _linear(queries, values, out_width)
    return projections + _attention(queries, tokens, key_width=keys, value_width=values)


def _levit_mlp(config: LeViTConfig, stage: int, *, ratio: int) -> int:
    """An MLP on the map of a stage."""
    width = config.embed_dim[stage]
    return _linear(math.prod(config.grids[stage]), width, ratio * width, width)


def _vit_resnas(config: ViTResNASConfig) -> int:
    """ViT-ResNAS: stem, stages whose blocks differ, reductions, and one head for each prefix token.

    The patch head is silent in eval mode, and so not counted; pooling and padding of the residual are free.
    """
    prefix, before, total = config.num_prefix_tokens, 0, _vit_resnas_stem(config)
    for stage, grid in zip(config.stages, config.grids, strict=True):
        patches, dim = math.prod(grid), stage.embed_dim
        if before:
            total += _convolution(patches, before, out_chans=dim, kernel_size=3) + _linear(prefix, before, dim)
        for heads, hidden in zip(stage.num_heads, stage.mlp_hidden, strict=True):
            total += _block(prefix + patches, dim, attn_dim=heads * stage.head_dim, mlp_hidden=hidden)
        before = dim
    return total + _linear(prefix, before, config.num_classes)


def _vit_resnas_stem(config: ViTResNASConfig) -> int:
    """Three convolutions on a map of half the sides, if there are any, then one for each patch."""
    total, chans, side = 0, config.in_chans, config.patch_size
    if config.stem == "conv":
        height, width = config.image_hw
        for before in (chans, config.stem_dim, config.stem_dim):
            total += _convolution(height // 2 * (width // 2), before, out_chans=config.stem_dim, kernel_size=3)
        chans, side = config.stem_dim, side // 2
    dim = config.stages[0].embed_dim
    return total + _convolution(math.prod(config.grids[0]), chans, out_chans=dim, kernel_size=side)


_FAMILIES: dict[type[Any], Callable[[Any], int]] = {
    DeiTConfig: _deit,
    LeViTConfig: _levit,
    T2TViTConfig: _t2t_vit,
    ViTResNASConfig: _vit_resnas,
}
