"""The plain pre-norm transformer of DeiT, DeiT III and T2T-ViT; CaiT builds on it, others use its parts.

Reading order: patches, attention, MLP, block, and `VisionTransformer`: the model from its tokens on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .features import FeatureLevel
from .layers import DropPath, ImageClassifier, described, fit_channels, is_symbolic, patch_grid, resize_pos_embed


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each linearly: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the patches of x."""
        return self.proj(x).flatten(2).transpose(1, 2)


_MOST_PLAIN = 256
"""Tokens up to which the scores are stored for the backward pass: 12 blocks of 6 heads take 9 MB an image."""


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(query key^T * scale) value, (B, heads, N, width) -> same; the scale is width ** -0.5 by default.

    torch's own kernel, except for training in bfloat16 on a CPU: with its backward pass, it is slower there than two
    products and a softmax. `benchmarks/training.py` measures whole steps with them.
    """
    trained = not is_symbolic(query) and torch.is_grad_enabled() and query.requires_grad
    if trained and query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] <= _MOST_PLAIN:
        scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
        return scores.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (B, N, D) -> (B, N, D), with one fused projection for q, k and v.

    `attn_dim` is the width of all heads together; the scale is the width of one head ** -0.5.
    """

    inputs: ClassVar[tuple[str, ...]] = ("qkv",)
    """The layers that read the tokens."""
    qkv: nn.Linear

    def __init__(self, dim: int, num_heads: int, *, attn_dim: int, qkv_bias: bool, drop_rate: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        for name in self.inputs:
            setattr(self, name, nn.Linear(dim, 3 * attn_dim // len(self.inputs), bias=qkv_bias))
        self.proj = nn.Linear(attn_dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of every head, each (B, heads, N, width of a head)."""
        # (B, N, 3 * attn_dim) -> three times (B, heads, N, width): rows of the weight are q, k, v, each head by head
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        mixed = attention(*self.heads(x))
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor) -> Tensor:
        """The attention probabilities for the same input, (B, heads, N, N); each row sums to 1."""
        query, key, _ = self.heads(x)
        return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, applied to each token: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden: int, *, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input. (B, N, D) -> (B, N, D).

    With `layer_scale` each branch is multiplied by one learned factor a channel, which starts at that value, so that a
    deep model begins near the identity. Source: Touvron et al., Going deeper with image transformers, 2021.
    `attn_dim` is the width of all heads together, by default D; `drop_path_rate` is the stochastic depth of both
    branches; the other numbers are explained at `DeiTConfig`.
    """

    attention: ClassVar[type[Attention]] = Attention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_hidden: int,
        qkv_bias: bool,
        norm_eps: float,
        attn_dim: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = self.attention(dim, num_heads, attn_dim=attn_dim or dim, qkv_bias=qkv_bias, drop_rate=drop_rate)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_hidden, drop_rate=drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Both residual steps."""
        x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma_1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))


def scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    """A branch times its factors, if the block has layer scale."""
    return branch if gamma is None else branch * gamma


def make_blocks(
    config: Any, rates: Iterable[float], *, layer_scale: float = 0.0, kind: type[Block] = Block
) -> nn.Sequential:
    """One block for each rate of stochastic depth, from the fields of a family's config."""
    return nn.Sequential(
        *(
            kind(
                config.embed_dim,
                config.num_heads,
                mlp_hidden=int(config.embed_dim * config.mlp_ratio),
                qkv_bias=config.qkv_bias,
                norm_eps=config.norm_eps,
                drop_rate=config.drop_rate,
                drop_path_rate=rate,
                layer_scale=layer_scale,
            )
            for rate in rates
        )
    )


def maps_of(blocks: Iterable[nn.Module], tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Tokens after a row of blocks, and each block's attention probabilities, (B, heads, queries, keys)."""
    maps = []
    for block in cast("Iterable[Block]", blocks):
        maps.append(block.attn.weights(block.norm1(tokens)))
        tokens = block(tokens)
    return tokens, maps


def drop_path_rates(rate: float, depth: int, *, uniform: bool = False) -> list[float]:
    """Stochastic depth of each block: growing linearly from 0 to `rate` at the last, or `rate` everywhere."""
    return [rate if uniform else rate * i / max(depth - 1, 1) for i in range(depth)]


class VisionTransformer(ImageClassifier):
    """Base of models that are tokens, blocks, a LayerNorm and linear heads: the part behind the tokens.

    A family defines `forward_tokens` and `classify`, and registers `pos_embed` (1, positions, D), `pos_drop`,
    `blocks`, `norm` and `head`. Its config has `in_chans`, `image_hw`, `patch_size`, `grid`, `depth`,
    `num_prefix_tokens`, `num_prefix_positions` and `dynamic_img_size`.
    """

    level_name: ClassVar[str] = "blocks"
    pos_embed: Tensor
    pos_drop: nn.Dropout
    norm: nn.LayerNorm

    @property
    def reads_patches(self) -> bool:
        """Whether something after `blocks` reads the patches, besides the prefix tokens."""
        return bool(getattr(self.config, "token_head", False))

    def input_grid(self, x: Tensor) -> tuple[int, int]:
        """The (h, w) in patches of a batch of images. Raises: ConfigError: the model does not take them."""
        config = self.config
        if is_symbolic(x):
            return cast("tuple[int, int]", config.grid)
        if x.ndim != 4 or x.shape[1] != config.in_chans:
            raise ConfigError(f"input of shape {tuple(x.shape)}; expected (B, {config.in_chans}, H, W)")
        height, width = config.image_hw
        if (x.shape[2], x.shape[3]) == (height, width):
            return cast("tuple[int, int]", config.grid)
        if not config.dynamic_img_size:
            raise ConfigError(
                f"input of {x.shape[2]}x{x.shape[3]} pixels; this model takes {height}x{width}. "
                f"Pass img_size=... when building or loading it, or dynamic_img_size=True for any size"
            )
        return patch_grid((x.shape[2], x.shape[3]), config.patch_size)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings for a grid of patches, (1, positions, D)."""
        prefix, own = self.config.num_prefix_positions, self.config.grid
        if grid == own:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, num_prefix=prefix, grid=grid, source_grid=own)

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last LayerNorm: (B, C, H, W) -> (B, P + N, D); prefix tokens first, then patches."""
        return self.finish(self.run_blocks(self.forward_tokens(x)))

    @property
    def feature_levels(self) -> list[FeatureLevel]:
        """One after each block."""
        return [FeatureLevel(i, self.config.embed_dim, self.config.patch_size) for i in range(self.config.depth)]

    def level_grid(self, x: Tensor, _level: int) -> tuple[int, int]:
        """The (h, w) of images x in patches."""
        return self.input_grid(x)

    def attention_maps(self, x: Tensor) -> Tensor | list[Tensor]:
        """Attention probabilities of every block: (B, C, H, W) -> (depth, B, heads, P + N, P + N)."""
        return torch.stack(maps_of(self.blocks, self.forward_tokens(x))[1])

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: Any) -> Any:
        """The config of a bare state dict: `config` with the classes, channels and size of its tensors.

        The size is that of `config` where it fits, else a square.
        """
        return described(
            config,
            head=state.get("head.weight"),
            first=state.get("patch_embed.proj.weight"),
            positions=state.get("pos_embed"),
            prefix=config.num_prefix_positions,
            grid=config.grid,
            step=config.patch_size,
        )

    def fit_state(self, state: Mapping[str, Tensor], made_for: Any) -> dict[str, Tensor]:
        """The state with its positions resized to this model's grid, and the patch projection to its channels."""
        prefix, grid = self.config.num_prefix_positions, self.config.grid
        pos_embed = resize_pos_embed(state["pos_embed"], num_prefix=prefix, grid=grid, source_grid=made_for.grid)
        first = "patch_embed.proj.weight"  # T2T-ViT has another one
        fitted = {first: fit_channels(state[first], self.config.in_chans)} if first in state else {}
        return {**state, **fitted, "pos_embed": pos_embed}
