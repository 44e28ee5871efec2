"""T2T-ViT: images become tokens in three overlapping steps; each step joins neighbouring tokens.

Source: Yuan et al., Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet, 2021, arXiv:2101.11986.
The image is unfolded into overlapping windows; an attention layer mixes the windows; the result is laid out as a map
and unfolded again, twice; a linear layer makes tokens of what remains, one for 16x16 pixels. A class token is put in
front, a fixed sinusoidal table gives positions, and plain pre-norm blocks follow, narrower and deeper than DeiT's.

Both attentions have the scale that published weights were trained and scored with: (D / heads) ** -0.5 in the blocks,
input width ** -0.5 in the "transformer" token layer. The authors' constructors set another one, D ** -0.5, for
`pretrained=True`, which their training and evaluation never use.

Parameters have the authors' names. Reading order: config, token layers, tokens-to-token module, positions, model,
variants; the blocks are in `transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import check_positive, check_rates
from ..errors import ConfigError
from ..registry import register_model
from .layers import GridConfig, HeadLogits, fit_channels, init_vit_weights, linear_head
from .transformer import Mlp, VisionTransformer, attention, drop_path_rates, make_blocks

WINDOW = 7 * 7
"""Pixels of a window of the first step."""
# Cancels out, exactly: a power of two. onnxscript 0.7 takes x + 1e-8 for x + 0, and a file would give NaN for 0 / 0
_FEATURE_SCALE = 2.0**10
TokensType = Literal["performer", "transformer"]
PosResize = Literal["interpolate", "recompute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class T2TViTConfig(GridConfig):
    """Shape of a T2T-ViT. The defaults are T2T-ViT-14 at 224 pixels; the variants stand below the model.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of 16.
        in_chans: input channels.
        num_classes: logits; 0: there are no heads, and the model gives features.
        tokens_type: attention of the tokens-to-token module: "performer" (random features, linear in the number of
            tokens) or "transformer" (full attention over all 56 * 56 windows of a 224-pixel image).
        token_dim: width of the tokens-to-token module.
        embed_dim: width D of a token; even, and a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP as a multiple of `embed_dim`.
        qkv_bias: whether the blocks' query, key and value projections have a bias.
        norm_eps: epsilon of every LayerNorm.
        token_head: adds a second head on the patch tokens (models trained with token labelling).
        token_drop_rate: dropout inside the Performer layers while training.
        drop_rate: dropout on tokens, attention output and MLP while training.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        pos_resize: positions for another size: "interpolate" the table, as the authors' transfer script does, or
            "recompute" the sinusoid, as a model that is built for that size starts with.
        dynamic_img_size: accept any multiple of 16 when called, resizing the positions on the fly.
    """

    patch_size: ClassVar[int] = 16  # type: ignore[misc]  # no field here
    """Pixels a token's side stands for: the strides 4, 2 and 2 of the three steps."""
    num_prefix_tokens: ClassVar[int] = 1
    num_prefix_positions: ClassVar[int] = 1

    img_size: int | tuple[int, int] = 224
    in_chans: int = 3
    num_classes: int = 1000
    tokens_type: TokensType = "performer"
    token_dim: int = 64
    embed_dim: int = 384
    depth: int = 14
    num_heads: int = 6
    mlp_ratio: float = 3.0
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    token_head: bool = False
    token_drop_rate: float = 0.1
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    pos_resize: PosResize = "interpolate"
    dynamic_img_size: bool = False

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming both numbers."""
        check_positive(self, "mlp_ratio")
        check_positive(self, "norm_eps", most=0.1)
        check_rates(self, "token_drop_rate", "drop_rate", "drop_path_rate")
        self.check_fields()
        for name, choices in (("tokens_type", get_args(TokensType)), ("pos_resize", get_args(PosResize))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}; expected {' or '.join(map(repr, choices))}")
        for name in ("embed_dim", "token_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(f"{name}={getattr(self, name)} is odd; positions and random features come in pairs")


@torch.fx.wrap  # one node in a graph of torch.fx, which would leave autocast's switch out
def performer_attention(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """Mix the values by random features, see `TokenPerformer`: three times (B, T, D) -> (B, T, D), w (m, D)."""
    # In float32 also under autocast: 1e-8 is zero in fp16, |x|^2 and exp overflow there from 256 and 11 on, and
    # bf16 rounds the exponent by whole units. This is where the original's NaN comes from.
    # The meta device has no autocast to switch off, and a test for that would break a compiled graph
    with torch.autocast("cpu" if query.is_meta else query.device.type, enabled=False):
        key, query = _features(key, w), _features(query, w)
        norm = query @ key.sum(dim=1).unsqueeze(-1)
        mixed = query @ (key.transpose(1, 2) @ value.float())
        return (mixed / (norm + 1e-8 * _FEATURE_SCALE**2)).to(value.dtype)


def _features(x: Tensor, w: Tensor) -> Tensor:
    x, w = x.float(), w.float()
    return torch.exp(x @ w.T - x.square().sum(dim=-1, keepdim=True) / 2) * (w.shape[0] ** -0.5 * _FEATURE_SCALE)


class TokenPerformer(nn.Module):
    """Attention layer in linear time by random features: (B, T, input width) -> (B, T, token width).

    softmax(q k) is approximated by phi(q) . phi(k) with phi(x) = exp(w x - |x|^2 / 2) / sqrt(m), of which w is fixed.
    The skip connection starts at the values, because the widths differ.
    Source: Choromanski et al., Rethinking attention with Performers, 2021; T2T-ViT, section 3.1, and the authors' code.
    """

    def __init__(self, input_dim: int, config: T2TViTConfig) -> None:
        super().__init__()
        dim = config.token_dim
        # frozen, and a parameter as in the authors' code, where it counts as one
        self.w = nn.Parameter(torch.empty(dim // 2, dim), requires_grad=False)
        self.kqv = nn.Linear(input_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(input_dim, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        drop = config.token_drop_rate
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(drop))
        self.proj_drop = nn.Dropout(drop)

    def reset_parameters(self) -> None:
        """Draw the random features, in place: orthogonal rows of norm sqrt(m)."""
        nn.init.orthogonal_(self.w, gain=self.w.shape[0] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of x."""
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # in this order, as the weights have it
        x = value + self.proj_drop(self.proj(performer_attention(query, key, value, self.w)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Full single-head attention from one width to another: (B, T, input width) -> (B, T, token width).

    The scale is input width ** -0.5, which is not that of the projected queries; published weights expect it.
    """

    def __init__(self, input_dim: int, dim: int) -> None:
        super().__init__()
        self.scale = input_dim**-0.5
        self.qkv = nn.Linear(input_dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens; the skip connection starts at the values."""
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        mixed = attention(query, key, value, scale=self.scale)
        return (value + self.proj(mixed)).squeeze(1)


class TokenTransformer(nn.Module):
    """Attention layer with full attention: (B, T, input width) -> (B, T, token width)."""

    def __init__(self, input_dim: int, config: T2TViTConfig) -> None:
        super().__init__()
        dim = config.token_dim
        self.norm1 = nn.LayerNorm(input_dim, eps=config.norm_eps)
        self.attn = TokenAttention(input_dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of x."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """An image to tokens in three soft splits: (B, C, H, W) -> (B, H / 16 * W / 16, D), row by row."""

    def __init__(self, config: T2TViTConfig) -> None:
        super().__init__()
        layer = TokenPerformer if config.tokens_type == "performer" else TokenTransformer
        self.attention1 = layer(config.in_chans * WINDOW, config)
        self.attention2 = layer(config.token_dim * 3 * 3, config)
        self.project = nn.Linear(config.token_dim * 3 * 3, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the images x."""
        height, width = x.shape[2], x.shape[3]
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).transpose(1, 2))
        x = self.attention2(_resplit(x, height // 4, width // 4))
        return self.project(_resplit(x, height // 8, width // 8))


def _resplit(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens laid out as a map and cut into overlapping 3x3 windows: (B, h * w, C) -> (B, h / 2 * w / 2, 9 * C)."""
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
    return F.unfold(image, 3, stride=2, padding=1).transpose(1, 2)


def _fitted_channels(state: Mapping[str, Tensor], config: T2TViTConfig) -> dict[str, Tensor]:
    """The tensors of the first layer that see the image, for other channels.

    Each window is normalised as a whole: the norm takes the mean of the channels, the projection their sum. The scale
    of the attention hangs on the width of a window: the queries make up for it.
    """
    fitted: dict[str, Tensor] = {}
    for name in ("norm1.weight", "norm1.bias", "kqv.weight", "attn.qkv.weight"):
        full = f"tokens_to_token.attention1.{name}"
        if full in state:
            tensor = state[full]
            before = tensor.shape[-1] // WINDOW
            weight = fit_channels(tensor.view(-1, before, WINDOW), config.in_chans)
            if name.startswith("norm1"):
                weight = weight * (config.in_chans / before)
            fitted[full] = weight.flatten(1) if tensor.ndim == 2 else weight.flatten()
            if name == "attn.qkv.weight":
                query = torch.ones(3, 1, 1, dtype=weight.dtype, device=weight.device)
                query[0] = (config.in_chans / before) ** 0.5
                fitted[full] = (fitted[full].view(3, -1, fitted[full].shape[1]) * query).flatten(0, 1)
    return fitted


def sinusoid(count: int, dim: int, *, device: torch.device | str | None = None) -> Tensor:
    """Fixed positions, (1, count, dim): sin(p / 10000 ** (2i / dim)) in column 2i, the cosine in column 2i + 1.

    Computed in float64, given in float32. Source: Vaswani et al. 2017; position 0 is the class token's.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    angles = torch.arange(count, dtype=torch.float64, device=device).unsqueeze(1) / 10000**steps
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).unsqueeze(0).float()


class T2TViT(VisionTransformer):
    """The model; see the module docstring, and `ImageClassifier.forward` for its result."""

    family: ClassVar[str] = "t2t_vit"
    head_names: ClassVar[tuple[str, ...]] = ("head", "aux_head")

    def __init__(self, config: T2TViTConfig) -> None:
        super().__init__(config)
        self.config: T2TViTConfig = config
        width, (h, w) = config.embed_dim, config.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        # a table, frozen, and a parameter as in the authors' code, where it counts as one
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + h * w, width), requires_grad=False)
        self.tokens_to_token = TokensToToken(config)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.blocks = make_blocks(config, drop_path_rates(config.drop_path_rate, config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = linear_head(width, config.num_classes)
        self.aux_head = nn.Linear(width, config.num_classes) if config.token_head and config.num_classes else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, in place: truncated normal with std 0.02; orthogonal features; sinusoidal positions."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        init_vit_weights(self)
        for module in self.modules():
            if isinstance(module, TokenPerformer):
                module.reset_parameters()
        self.reset_positions()

    def reset_positions(self) -> None:
        """Put the sinusoid of the model's own size into its position table, in place; undoes an interpolation."""
        # float64, which some accelerators lack, on the CPU
        device = "meta" if self.pos_embed.is_meta else "cpu"
        with torch.no_grad():
            self.pos_embed.copy_(sinusoid(*self.pos_embed.shape[1:], device=device))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings for a grid of tokens, (1, 1 + N, D); see `T2TViTConfig.pos_resize`."""
        if self.config.pos_resize == "recompute" and grid != self.config.grid:
            table = sinusoid(1 + grid[0] * grid[1], self.config.embed_dim)
            return table.to(device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        return super().positions(grid)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first block's input: (B, C, H, W) -> (B, 1 + N, D). Raises: ConfigError: see `input_grid`."""
        positions = self.positions(self.input_grid(x))
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        return self.pos_drop(torch.cat([cls_token, self.run_layer(self.tokens_to_token, x)], dim=1) + positions)

    def classify(self, features: Tensor) -> HeadLogits:
        """Logits from the result of `forward_features`. There is no distillation head.

        With a token head: the class token's logits, and half of the largest over the patches. Source: Jiang et al., All
        tokens matter: token labeling for training better vision transformers, 2021; the authors' evaluation.
        """
        logits = self.head(features[:, 0])
        if self.aux_head is not None:
            logits = logits + 0.5 * self.aux_head(features[:, 1:]).amax(dim=1)
        return HeadLogits(logits, None)

    def classify_prefix(self, features: Tensor) -> HeadLogits:
        """The class token's logits alone, which token labelling trains."""
        return HeadLogits(self.head(features[:, 0]), None)

    @property
    def patch_classifier(self) -> nn.Module | None:
        """The head of models trained with token labelling."""
        return self.aux_head

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: Any) -> Any:
        """The config of a bare state dict: `config` with the classes, channels and size of its tensors."""
        norm = state.get("tokens_to_token.attention1.norm1.weight")
        if norm is not None and norm.numel() >= WINDOW:
            config = replace(config, in_chans=norm.numel() // WINDOW)
        return super().describe_state(state, config)

    def fit_state(self, state: Mapping[str, Tensor], made_for: Any) -> dict[str, Tensor]:
        """The state with its positions brought to this model's grid, and its first layer to its channels.

        For positions see `T2TViTConfig.pos_resize`.
        """
        if made_for.in_chans != self.config.in_chans:
            state = {**state, **_fitted_channels(state, self.config)}
        if self.config.pos_resize == "recompute" and made_for.grid != self.config.grid:
            table = sinusoid(*self.pos_embed.shape[1:], device=state["pos_embed"].device)
            return {**state, "pos_embed": table.to(state["pos_embed"].dtype)}
        return super().fit_state(state, made_for)

    def no_weight_decay(self) -> set[str]:
        """Parameters the authors exclude from weight decay besides biases and norms; positions are not trained."""
        return {"cls_token"}


_LITE = T2TViTConfig(embed_dim=256, num_heads=4, mlp_ratio=2.0)
_14 = T2TViTConfig()
_19 = T2TViTConfig(embed_dim=448, num_heads=7, depth=19)
_24 = T2TViTConfig(embed_dim=512, num_heads=8, depth=24)

register_model("t2t_vit_7", T2TViT, _LITE, depth=7)
register_model("t2t_vit_10", T2TViT, _LITE, depth=10)
register_model("t2t_vit_12", T2TViT, _LITE, depth=12)
register_model("t2t_vit_14", T2TViT, _14)
register_model("t2t_vit_14_384", T2TViT, _14, img_size=384)
register_model("t2t_vit_19", T2TViT, _19)
register_model("t2t_vit_24", T2TViT, _24)
register_model("t2t_vit_24_token_labeling", T2TViT, _24, token_head=True)
register_model("t2t_vit_t_14", T2TViT, _14, tokens_type="transformer")
register_model("t2t_vit_t_19", T2TViT, _19, tokens_type="transformer")
register_model("t2t_vit_t_24", T2TViT, _24, tokens_type="transformer")
register_model("t2t_vit_14_resnext", T2TViT, _14, num_heads=32)
register_model("t2t_vit_14_wide", T2TViT, _14, embed_dim=768, num_heads=12, depth=4)
# Fine-tuned by the authors on CIFAR, whose images they enlarge to 224 pixels.
register_model("t2t_vit_14_cifar10", T2TViT, _14, num_classes=10)
register_model("t2t_vit_14_cifar100", T2TViT, _14, num_classes=100)
register_model("t2t_vit_19_cifar10", T2TViT, _19, num_classes=10)
register_model("t2t_vit_19_cifar100", T2TViT, _19, num_classes=100)
# For CIFAR's images enlarged to 128 pixels: about the multiply-accumulates of `deit_micro_patch4_32`.
_MICRO = T2TViTConfig(embed_dim=128, depth=4, num_heads=2, token_dim=36, img_size=128, num_classes=10)
register_model("t2t_vit_micro_cifar10", T2TViT, _MICRO)
