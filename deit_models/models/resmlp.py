"""ResMLP: image classifiers of linear layers alone, without attention, positions or normalisation statistics.

Source: Touvron et al., ResMLP: Feedforward networks for image classification with data-efficient training, 2021,
arXiv:2105.03404. Each block has a square matrix over the patches, the same for all channels, and a two-layer MLP over
the channels, the same for all patches. A learned scale and shift of each channel stands where others normalise. The
mean of all patches is classified.

The matrix has a row and a column for each patch, so a trained model has one input size.

Parameters have the authors' names. Reading order: config, parts, model, variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import check_positive, check_rates
from ..errors import ConfigError
from ..registry import register_model
from .features import FeatureLevel
from .layers import (
    DropPath,
    GridConfig,
    HeadLogits,
    ImageClassifier,
    described,
    fit_channels,
    init_vit_weights,
    linear_head,
)
from .transformer import Mlp, PatchEmbed, scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class ResMLPConfig(GridConfig):
    """Shape of a ResMLP. The defaults are ResMLP-12 at 224 pixels; the variants stand below the model.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of `patch_size`.
        patch_size: side of a square patch in pixels.
        in_chans: input channels.
        num_classes: logits; 0: there is no head, and the model gives features.
        embed_dim: width D of a token.
        depth: number of blocks.
        mlp_ratio: hidden width of the MLP over the channels as a multiple of `embed_dim`.
        drop_rate: dropout in that MLP while training.
        drop_path_rate: stochastic depth, the same in every block.
        layer_scale: start value of the learned factors of each residual branch, one a channel.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 384
    depth: int = 12
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    layer_scale: float = 0.1

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming both numbers."""
        check_positive(self, "mlp_ratio")
        check_positive(self, "layer_scale")
        check_rates(self, "drop_rate", "drop_path_rate")
        self.check_fields()


class Affine(nn.Module):
    """alpha * x + beta, each a number for each channel: (B, N, D) -> (B, N, D). Source: ResMLP, equation 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return torch.addcmul(self.beta, self.alpha, x)


class MlpBlock(nn.Module):
    """Patches are mixed, then channels, each result added to its input: (B, N, D) -> (B, N, D).

    Source: ResMLP, equations 2 and 3.
    """

    norm2: Affine | nn.Identity
    gamma_2: nn.Parameter | None

    def __init__(self, config: ResMLPConfig) -> None:
        super().__init__()
        width, (h, w) = config.embed_dim, config.grid
        self.norm1 = Affine(width)
        self.attn = nn.Linear(h * w, h * w)  # over the patches; the authors' name
        self.drop_path = DropPath(config.drop_path_rate)
        self.norm2 = Affine(width)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), drop_rate=config.drop_rate)
        self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Both residual steps."""
        mixed = self.attn(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.drop_path(scaled(mixed, self.gamma_1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))


class ResMLP(ImageClassifier):
    """The model; see the module docstring, and `ImageClassifier.forward` for its result."""

    family: ClassVar[str] = "resmlp"
    head_names: ClassVar[tuple[str, ...]] = ("head",)
    global_pool: ClassVar[str] = "avg"
    level_name: ClassVar[str] = "blocks"

    def __init__(self, config: ResMLPConfig) -> None:
        super().__init__(config)
        self.config: ResMLPConfig = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.Sequential(*(MlpBlock(config) for _ in range(config.depth)))
        self.norm = Affine(config.embed_dim)
        self.head = linear_head(config.embed_dim, config.num_classes)
        init_vit_weights(self)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first block's input: (B, C, H, W) -> (B, N, D), by rows. Raises: ConfigError: x does not fit."""
        self.check_input(x)
        return self.patch_embed(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """All patches after the last scale and shift: (B, C, H, W) -> (B, N, D), row by row."""
        return self.finish(self.run_blocks(self.forward_tokens(x)))

    def classify(self, features: Tensor) -> HeadLogits:
        """Logits from the result of `forward_features`: of the mean of all patches. There is no distillation head."""
        return HeadLogits(self.head(self.pool(features)), None)

    @property
    def feature_levels(self) -> list[FeatureLevel]:
        """One after each block."""
        return [FeatureLevel(i, self.config.embed_dim, self.config.patch_size) for i in range(self.config.depth)]

    def level_grid(self, _x: Tensor, _level: int) -> tuple[int, int]:
        """(height, width) of the input in patches."""
        return self.config.grid

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: ResMLPConfig) -> ResMLPConfig:
        """The config of a bare state dict: `config` with the classes, channels and size of its tensors.

        The size is that of `config` where it fits, else a square.
        """
        return described(
            config,
            head=state.get("head.weight"),
            first=state.get("patch_embed.proj.weight"),
            positions=state.get("blocks.0.attn.weight"),
            prefix=0,
            grid=config.grid,
            step=config.patch_size,
        )

    def fit_state(self, state: Mapping[str, Tensor], made_for: ResMLPConfig) -> dict[str, Tensor]:
        """The state with its first layer fitted to this model's channels.

        Raises: ConfigError: another input size. The authors give no way to resize the matrices over the patches.
        """
        if made_for.grid != self.config.grid:
            ours, theirs = ("x".join(map(str, config.grid)) for config in (self.config, made_for))
            raise ConfigError(
                f"these weights mix {theirs} patches, img_size={self.config.img_size} has {ours}; a trained ResMLP has "
                f"one size: use img_size={made_for.img_size}"
            )
        name = "patch_embed.proj.weight"
        return {**state, name: fit_channels(state[name], self.config.in_chans)}

    def no_weight_decay(self) -> set[str]:
        """None by name: scales, shifts and factors are vectors."""
        return set()


_12 = ResMLPConfig()
_24 = ResMLPConfig(depth=24, layer_scale=1e-5)
_36 = ResMLPConfig(depth=36, layer_scale=1e-6)
_B24 = ResMLPConfig(embed_dim=768, depth=24, patch_size=8, layer_scale=1e-6)

for _training in ("", "_distilled", "_dino"):  # on labels; with a teacher; without labels
    register_model(f"resmlp_12{_training}", ResMLP, _12)
    register_model(f"resmlp_24{_training}", ResMLP, _24)
for _training in ("", "_distilled"):
    register_model(f"resmlp_36{_training}", ResMLP, _36)
    register_model(f"resmlp_b24{_training}", ResMLP, _B24)
register_model("resmlp_b24_in22ft1k", ResMLP, _B24)
# For 32-pixel data such as CIFAR: about the multiply-accumulates of `deit_micro_patch4_32`.
register_model("resmlp_micro_patch4_32", ResMLP, _12, embed_dim=128, depth=9, img_size=32, patch_size=4, num_classes=10)
