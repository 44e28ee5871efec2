"""DeiT: vision transformers trained on ImageNet-1k alone, optionally distilled through a second token; and DeiT III.

Source: Touvron et al., Training data-efficient image transformers & distillation through attention, 2021,
arXiv:2012.12877. An image is cut into patches; each becomes a token. A class token is put in front, in distilled models
also a distillation token, which learns from a teacher. `depth` identical pre-norm blocks mix the tokens. A linear head
classifies the class token, another one the distillation token.

DeiT III (Touvron et al., DeiT III: Revenge of the ViT, 2022, arXiv:2204.07118) is the same network with three settings
changed: `layer_scale`, no positions for the class token, and the same stochastic depth in every block.

The backbones of DINO (Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294)
are plain DeiTs without a head, trained without labels: `model(x)` is the class token after the last LayerNorm.

Parameters have the authors' names. Reading order: config, patches, model, variants; the blocks are in `transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..config import check_positive, check_rates
from ..errors import ConfigError
from ..registry import register_model
from .layers import GridConfig, HeadLogits, init_vit_weights, linear_head
from .transformer import PatchEmbed, VisionTransformer, drop_path_rates, make_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class DeiTConfig(GridConfig):
    """Shape of a DeiT. The defaults are DeiT-B at 224 pixels; the variants stand below the model.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of `patch_size`.
        patch_size: side of a square patch in pixels.
        in_chans: input channels.
        num_classes: logits of each head; 0: there are no heads, and the model gives features.
        embed_dim: width D of a token; a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP as a multiple of `embed_dim`.
        qkv_bias: whether the query, key and value projections have a bias.
        norm_eps: epsilon of every LayerNorm.
        distilled: adds the distillation token and its head; "token": the token alone, as transformers'
            DeiTForImageClassification has it.
        drop_rate: dropout on tokens, attention output and MLP while training.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        drop_path_uniform: the same stochastic depth in every block instead.
        patch_drop_rate: share of an image's patches left out while training, others for each image.
        layer_scale: start value of the learned factors of each residual branch, one a channel; 0: there are none.
        prefix_positions: whether the class and distillation token have position embeddings, as the patches do.
        dynamic_img_size: accept any multiple of the patch when called, resizing the positions on the fly.
    """

    added: ClassVar[frozenset[str]] = frozenset(
        ("layer_scale", "prefix_positions", "drop_path_uniform", "patch_drop_rate")
    )
    """Fields that files of older versions lack; their defaults change nothing."""

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
    distilled: bool | Literal["token"] = False
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_uniform: bool = False
    patch_drop_rate: float = 0.0
    layer_scale: float = 0.0
    prefix_positions: bool = True
    dynamic_img_size: bool = False

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming both numbers."""
        check_positive(self, "mlp_ratio")
        check_positive(self, "norm_eps", most=0.1)
        check_rates(self, "drop_rate", "drop_path_rate", "patch_drop_rate")
        self.check_fields()
        if self.layer_scale:
            check_positive(self, "layer_scale")
        if self.distilled not in (True, False, "token"):
            raise ConfigError(f"distilled={self.distilled!r}; expected True, False or 'token'")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and, if distilled, the distillation token."""
        return 2 if self.distilled else 1

    @property
    def num_prefix_positions(self) -> int:
        """Position embeddings in front of the patches'."""
        return self.num_prefix_tokens if self.prefix_positions else 0


@torch.fx.wrap  # one node in a graph of torch.fx, which knows no number of patches
def keep_patches(tokens: Tensor, rate: float, num_prefix: int) -> Tensor:
    """Leave out patches at random, see `PatchDropout`; the others are in random order, with their positions added."""
    patches = tokens[:, num_prefix:]
    batch, count, width = patches.shape
    kept = max(int(count * (1 - rate)), 1)
    chosen = torch.rand(batch, count, device=tokens.device).argsort(dim=1)[:, :kept, None]
    return torch.cat([tokens[:, :num_prefix], patches.gather(1, chosen.expand(-1, -1, width))], dim=1)


class PatchDropout(nn.Module):
    """In training, keep a random part of each image's patches; the first `num_prefix` tokens always stay.

    Shape: (B, P + N, D) -> (B, P + kept, D), kept = N * (1 - rate) rounded down, at least 1; unchanged in eval mode.
    Source: Liu et al., PatchDropout, 2023, arXiv:2208.07220.
    """

    def __init__(self, rate: float, *, num_prefix: int) -> None:
        super().__init__()
        self.rate, self.num_prefix = rate, num_prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """Drop tokens."""
        return keep_patches(tokens, self.rate, self.num_prefix) if self.rate and self.training else tokens

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate:g}"


