"""ViT-ResNAS: a vision transformer in stages whose widths, heads and depths were found by a search.

Source: Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021, and the authors' published weights.
Four convolutions turn the image into tokens. Plain blocks mix them; between stages a *residual spatial reduction*
halves the grid's sides and widens the tokens. The class token goes through all stages. In training a second head
classifies every patch of the last stage; it learns from images that are mixed patch by patch.

A network is a row of `Stage`s: a width, and for each block its heads and the hidden width of its MLP.
`nas.space.stages_of` reads the authors' notation for them.

Parameters carry the authors' names. Reading order: stages, config, stem, reduction, model, variants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import check_positive, check_rates, check_whole
from ..errors import ConfigError
from ..registry import register_model
from .layers import (
    HeadLogits,
    ImageClassifier,
    ImageSize,
    LayerTokens,
    chosen_layers,
    init_vit_weights,
    patch_grid,
    resize_pos_embed,
)
from .patch_training import PatchLogits, PatchMixing, PatchTraining
from .transformer import Block, drop_path_rates

Stem = Literal["conv", "patch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The blocks between two reductions: a common width, and for each block its own heads and MLP.

    Attributes:
        embed_dim: width D of a token.
        head_dim: width of a head; heads * head_dim need not be D.
        num_heads: heads of each block.
        mlp_hidden: hidden width of each block's MLP.
    """

    embed_dim: int
    head_dim: int
    num_heads: tuple[int, ...]
    mlp_hidden: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what is no stage. Raises: ConfigError: it has no blocks, or a number is not a whole one above 0."""
        check_whole(self, "embed_dim", "head_dim")
        for name in ("num_heads", "mlp_hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            values = getattr(self, name)
            if not all(type(value) is int and value > 0 for value in values):
                raise ConfigError(f"{name}={values}; expected whole numbers above 0, one for each block")
        if not len(self.num_heads) == len(self.mlp_hidden) > 0:
            given = f"num_heads={self.num_heads} and mlp_hidden={self.mlp_hidden}"
            raise ConfigError(f"{given}; expected one of each for every block")

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.num_heads)


def _stage(embed_dim: int, head_dim: int, num_heads: Sequence[int], mlp_hidden: Sequence[int]) -> Stage:
    return Stage(embed_dim=embed_dim, head_dim=head_dim, num_heads=tuple(num_heads), mlp_hidden=tuple(mlp_hidden))


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTResNASConfig(ImageSize):
    """Shape of a ViT-ResNAS. The defaults are the authors' network without a search, at 224 pixels.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of `size_step`.
        in_chans: input channels.
        num_classes: logits of each head.
        stages: the stages in order; a list of tables with their fields will do.
        patch_size: pixels along a side that a token of the first stage stands for.
        stem: "conv": three 3x3 convolutions, the first of stride 2, in front of the patches; "patch": none.
        stem_dim: channels of these convolutions.
        qkv_bias: whether the query, key and value projections have a bias.
        norm_eps: epsilon of every LayerNorm.
        distilled: adds the distillation token and its head.
        patch_head: adds the head that classifies every patch in training.
        drop_rate: dropout on tokens, attention output and MLP while training.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
    """

    img_size: int | tuple[int, int] = 224
    in_chans: int = 3
    num_classes: int = 1000
    stages: tuple[Stage, ...] = tuple(_stage(192 * k, 64, [3 * k] * 4, [768 * k] * 4) for k in (1, 2, 4))
    patch_size: int = 14
    stem: Stem = "conv"
    stem_dim: int = 24
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    distilled: bool = False
    patch_head: bool = False
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming both numbers."""
        if isinstance(self.img_size, list):
            object.__setattr__(self, "img_size", tuple(self.img_size))
        object.__setattr__(self, "stages", tuple(map(_read_stage, self.stages)))
        check_whole(self, "in_chans", "num_classes", "patch_size", "stem_dim")
        check_positive(self, "norm_eps")
        check_rates(self, "drop_rate", "drop_path_rate")
        if self.stem not in get_args(Stem):
            raise ConfigError(f"stem={self.stem!r}; expected {' or '.join(map(repr, get_args(Stem)))}")
        if self.stem == "conv" and self.patch_size % 2:
            raise ConfigError(f"patch_size={self.patch_size} is odd; the stem's first convolution halves the image")
        widths = [stage.embed_dim for stage in self.stages]
        if not widths or widths != sorted(widths):
            raise ConfigError(f"stages of widths {widths}; expected one or more, none narrower than the one before")
        patch_grid(self.image_hw, self.size_step, name="size_step")

    @property
    def size_step(self) -> int:
        """Pixels along a side that a token of the last stage stands for, 56 in the published models."""
        return self.patch_size * 2 ** (len(self.stages) - 1)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each stage in tokens: 16, 8 and 4 at 224 pixels."""
        height, width = patch_grid(self.image_hw, self.patch_size)
        return tuple((height >> i, width >> i) for i in range(len(self.stages)))

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return sum(stage.depth for stage in self.stages)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and, if distilled, the distillation token."""
        return 2 if self.distilled else 1


