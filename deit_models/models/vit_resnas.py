"""ViT-ResNAS: a vision transformer in stages whose widths, heads and depths were found by a search.

Source: Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021, and the authors' published weights.
Four convolutions turn the image into tokens. Plain blocks mix them; between stages a *residual spatial reduction*
halves the grid's sides and widens the tokens. The class token goes through all stages. In training a second head
classifies every patch of the last stage; it learns from images that are mixed patch by patch.

Parameters have the authors' names. Reading order: stages, config, stem, reduction, patch head, model, variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional as F

from ..config import check_fields, check_positive, check_rates, check_sizes, check_total
from ..errors import ConfigError, shown
from ..registry import register_model
from .features import FeatureLevel
from .layers import (
    HeadLogits,
    ImageClassifier,
    ImageSize,
    described,
    fit_channels,
    init_vit_weights,
    linear_head,
    patch_grid,
    resize_pos_embed,
)
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
        """Raise ConfigError for a stage without blocks, or a number that is not a whole one above 0."""
        check_fields(self)
        for name in ("num_heads", "mlp_hidden"):
            check_sizes(self, name, entry="block")
        if not len(self.num_heads) == len(self.mlp_hidden) > 0:
            given = f"num_heads={self.num_heads} and mlp_hidden={self.mlp_hidden}"
            raise ConfigError(f"{given}; expected one of each for every block")


def _stage(embed_dim: int, head_dim: int, num_heads: Sequence[int], mlp_hidden: Sequence[int]) -> Stage:
    return Stage(embed_dim=embed_dim, head_dim=head_dim, num_heads=tuple(num_heads), mlp_hidden=tuple(mlp_hidden))


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTResNASConfig(ImageSize):
    """Shape of a ViT-ResNAS. The defaults are the authors' network without a search, at 224 pixels.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of `size_step`.
        in_chans: input channels.
        num_classes: logits of each head; 0: there are no heads, and the model gives features.
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
        if not isinstance(self.stages, (list, tuple)):
            raise ConfigError(f"stages={shown(self.stages)}; expected a list of tables")
        object.__setattr__(self, "stages", tuple(map(_read_stage, self.stages)))
        check_total("depth", self.depth)
        check_positive(self, "norm_eps", most=0.1)
        check_rates(self, "drop_rate", "drop_path_rate")
        self.check_fields()
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
        return sum(len(stage.num_heads) for stage in self.stages)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and, if distilled, the distillation token."""
        return 2 if self.distilled else 1


def _read_stage(data: Any) -> Stage:
    try:
        return data if isinstance(data, Stage) else Stage(**data)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(Stage))
        raise ConfigError(f"stages: {shown(data)} is no stage ({error}); expected a table with {known}") from error


class StemConv(nn.Module):
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
        width, side, channels = config.stages[0].embed_dim, config.patch_size, config.in_chans
        self.has_convolutions = config.stem == "conv"
        if self.has_convolutions:
            side, channels = side // 2, config.stem_dim
            self.conv1 = StemConv(config.in_chans, config.stem_dim, stride=2)
            self.conv2 = StemConv(config.stem_dim, config.stem_dim)
            self.conv3 = StemConv(config.stem_dim, config.stem_dim)
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
            before = number - 1
            yield SpatialReduction(config, config.stages[before].embed_dim, stage.embed_dim, config.grids[before])
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


class PatchLogits(NamedTuple):
    """Logits of each head, (B, num_classes), of the patch head (B, patches, num_classes); None: no such head."""

    cls: Tensor
    dist: Tensor | None
    patches: Tensor | None


_Targets = Tensor | tuple[Tensor, Tensor]


class PatchTraining:
    """Training of the patch head: its loss, and shifted patch-token mixup where `mix_mode` is "patch".

    Mixing: an image of the first half of a batch gets a box of cells of a random partner in that half, the same box for
    all; a cell is the part of the image under one patch of the last stage, and has the target of its origin. In the
    second half images are mixed as a whole, and each patch has its image's target. All is drawn from torch's global
    generator. Source: the authors' code, section "shifted patch-token mixup" of the paper; the code does not shift.

    Args:
        grid: (height, width) of the last stage in patches.
        mix_mode: another one leaves the mixing to `training`: `mix` is None.
        mixup, cutmix: parameters of the Beta laws for the mixed images and for the boxes.

    Raises: ConfigError: patches to mix that are in no square, or one of the two parameters is 0.
    """

    def __init__(self, grid: tuple[int, int], *, mix_mode: str, mixup: float, cutmix: float) -> None:
        self.side, self.mixup, self.cutmix = grid[0], mixup, cutmix
        self.mix = self._mix if mix_mode == "patch" else None
        if self.mix and grid[0] != grid[1]:
            raise ConfigError(f"mix_mode='patch' needs a square image; this model's patches are {grid[0]}x{grid[1]}")
        if self.mix and not (mixup and cutmix):
            raise ConfigError("mix_mode='patch' mixes both ways; mixup and cutmix must be more than 0")

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, _Targets]:
        """Mix a batch in place; gives it, and the targets of images and patches.

        Shape: (B, 3, H, W) and (B, K) float -> the same (B, 3, H, W), the same (B, K) and (B, P, K).
        """
        patches = targets[:, None].repeat(1, self.side**2, 1)
        half = len(images) // 2
        self._paste(images[:half], targets[:half], patches[:half])
        share = float(Beta(self.mixup, self.mixup).sample())
        partner = torch.randperm(len(images) - half, device=images.device)
        _blend(images[half:], partner, share)
        _blend(targets[half:], partner, share)
        patches[half:] = targets[half:, None]
        return images, (targets, patches)

    def draw_box(self) -> tuple[int, int, int, int]:
        """The cells to paste, as (top, bottom, left, right) with bottom and right excluded; it may be empty."""
        side = self.side
        cells = int(side**2 * float(Beta(self.cutmix, self.cutmix).sample()))
        height = 1 + int(torch.randint(max(1, min(side, cells) - 2), ()))
        width = cells // height
        if width > side:
            height, width = cells // side, side
        # the authors' upper bound is exclusive: a box never touches the last row and column unless it must
        top, left = (int(torch.randint(max(side - size, 1), ())) for size in (height, width))
        return top, top + height, left, left + width

    def _paste(self, images: Tensor, targets: Tensor, patches: Tensor) -> None:
        top, bottom, left, right = self.draw_box()
        partner = torch.randperm(len(images), device=images.device)
        rows, columns = images.shape[-2] // self.side, images.shape[-1] // self.side
        part = (..., slice(top * rows, bottom * rows), slice(left * columns, right * columns))
        images[part] = images[partner][part]
        cells = patches.view(len(patches), self.side, self.side, targets.shape[1])
        cells[:, top:bottom, left:right] = targets[partner][:, None, None]
        _blend(targets, partner, 1 - (bottom - top) * (right - left) / self.side**2)

    def loss(self, logits: PatchLogits, targets: _Targets, label_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Loss of the patch head; without targets of its own a patch has its image's. 0 where the head is not used."""
        if logits.patches is None:
            return logits.cls.new_zeros(())
        wanted = targets[:, None].expand_as(logits.patches) if isinstance(targets, Tensor) else targets[1]
        return label_loss(logits.patches.flatten(0, 1), wanted.flatten(0, 1))


