"""LeViT: a vision transformer built like a convolutional network, for fast inference.

Source: Graham et al., LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference, 2021, arXiv:2104.01136.
Four strided convolutions turn the image into a map of 1/16 its side. Three stages of residual attention and MLP layers
follow; between stages an attention whose queries are every second row and column shrinks the map. There is no class
token and no position embedding: a learned bias for each head and each offset between two positions is added to the
attention scores instead. The mean over all positions is classified, in distilled models by two heads.

Every linear layer has a BatchNorm in the place of a bias; `LeViT.fuse` folds them away for inference.

Parameters have the authors' names. Reading order: config, layers with BatchNorm, attention, model, variants.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..config import check_rates, check_sizes, check_total
from ..errors import ConfigError
from ..registry import register_model
from .features import FeatureLevel
from .layers import (
    DropPath,
    HeadLogits,
    ImageClassifier,
    ImageSize,
    described,
    fit_channels,
    init_vit_weights,
    patch_grid,
)

PATCH_SIZE = 16
"""Pixels along a side that one position of the first stage stands for."""
MOST_OFFSETS = 100_000_000
"""Pairs of positions in the attention of all blocks, at most: each block holds their offsets, eight bytes a pair."""
SHRINK_ATTN_RATIO, SHRINK_MLP_RATIO = 4, 2  # between stages: the same in every published model


@dataclass(frozen=True, slots=True, kw_only=True)
class LeViTConfig(ImageSize):
    """Shape of a LeViT. The defaults are LeViT-128S at 224 pixels; the variants stand below the model.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of 16.
        in_chans: input channels.
        num_classes: logits of each head; 0: there are no heads, and the model gives features.
        embed_dim: width D of a position in each stage; the first is a multiple of 8.
        depth: attention and MLP pairs in each stage.
        num_heads: attention heads in each stage. Between stages there are D / key_dim heads, rounded down.
        key_dim: width of a query and of a key in each head.
        attn_ratio: width of a value, in key widths.
        mlp_ratio: hidden width of the MLP as a multiple of D.
        distilled: adds the distillation head.
        drop_rate: dropout in front of the heads while training.
        drop_path_rate: stochastic depth, the same in every residual branch.
    """

    img_size: int | tuple[int, int] = 224
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: tuple[int, ...] = (128, 256, 384)
    depth: tuple[int, ...] = (2, 3, 4)
    num_heads: tuple[int, ...] = (4, 6, 8)
    key_dim: int = 16
    attn_ratio: int = 2
    mlp_ratio: int = 2
    distilled: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming both numbers."""
        check_rates(self, "drop_rate", "drop_path_rate")
        self.check_fields()
        check_sizes(self, "embed_dim", entry="stage")
        for name in ("depth", "num_heads"):
            check_sizes(self, name, entry="stage", count=len(self.embed_dim))
        if self.embed_dim[0] % 8 or min(self.embed_dim) < self.key_dim:
            needed = f"the first a multiple of 8, none below key_dim={self.key_dim}"
            raise ConfigError(f"embed_dim={self.embed_dim}; expected {needed}")
        patch_grid(self.image_hw, PATCH_SIZE)
        check_total("depth", sum(self.depth))
        if sum(n * (h * w) ** 2 for n, (h, w) in zip(self.depth, self.grids, strict=True)) > MOST_OFFSETS:
            raise ConfigError(f"img_size={self.img_size} is too large for depth={self.depth}; use 768 or less")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the map in each stage: 14, 7 and 4 at 224 pixels."""
        grids = [patch_grid(self.image_hw, PATCH_SIZE)]
        for _ in self.embed_dim[1:]:
            grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
        return tuple(grids)


class ConvNorm(nn.Module):
    """A 3x3 convolution of stride 2 without bias, then BatchNorm: (B, C, H, W) -> (B, C', H / 2, W / 2)."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        return self.bn(self.c(x))


class LinearNorm(nn.Module):
    """A linear layer without bias, then BatchNorm over all positions: (B, N, D) -> (B, N, D')."""

    def __init__(self, in_dim: int, out_dim: int, *, start: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Linear(in_dim, out_dim, bias=False)
        self.bn = nn.BatchNorm1d(out_dim)
        # 0 for the last layer of a residual branch, which then begins as the identity
        nn.init.constant_(self.bn.weight, start)

    def forward(self, x: Tensor) -> Tensor:
        """Transform and normalise each position."""
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).view_as(x)


class NormLinear(nn.Module):
    """A head: BatchNorm, dropout and a linear layer with bias, (B, D) -> (B, num_classes)."""

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(config.embed_dim[-1])
        self.drop = nn.Dropout(config.drop_rate)
        self.l = nn.Linear(config.embed_dim[-1], config.num_classes)
        init_vit_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.l(self.drop(self.bn(x)))


def _head(config: LeViTConfig) -> nn.Module:
    """A head; without classes the features pass through it, as in timm."""
    return NormLinear(config) if config.num_classes else nn.Identity()


def _without_norm(module: ConvNorm | LinearNorm | NormLinear) -> nn.Module:
    """One layer with bias, equal to `module` in eval mode."""
    if isinstance(module, ConvNorm):
        return fuse_conv_bn_eval(module.c, module.bn)
    if isinstance(module, LinearNorm):
        return fuse_linear_bn_eval(module.c, module.bn)
    bn, layer = module.bn, copy.deepcopy(module.l)  # a head: the BatchNorm comes first
    scale = bn.weight / (cast(Tensor, bn.running_var) + bn.eps).sqrt()
    shift = bn.bias - cast(Tensor, bn.running_mean) * scale
    layer.bias = nn.Parameter(layer.bias + layer.weight @ shift)
    layer.weight = nn.Parameter(layer.weight * scale)
    return layer


class ScoredAttention(nn.Module):
    """Base of both attentions: one learned bias for each head and each offset between a query and a key.

    Offsets count without sign: the column of (row offset, column offset) in a map w wide is row * w + column. Queries
    stand on every `stride`-th row and column of the keys' map.
    """

    proj: nn.Sequential
    expanded: Tensor | None

    def __init__(self, config: LeViTConfig, stage: int, *, num_heads: int, stride: int = 1) -> None:
        super().__init__()
        self.stage, self.num_heads, self.key_dim = stage, num_heads, config.key_dim
        height, width = config.grids[stage]
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, height * width))
        # on the CPU also where the parameters are built on the meta device: its values are not in any file
        rows, columns = (torch.arange(side, device="cpu") for side in (height, width))
        offsets = (rows[::stride, None] - rows).abs()[:, None, :, None] * width
        offsets = offsets + (columns[::stride, None] - columns).abs()[None, :, None, :]
        self.register_buffer("offsets", offsets.flatten(2).flatten(0, 1), persistent=False)  # (queries, keys)
        self.register_buffer("expanded", None, persistent=False)

    def score_bias(self) -> Tensor:
        """The bias of the scores, (heads, queries, keys)."""
        if self.expanded is not None:
            return self.expanded
        # index_select is many times faster here than indexing with brackets
        offsets = cast(Tensor, self.offsets)
        return self.attention_biases.index_select(1, offsets.flatten()).view(-1, *offsets.shape)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of each head, (B, heads, queries or keys, width)."""
        raise NotImplementedError

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # written out, since torch's fused attention is slower on a CPU where values are wider than keys
        query, key, value = self.heads(x)
        scores = (query * self.key_dim**-0.5) @ key.transpose(-2, -1)
        return (scores + self.score_bias()).softmax(dim=-1), value

    def weights(self, x: Tensor) -> Tensor:
        """The attention probabilities of the same input, (B, heads, queries, keys); each row sums to 1."""
        return self._attend(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions."""
        probabilities, value = self._attend(x)
        return self.proj((probabilities @ value).transpose(1, 2).flatten(2))