def _read_stage(data: Any) -> Stage:
    try:
        return data if isinstance(data, Stage) else Stage(**data)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(Stage))
        raise ConfigError(f"stages: {data!r} is no stage ({error}); expected a table with {known}") from error


class ConvNorm(nn.Module):
    """A 3x3 convolution without bias, BatchNorm and ReLU: (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, in_chans: int, out_chans: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, cut off below 0."""
        return F.relu(self.bn(self.conv(x)))


class ConvStem(nn.Module):
    """An image to the first stage's patch tokens: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, config: ViTResNASConfig) -> None:
        super().__init__()
        width, side = config.stages[0].embed_dim, config.patch_size
        self.has_convolutions = config.stem == "conv"
        if self.has_convolutions:
            side //= 2
            self.conv1 = ConvNorm(config.in_chans, config.stem_dim, stride=2)
            self.conv2 = ConvNorm(config.stem_dim, config.stem_dim)
            self.conv3 = ConvNorm(config.stem_dim, config.stem_dim)
        channels = config.stem_dim if self.has_convolutions else config.in_chans
        self.conv_proj = nn.Conv2d(channels, width, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the patches of x."""
        if self.has_convolutions:
            x = self.conv1(x)
            x = x + self.conv3(self.conv2(x))
        return self.conv_proj(x).flatten(2).transpose(1, 2)


class SpatialReduction(nn.Module):
    """Residual spatial reduction: half the grid's sides, wider tokens. (B, P + h * w, D) -> (B, P + h * w / 4, D').

    Main path: normalised, then a strided convolution and new positions for the patches, a linear layer for the prefix
    tokens. Residual: the input as it was, patches averaged two by two, padded with zero channels.
    Source: section 3.2 of the paper.
    """

    def __init__(self, config: ViTResNASConfig, in_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prefix, self.grid = config.num_prefix_tokens, grid
        self.norm = nn.LayerNorm(in_dim, eps=config.norm_eps)
        self.patch_reduce = nn.Conv2d(in_dim, out_dim, 3, stride=2, padding=1)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid) // 4, out_dim))
        self.token_transform = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens of the next stage."""
        return self.reduced(self.norm(x)) + self.shortcut(x)

    def reduced(self, x: Tensor) -> Tensor:
        """The main path behind the LayerNorm."""
        tokens, patches = self._parts(x)
        patches = self.patch_reduce(patches).flatten(2).transpose(1, 2) + self.pos_embed
        return torch.cat([self.token_transform(tokens), patches], dim=1)

    def shortcut(self, x: Tensor) -> Tensor:
        """The residual path."""
        tokens, patches = self._parts(x)
        pooled = F.avg_pool2d(patches, 2).flatten(2).transpose(1, 2)
        missing = self.patch_reduce.out_channels - self.patch_reduce.in_channels
        return F.pad(torch.cat([tokens, pooled], dim=1), (0, missing))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, P, D), and patches as a map (B, D, h, w)."""
        tokens, patches = x[:, : self.prefix], x[:, self.prefix :]
        return tokens, patches.transpose(1, 2).reshape(x.shape[0], -1, *self.grid)


def _layers(config: ViTResNASConfig) -> Iterator[nn.Module]:
    """Blocks and reductions in order, as the authors number them."""
    rates = iter(drop_path_rates(config.drop_path_rate, config.depth))
    for number, stage in enumerate(config.stages):
        if number:
            yield SpatialReduction(
                config, config.stages[number - 1].embed_dim, stage.embed_dim, config.grids[number - 1]
            )
        for heads, hidden in zip(stage.num_heads, stage.mlp_hidden, strict=True):
            yield Block(
                stage.embed_dim,
                heads,
                attn_dim=heads * stage.head_dim,
                mlp_hidden=hidden,
                qkv_bias=config.qkv_bias,
                norm_eps=config.norm_eps,
                drop_rate=config.drop_rate,
                drop_path_rate=next(rates),
            )


