"""DeiT: vision transformers trained on ImageNet-1k alone, optionally distilled through a second token.

Source: Touvron et al., Training data-efficient image transformers & distillation through attention, 2021,
arXiv:2012.12877. An image is cut into patches; each becomes a token; a class token (and, in distilled models, a
distillation token that learns from a teacher) is put in front; `depth` identical pre-norm blocks mix them; a linear
head reads the class token, another one the distillation token.

Parameters carry the authors' names, which timm kept. Reading order: config, patches, attention, block, model, variants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import check_positive, check_rates, check_whole
from ..errors import ConfigError
from ..registry import register_model
from .layers import DropPath, HeadLogits, ImageClassifier, LayerTokens, init_vit_weights, resize_pos_embed


@dataclass(frozen=True, slots=True, kw_only=True)
class DeiTConfig:
    """Everything that shapes a DeiT. The defaults are DeiT-B at 224 pixels; the variants stand below the model.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of `patch_size`.
        patch_size: side of a square patch in pixels.
        in_chans: input channels.
        num_classes: logits of each head.
        embed_dim: width D of a token; a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP as a multiple of `embed_dim`.
        qkv_bias: whether the query, key and value projections have a bias.
        norm_eps: epsilon of every LayerNorm.
        distilled: adds the distillation token and its head.
        drop_rate: dropout on tokens, attention output and MLP while training.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        dynamic_img_size: accept any multiple of the patch when called, resizing the positions on the fly.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    distilled: bool = False
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    dynamic_img_size: bool = False

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming both numbers."""
        if isinstance(self.img_size, list):
            object.__setattr__(self, "img_size", tuple(self.img_size))
        check_whole(self, "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads")
        check_positive(self, "mlp_ratio", "norm_eps")
        check_rates(self, "drop_rate", "drop_path_rate")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}")
        patch_grid(self.image_hw, self.patch_size)

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the input in patches."""
        return patch_grid(self.image_hw, self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and, if distilled, the distillation token."""
        return 2 if self.distilled else 1


def patch_grid(image_hw: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches along (height, width).

    Raises: ConfigError: a side is not a positive multiple of the patch.
    """
    if len(image_hw) != 2 or not all(isinstance(side, int) for side in image_hw):
        raise ConfigError(f"img_size={image_hw} is neither a whole number nor (height, width)")
    for side in image_hw:
        if side < patch_size or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            raise ConfigError(
                f"img_size={side} is not a multiple of patch_size={patch_size}; use {below} or {below + patch_size}"
            )
    return image_hw[0] // patch_size, image_hw[1] // patch_size


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each linearly: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the patches of x."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (B, N, D) -> (B, N, D), with one fused projection for q, k and v."""

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.proj_drop = nn.Dropout(config.drop_rate)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # (B, N, 3 * D) -> three times (B, heads, N, D / heads): rows of the weight are q, k, v, heads contiguous
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens; the scale is (D / heads) ** -0.5, torch's default."""
        mixed = F.scaled_dot_product_attention(*self._heads(x))
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor) -> Tensor:
        """The attention probabilities of the same input, (B, heads, N, N); each row sums to 1."""
        query, key, _ = self._heads(x)
        return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, applied to each token: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input. (B, N, D) -> (B, N, D)."""

    def __init__(self, config: DeiTConfig, *, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Both residual steps."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _drop_path_rates(config: DeiTConfig) -> list[float]:
    """Of each block: from 0 at the first, growing linearly to `drop_path_rate` at the last."""
    return [config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth)]


class DeiT(ImageClassifier):
    """The model; see the module docstring, and `ImageClassifier.forward` for what calling it returns."""

    family: ClassVar[str] = "deit"
    head_names: ClassVar[tuple[str, ...]] = ("head", "head_dist")

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__(config)
        self.config: DeiTConfig = config
        width, (h, w) = config.embed_dim, config.grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        # order: class, distillation, patches
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_prefix_tokens + h * w, width))
        # after pos_embed, as the authors register it: optimizer states of their checkpoints count parameters in order
        self.dist_token = nn.Parameter(torch.empty(1, 1, width)) if config.distilled else None
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.blocks = nn.Sequential(*(Block(config, drop_path_rate=rate) for rate in _drop_path_rates(config)))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.num_classes)
        self.head_dist = nn.Linear(width, config.num_classes) if config.distilled else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, in place: truncated normal with std 0.02 for tokens, positions and linear layers."""
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        init_vit_weights(self)

    @property
    def num_layers(self) -> int:
        return self.config.depth + 1

    def layer_of(self, name: str) -> int:
        top, _, rest = name.partition(".")
        if top == "blocks":
            return 1 + int(rest.partition(".")[0])
        return self.num_layers if top in ("norm", *self.head_names) else 0

    def set_drop_rates(self, *, drop_rate: float, drop_path_rate: float) -> None:
        """Change dropout and stochastic depth in place; see `DeiTConfig` for what the rates mean.

        Raises: ConfigError: a rate that is no probability below 1.
        """
        self.config = replace(self.config, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = drop_rate
        for block, rate in zip(self.blocks, _drop_path_rates(self.config), strict=True):
            cast(Block, block).drop_path.rate = rate

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first block's input: (B, C, H, W) -> (B, P + N, D).

        Raises: ConfigError: x has another size or channel count than the config, see `dynamic_img_size`.
        """
        grid = self._input_grid(x)
        tokens: list[Tensor] = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        prefix = torch.cat(tokens, dim=1).expand(x.shape[0], -1, -1)
        pos_embed = resize_pos_embed(
            self.pos_embed, num_prefix=self.config.num_prefix_tokens, grid=grid, source_grid=self.config.grid
        )
        return self.pos_drop(torch.cat([prefix, self.patch_embed(x)], dim=1) + pos_embed)

    def _input_grid(self, x: Tensor) -> tuple[int, int]:
        expected = (self.config.in_chans, *self.config.image_hw)
        if x.ndim != 4 or x.shape[1] != expected[0]:
            raise ConfigError(f"input of shape {tuple(x.shape)}; expected (B, {expected[0]}, H, W)")
        if tuple(x.shape[1:]) == expected:
            return self.config.grid
        if not self.config.dynamic_img_size:
            raise ConfigError(
                f"input of {x.shape[2]}x{x.shape[3]} pixels; this model takes {expected[1]}x{expected[2]}. "
                f"Pass img_size=... when building or loading it, or dynamic_img_size=True for any size"
            )
        return patch_grid((x.shape[2], x.shape[3]), self.config.patch_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last LayerNorm: (B, C, H, W) -> (B, P + N, D); class, distillation, patches."""
        return self.norm(self.blocks(self.forward_tokens(x)))

    def embed(self, x: Tensor) -> Tensor:
        """One vector an image, (B, D): the class token; in distilled models the mean of both tokens, as in timm."""
        return self.forward_features(x)[:, : self.config.num_prefix_tokens].mean(dim=1)

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """Logits of both heads, whatever the mode; x is (B, C, H, W)."""
        features = self.forward_features(x)
        dist = None if self.head_dist is None else self.head_dist(features[:, 1])
        return HeadLogits(self.head(features[:, 0]), dist)

    def get_intermediate_layers(
        self, x: Tensor, layers: int | Sequence[int] = 1, *, norm: bool = True
    ) -> list[LayerTokens]:
        """Tokens after chosen blocks, for dense tasks and probes.

        Args:
            x: images, (B, C, H, W).
            layers: how many of the last blocks, or the blocks' indices (negative ones count from the end).
            norm: apply the final LayerNorm to each, as DINO does.

        Raises: ConfigError: a block that does not exist.
        """
        depth = self.config.depth
        lowest, indices = (0, range(depth - layers, depth)) if isinstance(layers, int) else (-depth, layers)
        if not indices or not all(lowest <= i < depth for i in indices):
            raise ConfigError(f"layers={layers}; this model has blocks 0 to {depth - 1}")
        wanted = [i % depth for i in indices]
        grid, prefix = self._input_grid(x), self.config.num_prefix_tokens
        tokens, collected = self.forward_tokens(x), {}
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in wanted:
                out = self.norm(tokens) if norm else tokens
                collected[i] = LayerTokens(out[:, :prefix], out[:, prefix:].transpose(1, 2).unflatten(2, grid))
        return [collected[i] for i in wanted]

    def attention_maps(self, x: Tensor) -> Tensor:
        """Attention probabilities of every block: (B, C, H, W) -> (depth, B, heads, P + N, P + N)."""
        tokens, maps = self.forward_tokens(x), []
        for block in cast("Iterable[Block]", self.blocks):
            maps.append(block.attn.weights(block.norm1(tokens)))
            tokens = block(tokens)
        return torch.stack(maps)

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: DeiTConfig) -> DeiTConfig:
        """The config of a bare state dict: `config` with the number of classes and the square size of its tensors."""
        head, pos_embed = state.get("head.weight"), state.get("pos_embed")
        if head is not None and head.ndim == 2:
            config = replace(config, num_classes=head.shape[0])
        if pos_embed is not None and pos_embed.ndim == 3:
            side = math.isqrt(max(pos_embed.shape[1] - config.num_prefix_tokens, 1))
            config = replace(config, img_size=side * config.patch_size)
        return config

    def fit_state(self, state: Mapping[str, Tensor], made_for: DeiTConfig) -> dict[str, Tensor]:
        """The state with its positions resized to this model's grid."""
        prefix, grid = self.config.num_prefix_tokens, self.config.grid
        pos_embed = resize_pos_embed(state["pos_embed"], num_prefix=prefix, grid=grid, source_grid=made_for.grid)
        return {**state, "pos_embed": pos_embed}

    def no_weight_decay(self) -> set[str]:
        """Parameters the authors exclude from weight decay besides biases and norms.

        `dist_token` is not among them: the authors decay it, and so do we.
        """
        return {"pos_embed", "cls_token"}