class MapAttention(ScoredAttention):
    """Self-attention over the positions of a map, (B, N, D) -> (B, N, D), with values wider than keys."""

    def __init__(self, config: LeViTConfig, stage: int) -> None:
        heads, width, value_dim = config.num_heads[stage], config.embed_dim[stage], config.attn_ratio * config.key_dim
        super().__init__(config, stage, num_heads=heads)
        # rows head by head, and in each head query, key, value
        self.qkv = LinearNorm(width, heads * (2 * config.key_dim + value_dim))
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(heads * value_dim, width, start=0.0))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        query, key, value = heads.tensor_split((self.key_dim, 2 * self.key_dim), dim=3)
        return query, key, value


class ShrinkAttention(ScoredAttention):
    """Attention from every second row and column to the whole map: (B, h * w, D) -> (B, ceil(h/2) * ceil(w/2), D')."""

    def __init__(self, config: LeViTConfig, stage: int) -> None:
        width, value_dim = config.embed_dim[stage], SHRINK_ATTN_RATIO * config.key_dim
        heads = width // config.key_dim
        super().__init__(config, stage, num_heads=heads, stride=2)
        self.grid = config.grids[stage]
        # rows head by head, and in each head key, value
        self.kv = LinearNorm(width, heads * (config.key_dim + value_dim))
        # the authors number the subsampling too, which has no parameters
        self.q = nn.Sequential(nn.Identity(), LinearNorm(width, heads * config.key_dim))
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(heads * value_dim, config.embed_dim[stage + 1]))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        every_second = x.view(x.shape[0], *self.grid, -1)[:, ::2, ::2].flatten(1, 2)
        query = self.q(every_second).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        heads = self.kv(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key, value = heads.tensor_split((self.key_dim,), dim=3)
        return query, key, value


class Residual(nn.Module):
    """Adds a branch `m` to its input, in training for some samples only."""

    def __init__(self, branch: nn.Module, *, drop_path_rate: float) -> None:
        super().__init__()
        self.m = branch
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """The residual step."""
        return x + self.drop_path(self.m(x))


def _mlp(width: int, ratio: int) -> nn.Sequential:
    """Two linear layers with a Hardswish between, applied to each position."""
    return nn.Sequential(LinearNorm(width, ratio * width), nn.Hardswish(), LinearNorm(ratio * width, width, start=0.0))


def _layers(config: LeViTConfig) -> Iterator[nn.Module]:
    """All stages in one row, as the authors number them."""
    rate = config.drop_path_rate
    for stage, (width, depth) in enumerate(zip(config.embed_dim, config.depth, strict=True)):
        for _ in range(depth):
            yield Residual(MapAttention(config, stage), drop_path_rate=rate)
            yield Residual(_mlp(width, config.mlp_ratio), drop_path_rate=rate)
        if stage + 1 < len(config.embed_dim):
            yield ShrinkAttention(config, stage)
            yield Residual(_mlp(config.embed_dim[stage + 1], SHRINK_MLP_RATIO), drop_path_rate=rate)


def _stem(config: LeViTConfig) -> nn.Sequential:
    """Four strided convolutions: (B, C, H, W) -> (B, D, H / 16, W / 16)."""
    width = config.embed_dim[0]
    chans = (config.in_chans, width // 8, width // 4, width // 2, width)
    convolutions = [ConvNorm(before, after) for before, after in pairwise(chans)]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.Hardswish())]
    return nn.Sequential(*layers[:-1])