class DeiT(VisionTransformer):
    """The model; see the module docstring, and `ImageClassifier.forward` for its result."""

    family: ClassVar[str] = "deit"
    head_names: ClassVar[tuple[str, ...]] = ("head", "head_dist")

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__(config)
        self.config: DeiTConfig = config
        width, (h, w) = config.embed_dim, config.grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        # order: class, distillation, patches
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_prefix_positions + h * w, width))
        # after pos_embed, as the authors register it: optimizer states of their checkpoints count parameters in order
        self.dist_token = nn.Parameter(torch.empty(1, 1, width)) if config.distilled else None
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.patch_drop = PatchDropout(config.patch_drop_rate, num_prefix=config.num_prefix_tokens)
        rates = drop_path_rates(config.drop_path_rate, config.depth, uniform=config.drop_path_uniform)
        self.blocks = make_blocks(config, rates, layer_scale=config.layer_scale)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = linear_head(width, config.num_classes)
        self.head_dist = linear_head(width, config.num_classes) if config.distilled is True else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, in place: truncated normal with std 0.02 for tokens, positions and linear layers."""
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        init_vit_weights(self)
        for name, parameter in self.blocks.named_parameters():
            if ".gamma_" in name:
                nn.init.constant_(parameter, self.config.layer_scale)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first block's input: (B, C, H, W) -> (B, P + N, D). Raises: ConfigError: see `input_grid`."""
        positions = self.positions(self.input_grid(x))
        tokens: list[Tensor] = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        prefix, patches = torch.cat(tokens, dim=1).expand(x.shape[0], -1, -1), self.patch_embed(x)
        if self.config.prefix_positions:
            return self.pos_drop(torch.cat([prefix, patches], dim=1) + positions)
        return self.pos_drop(torch.cat([prefix, patches + positions], dim=1))

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the last LayerNorm, prefix tokens first: (B, C, H, W) -> (B, P + N, D)."""
        return self.norm(self.run_blocks(self.patch_drop(self.forward_tokens(x))))

    def classify(self, features: Tensor) -> HeadLogits:
        """Logits of both heads in any mode from the result of `forward_features`."""
        dist = None if self.head_dist is None else self.head_dist(features[:, 1])
        return HeadLogits(self.head(features[:, 0]), dist)

    def fit_state(self, state: Mapping[str, Tensor], made_for: Any) -> dict[str, Tensor]:
        """The state fitted to this model's grid, channels and tokens.

        A distillation token that the state lacks starts as the class token, with its position and its head: the model
        answers nearly as before. One that this model lacks is left out.
        """
        fitted = dict(state)
        if self.config.num_prefix_tokens < made_for.num_prefix_tokens:
            fitted = {name: state[name] for name in state if not name.startswith(("dist_token", "head_dist."))}
        elif self.config.num_prefix_tokens > made_for.num_prefix_tokens:
            fitted["dist_token"] = state["cls_token"].clone()
            fitted |= {f"head_dist.{w}": state[f"head.{w}"].clone() for w in ("weight", "bias") if f"head.{w}" in state}
        before, after = made_for.num_prefix_positions, self.config.num_prefix_positions
        if before != after:
            rows = [0] * after + list(range(before, state["pos_embed"].shape[1]))
            fitted["pos_embed"] = state["pos_embed"][:, rows]
        return super().fit_state(fitted, made_for)

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
register_model("deit_tiny_distilled_patch8_64", DeiT, _TINY, img_size=64, patch_size=8, num_classes=200, distilled=True)
register_model("deit_micro_patch4_32", DeiT, _MICRO)
register_model("deit_micro_distilled_patch4_32", DeiT, _MICRO, distilled=True)

# DeiT III; the layer scale starts at the authors' 1e-4, in timm's copies at 1e-6.
_BASE3 = replace(_BASE, layer_scale=1e-4, prefix_positions=False, drop_path_uniform=True)
_SMALL3 = replace(_BASE3, embed_dim=384, num_heads=6)
_MEDIUM3 = replace(_BASE3, embed_dim=512, num_heads=8)
_LARGE3 = replace(_BASE3, embed_dim=1024, num_heads=16, depth=24)
_HUGE3 = replace(_BASE3, embed_dim=1280, num_heads=16, depth=32, patch_size=14)

for _training in ("", "_in21ft1k"):  # on ImageNet-1k; on ImageNet-21k, and then fine-tuned on ImageNet-1k
    register_model(f"deit3_small_patch16_224{_training}", DeiT, _SMALL3)
    register_model(f"deit3_small_patch16_384{_training}", DeiT, _SMALL3, img_size=384)
    register_model(f"deit3_medium_patch16_224{_training}", DeiT, _MEDIUM3)
    register_model(f"deit3_base_patch16_224{_training}", DeiT, _BASE3)
    register_model(f"deit3_base_patch16_384{_training}", DeiT, _BASE3, img_size=384)
    register_model(f"deit3_large_patch16_224{_training}", DeiT, _LARGE3)
    register_model(f"deit3_large_patch16_384{_training}", DeiT, _LARGE3, img_size=384)
    register_model(f"deit3_huge_patch14_224{_training}", DeiT, _HUGE3)

# DINO. At another size, positions are resized as DeiT's; DINO's code gives bicubic a scale factor instead.
register_model("dino_vits16", DeiT, _SMALL, num_classes=0)
register_model("dino_vits8", DeiT, _SMALL, num_classes=0, patch_size=8)
register_model("dino_vitb16", DeiT, _BASE, num_classes=0)
register_model("dino_vitb8", DeiT, _BASE, num_classes=0, patch_size=8)