_TINY = DeiTConfig(embed_dim=192, num_heads=3)
_SMALL = DeiTConfig(embed_dim=384, num_heads=6)
_BASE = DeiTConfig(embed_dim=768, num_heads=12)
# For 32-pixel data such as CIFAR: 64 patches of 4 pixels, at a width that two CPU cores can train.
_MICRO = DeiTConfig(embed_dim=128, depth=6, num_heads=2, img_size=32, patch_size=4, num_classes=10)

register_model("deit_tiny_patch16_224", DeiT, _TINY)
register_model("deit_small_patch16_224", DeiT, _SMALL)
register_model("deit_base_patch16_224", DeiT, _BASE)
register_model("deit_base_patch16_384", DeiT, _BASE, img_size=384)
register_model("deit_tiny_distilled_patch16_224", DeiT, _TINY, distilled=True)
register_model("deit_small_distilled_patch16_224", DeiT, _SMALL, distilled=True)
register_model("deit_base_distilled_patch16_224", DeiT, _BASE, distilled=True)
register_model("deit_base_distilled_patch16_384", DeiT, _BASE, distilled=True, img_size=384)

register_model("deit_tiny_patch4_32", DeiT, _TINY, img_size=32, patch_size=4, num_classes=10)
register_model("deit_tiny_distilled_patch4_32", DeiT, _TINY, img_size=32, patch_size=4, num_classes=10, distilled=True)
register_model("deit_micro_patch4_32", DeiT, _MICRO)
register_model("deit_micro_distilled_patch4_32", DeiT, _MICRO, distilled=True)