class LeViT(ImageClassifier):
    """The model; see the module docstring, and `ImageClassifier.forward` for its result."""

    family: ClassVar[str] = "levit"
    head_names: ClassVar[tuple[str, ...]] = ("head", "head_dist")
    global_pool: ClassVar[str] = "avg"

    def __init__(self, config: LeViTConfig) -> None:
        super().__init__(config)
        self.config: LeViTConfig = config
        self.patch_embed = _stem(config)
        self.blocks = nn.Sequential(*_layers(config))
        self.head = _head(config)
        self.head_dist = _head(config) if config.distilled else None

    @property
    def is_fused(self) -> bool:
        """True for the result of `fuse`."""
        return isinstance(self.patch_embed[0], nn.Conv2d)

    @torch.no_grad()
    def fuse(self) -> LeViT:
        """A copy for inference, in eval mode: no BatchNorm is left, and the score biases are looked up beforehand.

        The logits are the same up to rounding. The copy cannot be trained or saved; keep the model it came from.
        """
        fused = copy.deepcopy(self).eval()
        for parent in list(fused.modules()):
            if isinstance(parent, ScoredAttention):
                parent.expanded = parent.score_bias()
            for name, child in parent.named_children():
                if isinstance(child, (ConvNorm, LinearNorm, NormLinear)):
                    setattr(parent, name, _without_norm(child))
        return fused.requires_grad_(False)

    def train(self, mode: bool = True) -> LeViT:
        """Switch between training and eval mode. Raises: ConfigError: training a fused model."""
        if mode and self.is_fused:
            raise ConfigError("a fused LeViT has no BatchNorm left to train; train the model it was made from")
        return super().train(mode)

    def reset_heads(self) -> None:
        """Give the heads fresh weights and fresh BatchNorm statistics, in place."""
        super().reset_heads()
        for head in (self.head, self.head_dist):
            if isinstance(head, NormLinear):
                head.bn.reset_parameters()

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first stage's input: (B, C, H, W) -> (B, N, D), by rows. Raises: ConfigError: x does not fit."""
        self.check_input(x)
        return self.patch_embed(x).flatten(2).transpose(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """All positions after the last stage: (B, C, H, W) -> (B, N, D), row by row."""
        return self.run_blocks(self.forward_tokens(x))

    def classify(self, features: Tensor) -> HeadLogits:
        """Logits of both heads in any mode from the result of `forward_features`."""
        pooled = self.pool(features)
        return HeadLogits(self.head(pooled), None if self.head_dist is None else self.head_dist(pooled))

    @property
    def feature_levels(self) -> list[FeatureLevel]:
        """One after each stage; there is no final norm."""
        ends = [number - 1 for number, layer in enumerate(self.blocks) if isinstance(layer, ShrinkAttention)]
        stages = zip([*ends, len(self.blocks) - 1], self.config.embed_dim, strict=True)
        return [FeatureLevel(end, width, PATCH_SIZE << i, has_norm=False) for i, (end, width) in enumerate(stages)]

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """Probabilities of every attention in order, (B, heads, queries, keys) each; each row sums to 1."""
        tokens, maps = self.forward_tokens(x), []
        for layer in self.blocks:
            attention = layer.m if isinstance(layer, Residual) else layer
            if isinstance(attention, ScoredAttention):
                maps.append(attention.weights(tokens))
            tokens = layer(tokens)
        return maps

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: LeViTConfig) -> LeViTConfig:
        """The config of a bare state dict: `config` with the classes, channels and size of its tensors.

        The size is that of `config` where it fits, else a square.
        """
        return described(
            config,
            head=state.get("head.l.weight"),
            first=state.get("patch_embed.0.c.weight"),
            positions=state.get("blocks.0.m.attention_biases"),
            prefix=0,
            grid=config.grids[0],
            step=PATCH_SIZE,
        )

    def fit_state(self, state: Mapping[str, Tensor], made_for: LeViTConfig) -> dict[str, Tensor]:
        """The state with its score biases resized to this model's maps, and its first layer fitted to its channels.

        An offset keeps its share of the map: 0 stays 0 and the largest becomes the largest, with bicubic values
        between. The paper has no other sizes; this is what position embeddings of the other families do.
        """
        first = "patch_embed.0.c.weight"
        fitted = {**state, first: fit_channels(state[first], self.config.in_chans)}
        for prefix, module in self.named_modules():
            if isinstance(module, ScoredAttention):
                name, stage = f"{prefix}.attention_biases", module.stage
                fitted[name] = _resize_biases(state[name], made_for.grids[stage], self.config.grids[stage])
        return fitted

    def no_weight_decay(self) -> set[str]:
        """Parameters the authors exclude from weight decay besides biases and norms: all score biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}


def _resize_biases(biases: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Score biases by offset, (heads, h * w), for another map."""
    if before == after:
        return biases
    image = biases.float().reshape(1, -1, *before)
    return F.interpolate(image, size=after, mode="bicubic", align_corners=True)[0].flatten(1).to(biases.dtype)


_DEEP = LeViTConfig(depth=(4, 4, 4), key_dim=32)

register_model("levit_128s", LeViT, LeViTConfig())
register_model("levit_128", LeViT, LeViTConfig(depth=(4, 4, 4), num_heads=(4, 8, 12)))
register_model("levit_192", LeViT, _DEEP, embed_dim=(192, 288, 384), num_heads=(3, 5, 6))
register_model("levit_256", LeViT, _DEEP, embed_dim=(256, 384, 512), num_heads=(4, 6, 8))
register_model("levit_384", LeViT, _DEEP, embed_dim=(384, 512, 768), num_heads=(6, 9, 12))
# For CIFAR's images enlarged to 128 pixels: about the multiply-accumulates of `deit_micro_patch4_32`.
_MICRO = LeViTConfig(embed_dim=(128, 192, 256), depth=(3, 4, 4), img_size=128, num_classes=10)
register_model("levit_micro_cifar10", LeViT, _MICRO)