class ViTResNAS(ImageClassifier):
    """The model; see the module docstring, and `ImageClassifier.forward` for what calling it returns."""

    family: ClassVar[str] = "vit_resnas"
    head_names: ClassVar[tuple[str, ...]] = ("cls_head", "dst_head", "patch_head")

    def __init__(self, config: ViTResNASConfig) -> None:
        super().__init__(config)
        self.config: ViTResNASConfig = config
        prefix, first, last = config.num_prefix_tokens, config.stages[0].embed_dim, config.stages[-1].embed_dim
        self.tokens = nn.Parameter(torch.empty(1, prefix, first))  # order: class, distillation
        self.pos_embed = nn.Parameter(torch.empty(1, prefix + math.prod(config.grids[0]), first))
        self.patch_embed = ConvStem(config)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.blocks = nn.Sequential(*_layers(config))
        self.norm = nn.LayerNorm(last, eps=config.norm_eps)
        self.cls_head = nn.Linear(last, config.num_classes)
        self.dst_head = nn.Linear(last, config.num_classes) if config.distilled else None
        self.patch_head = nn.Linear(last, config.num_classes) if config.patch_head else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, in place: truncated normal with std 0.02 for tokens, positions and linear layers."""
        for name, parameter in self.named_parameters():
            if name == "tokens" or name.endswith("pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)
        init_vit_weights(self)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first block's input: (B, C, H, W) -> (B, P + N, D).

        Raises: ConfigError: x has another size or channel count than the config.
        """
        self.check_input(x)
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        return self.pos_drop(torch.cat([tokens, self.patch_embed(x)], dim=1) + self.pos_embed)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's tokens after the last LayerNorm: (B, C, H, W) -> (B, P + N, D); prefix tokens first."""
        return self.norm(self.blocks(self.forward_tokens(x)))

    def embed(self, x: Tensor) -> Tensor:
        """One vector an image, (B, D): the class token; in distilled models the mean of both tokens."""
        return self.forward_features(x)[:, : self.config.num_prefix_tokens].mean(dim=1)

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """Logits of both heads in any mode; x is (B, C, H, W)."""
        return HeadLogits(*self.classify(self.forward_features(x))[:2])

    def forward_training(self, x: Tensor) -> PatchLogits:
        """Logits of the heads, and in training mode of the patch head; x is (B, C, H, W)."""
        return self.classify(self.forward_features(x))

    def classify(self, features: Tensor) -> PatchLogits:
        """Logits of the heads from the result of `forward_features`."""
        prefix, head = self.config.num_prefix_tokens, self.patch_head if self.training else None
        dist = None if self.dst_head is None else self.dst_head(features[:, 1])
        return PatchLogits(self.cls_head(features[:, 0]), dist, None if head is None else head(features[:, prefix:]))

    def extra_heads(self, *, mix_mode: str, mixup: float, cutmix: float) -> PatchTraining | None:
        """Mixing and loss for the patch head, see `training.losses.HasExtraHeads`; None: there is no patch head.

        Raises: ConfigError: `mix_mode` is "patch", and the grid of patches is not square, or a rate is 0.
        """
        if self.patch_head is None:
            return None
        if mix_mode != "patch":
            return PatchTraining(None)
        height, width = self.config.grids[-1]
        if height != width:
            raise ConfigError(f"mix_mode='patch' needs a square image; this model's patches are {height}x{width}")
        return PatchTraining(PatchMixing(height, mixup=mixup, cutmix=cutmix))

    def get_intermediate_layers(
        self, x: Tensor, layers: int | Sequence[int] = 1, *, norm: bool = True
    ) -> list[LayerTokens]:
        """Tokens after chosen stages, whose maps shrink from stage to stage.

        Args:
            x: images, (B, C, H, W).
            layers: how many of the last stages, or the stages' indices (negative ones count from the end).
            norm: apply the final LayerNorm to the last stage; the others have none.

        Raises: ConfigError: a stage that does not exist.
        """
        wanted = chosen_layers(layers, len(self.config.stages), "stages")
        tokens, ends = self.forward_tokens(x), []
        for layer in self.blocks:
            if isinstance(layer, SpatialReduction):
                ends.append(tokens)
            tokens = layer(tokens)
        ends.append(self.norm(tokens) if norm else tokens)
        prefix, grids = self.config.num_prefix_tokens, self.config.grids
        maps = [end[:, prefix:].mT.reshape(len(end), -1, *grid) for end, grid in zip(ends, grids, strict=True)]
        return [LayerTokens(ends[i][:, :prefix], maps[i]) for i in wanted]

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """Attention probabilities of every block in order.

        Shape: (B, C, H, W) -> one (B, heads, P + N, P + N) each; each row sums to 1.
        """
        tokens, maps = self.forward_tokens(x), []
        for layer in self.blocks:
            if isinstance(layer, Block):
                maps.append(layer.attn.weights(layer.norm1(tokens)))
            tokens = layer(tokens)
        return maps

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: ViTResNASConfig) -> ViTResNASConfig:
        """The config of a bare state dict: `config` with its classes, its square size, and the heads it has."""
        head, pos_embed = state.get("cls_head.weight"), state.get("pos_embed")
        config = replace(config, distilled="dst_head.weight" in state, patch_head="patch_head.weight" in state)
        if head is not None and head.ndim == 2:
            config = replace(config, num_classes=head.shape[0])
        if pos_embed is not None and pos_embed.ndim == 3:
            side = math.isqrt(max(pos_embed.shape[1] - config.num_prefix_tokens, 1))
            config = replace(config, img_size=max(side * config.patch_size // config.size_step, 1) * config.size_step)
        return config

    def fit_state(self, state: Mapping[str, Tensor], made_for: ViTResNASConfig) -> dict[str, Tensor]:
        """The state with the positions of all stages resized to this model's grids."""
        reductions = [number for number, layer in self.blocks.named_children() if isinstance(layer, SpatialReduction)]
        fitted = dict(state)
        for stage, name in enumerate(["pos_embed", *(f"blocks.{number}.pos_embed" for number in reductions)]):
            prefix, before = 0 if stage else self.config.num_prefix_tokens, made_for.grids[stage]
            grid = self.config.grids[stage]
            fitted[name] = resize_pos_embed(state[name], num_prefix=prefix, grid=grid, source_grid=before)
        return fitted

    def no_weight_decay(self) -> set[str]:
        """Parameters the authors exclude from weight decay besides biases and norms; positions are decayed."""
        return {"tokens"}


_RES_TINY = ViTResNASConfig(patch_head=True)
_TINY = (
    _stage(176, 32, (3, 3, 3, 4, 4), (704, 576, 640, 576, 704)),
    _stage(352, 48, (10, 8, 8, 8, 10, 10), (1408, 1408, 1280, 1408, 1280, 1024)),
    _stage(704, 64, (10, 10, 10, 8, 8), (2560, 1792, 2816, 2816, 2560)),
)
_SMALL = (
    _stage(220, 32, (5, 5, 7, 5, 5, 5), (880, 880, 800, 720, 720, 720)),
    _stage(440, 48, (10, 10, 10, 10, 12, 12), (1760, 1440, 1920, 1600, 1600, 1440)),
    _stage(880, 64, (16, 12, 16, 12, 14), (3200, 3200, 2880, 2240, 2560)),
)
_MEDIUM = (
    _stage(240, 32, (7, 6, 7, 8, 7, 8, 6), (960, 960, 800, 960, 880, 880, 800)),
    _stage(640, 48, (10, 14, 14, 16, 14, 16, 16), (1120, 1760, 1920, 1760, 1440, 1760, 1920)),
    _stage(880, 64, (16, 10, 16, 12, 16, 14), (3200, 3840, 3840, 3200, 3520, 3520)),
)
# The largest networks of the two search spaces, whose published weights are the super-networks'.
_SUPER_TINY = tuple(
    _stage(256 * k, d, [heads] * 6, [768 * k] * 6) for k, d, heads in ((1, 32, 6), (2, 48, 12), (4, 64, 12))
)
_SUPER_SMALL = tuple(
    _stage(320 * k, d, [heads] * 7, [960 * k] * 7) for k, d, heads in ((1, 32, 8), (2, 48, 16), (4, 64, 16))
)
# For 32-pixel data such as CIFAR: 64 tokens of 4 pixels, at widths that two CPU cores can train.
_RES_MICRO = ViTResNASConfig(
    img_size=32,
    patch_size=4,
    stem_dim=16,
    num_classes=10,
    stages=tuple(_stage(32 * k, 16, [2 * k] * 3, [128 * k] * 3) for k in (1, 2, 4)),
)
# The same three times as wide: about the multiply-accumulates of `deit_micro_patch4_32`.
_RES_MINI = replace(
    _RES_MICRO, stem_dim=32, stages=tuple(_stage(96 * k, 16, [6 * k] * 3, [384 * k] * 3) for k in (1, 2, 4))
)

register_model("vit_res_tiny", ViTResNAS, _RES_TINY)
register_model("vit_resnas_tiny", ViTResNAS, _RES_TINY, stages=_TINY)
register_model("vit_resnas_small", ViTResNAS, _RES_TINY, stages=_SMALL)
register_model("vit_resnas_medium", ViTResNAS, _RES_TINY, stages=_MEDIUM)
register_model("vit_resnas_medium_280", ViTResNAS, _RES_TINY, stages=_MEDIUM, img_size=280)
register_model("vit_resnas_medium_336", ViTResNAS, _RES_TINY, stages=_MEDIUM, img_size=336)
register_model("vit_resnas_medium_392", ViTResNAS, _RES_TINY, stages=_MEDIUM, img_size=392)
register_model("vit_resnas_supernet_tiny", ViTResNAS, _RES_TINY, stages=_SUPER_TINY)
register_model("vit_resnas_supernet_small", ViTResNAS, _RES_TINY, stages=_SUPER_SMALL)
register_model("vit_res_micro_patch4_32", ViTResNAS, _RES_MICRO)
register_model("vit_res_mini_patch4_32", ViTResNAS, _RES_MINI)