def _blend(values: Tensor, partner: Tensor, share: float) -> None:
    """Mix each entry of a batch with its partner, in place."""
    partners = values[partner]  # a copy, made before the values change
    values.mul_(share).add_(partners, alpha=1 - share)


class ViTResNAS(ImageClassifier):
    """The model; see the module docstring, and `ImageClassifier.forward` for its result."""

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
        self.cls_head = linear_head(last, config.num_classes)
        self.dst_head = linear_head(last, config.num_classes) if config.distilled else None
        self.patch_head = linear_head(last, config.num_classes) if config.patch_head else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, in place: truncated normal with std 0.02 for tokens, positions and linear layers."""
        for name, parameter in self.named_parameters():
            if name == "tokens" or name.endswith("pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)
        init_vit_weights(self)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first block's input: (B, C, H, W) -> (B, P + N, D). Raises: ConfigError: x does not fit."""
        self.check_input(x)
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        return self.pos_drop(torch.cat([tokens, self.patch_embed(x)], dim=1) + self.pos_embed)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's tokens after the last LayerNorm: (B, C, H, W) -> (B, P + N, D); prefix tokens first."""
        return self.norm(self.run_blocks(self.forward_tokens(x)))

    def forward_training(self, x: Tensor) -> PatchLogits:
        """Logits of the heads, and in training mode of the patch head; x is (B, C, H, W)."""
        return self.all_logits(self.forward_features(x))

    def classify(self, features: Tensor) -> HeadLogits:
        """Logits of both heads in any mode from the result of `forward_features`."""
        return HeadLogits(*self.all_logits(features)[:2])

    def all_logits(self, features: Tensor) -> PatchLogits:
        """Logits of the heads, and in training mode of the patch head, from the result of `forward_features`."""
        prefix, head = self.config.num_prefix_tokens, self.patch_head if self.training else None
        dist = None if self.dst_head is None else self.dst_head(features[:, 1])
        return PatchLogits(self.cls_head(features[:, 0]), dist, None if head is None else head(features[:, prefix:]))

    @property
    def patch_classifier(self) -> nn.Module | None:
        """The head that is used in training only."""
        return self.patch_head

    def extra_heads(self, *, mix_mode: str, mixup: float, cutmix: float) -> PatchTraining | None:
        """Training of the patch head, see `training.losses.HasExtraHeads`; None: there is no patch head."""
        if self.patch_head is None:
            return None
        return PatchTraining(self.config.grids[-1], mix_mode=mix_mode, mixup=mixup, cutmix=cutmix)

    @property
    def feature_levels(self) -> list[FeatureLevel]:
        """One after each stage; the final norm is the last one's."""
        config, last = self.config, len(self.blocks) - 1
        ends = [number - 1 for number, layer in enumerate(self.blocks) if isinstance(layer, SpatialReduction)]
        return [
            FeatureLevel(end, stage.embed_dim, config.patch_size << i, has_norm=end == last)
            for i, (end, stage) in enumerate(zip([*ends, last], config.stages, strict=True))
        ]

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """Attention probabilities of every block in order, (B, heads, P + N, P + N) each; each row sums to 1."""
        tokens, maps = self.forward_tokens(x), []
        for layer in self.blocks:
            if isinstance(layer, Block):
                maps.append(layer.attn.weights(layer.norm1(tokens)))
            tokens = layer(tokens)
        return maps

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: ViTResNASConfig) -> ViTResNASConfig:
        """The config of a bare state dict: `config` with its classes, channels and size, and the heads it has."""
        first = next((name for name in state if name.startswith("patch_embed.")), "")
        config = replace(config, distilled="dst_head.weight" in state, patch_head="patch_head.weight" in state)
        found = {"head": state.get("cls_head.weight"), "first": state.get(first), "positions": state.get("pos_embed")}
        return described(config, **found, prefix=1 + config.distilled, grid=config.grids[0], step=config.patch_size)

    def fit_state(self, state: Mapping[str, Tensor], made_for: ViTResNASConfig) -> dict[str, Tensor]:
        """The state with the positions of all stages resized to this model's grids, its first layer to its channels."""
        reductions = [number for number, layer in self.blocks.named_children() if isinstance(layer, SpatialReduction)]
        fitted, first = dict(state), next(name for name in state if name.startswith("patch_embed."))
        fitted[first] = fit_channels(state[first], self.config.in_chans)
        for stage, name in enumerate(["pos_embed", *(f"blocks.{number}.pos_embed" for number in reductions)]):
            prefix = 0 if stage else self.config.num_prefix_tokens
            before, grid = made_for.grids[stage], self.config.grids[stage]
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
for _size in (280, 336, 392):
    register_model(f"vit_resnas_medium_{_size}", ViTResNAS, _RES_TINY, stages=_MEDIUM, img_size=_size)
register_model("vit_resnas_supernet_tiny", ViTResNAS, _RES_TINY, stages=_SUPER_TINY)
register_model("vit_resnas_supernet_small", ViTResNAS, _RES_TINY, stages=_SUPER_SMALL)
register_model("vit_res_micro_patch4_32", ViTResNAS, _RES_MICRO)
register_model("vit_res_mini_patch4_32", ViTResNAS, _RES_MINI)
