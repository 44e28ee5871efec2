"""CaiT: image transformers that go deep; patches talk among themselves first, then a class token asks them.

Source: Touvron et al., Going deeper with Image Transformers, 2021, arXiv:2103.17239. `depth` blocks mix the patches,
without a class token; their attention mixes the heads too, before and after the softmax ("talking heads", Shazeer et
al. 2020, arXiv:2003.02436). Then a class token joins, and `depth_token_only` blocks change it alone: it asks the
patches, which stay as they are. Every branch has layer scale.

Published weights were trained with distillation, but there is one head and no distillation token.

Parameters have the authors' names. Reading order: config, the two attentions, their blocks, model, variants; what CaiT
shares with DeiT is in `transformer`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..config import check_positive, check_rates
from ..registry import register_model
from .layers import GridConfig, HeadLogits, init_vit_weights, linear_head
from .transformer import (
    Attention,
    Block,
    PatchEmbed,
    VisionTransformer,
    drop_path_rates,
    make_blocks,
    maps_of,
    scaled,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaiTConfig(GridConfig):
    """Shape of a CaiT. The defaults are CaiT-XXS-24 at 224 pixels; the variants stand below the model.

    Attributes:
        img_size: input height and width in pixels, an int for a square; a multiple of `patch_size`.
        patch_size: side of a square patch in pixels.
        in_chans: input channels.
        num_classes: logits; 0: there is no head, and the model gives features.
        embed_dim: width D of a token; a multiple of `num_heads`.
        depth: number of blocks that mix the patches.
        depth_token_only: number of class blocks after them, at least 1.
        num_heads: attention heads of every block.
        mlp_ratio: hidden width of the MLPs of `blocks` as a multiple of `embed_dim`.
        mlp_ratio_token_only: likewise of the class blocks.
        qkv_bias: whether the query, key and value projections have a bias.
        norm_eps: epsilon of every LayerNorm.
        drop_rate: dropout on tokens, attention output and MLP while training.
        drop_path_rate: stochastic depth, the same in every block that mixes patches; the class blocks have none.
        layer_scale: start value of the learned factors of each residual branch, one a channel.
        dynamic_img_size: accept any multiple of the patch when called, resizing the positions on the fly.
    """

    num_prefix_tokens: ClassVar[int] = 1
    num_prefix_positions: ClassVar[int] = 0

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 24
    depth_token_only: int = 2
    num_heads: int = 4
    mlp_ratio: float = 4.0
    mlp_ratio_token_only: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    layer_scale: float = 1e-5
    dynamic_img_size: bool = False

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming both numbers."""
        check_positive(self, "mlp_ratio")
        check_positive(self, "mlp_ratio_token_only")
        check_positive(self, "layer_scale")
        check_positive(self, "norm_eps", most=0.1)
        check_rates(self, "drop_rate", "drop_path_rate")
        self.check_fields()


class HeadMixer(nn.Module):
    """A linear layer over the heads: (B, heads, N, N) -> (B, heads, N, N), as one matrix product that moves no axis."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        # no nn.Linear: libraries that put other layers in the place of these expect the heads on the last axis
        self.weight = nn.Parameter(torch.empty(num_heads, num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, maps: Tensor) -> Tensor:
        """Mix the heads."""
        weight = self.weight.expand(maps.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, maps.flatten(2)).view_as(maps)


class TalkingHeadAttention(Attention):
    """Self-attention whose heads are mixed before the softmax (`proj_l`) and after it (`proj_w`): (B, N, D) -> same.

    Fused attention kernels cannot do that.
    """

    def __init__(self, dim: int, num_heads: int, *, attn_dim: int, qkv_bias: bool, drop_rate: float) -> None:
        super().__init__(dim, num_heads, attn_dim=attn_dim, qkv_bias=qkv_bias, drop_rate=drop_rate)
        self.proj_l = HeadMixer(num_heads)
        self.proj_w = HeadMixer(num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        query, key, value = self.heads(x)
        shares = self.proj_w(self._probabilities(query, key))
        return self.proj_drop(self.proj((shares @ value).transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor) -> Tensor:
        """The attention probabilities for the same input, (B, heads, N, N); each row sums to 1."""
        return self._probabilities(*self.heads(x)[:2])

    def shares(self, x: Tensor) -> Tensor:
        """The factors of the values: the probabilities after `proj_w`, (B, heads, N, N)."""
        return cast(Tensor, self.proj_w(self.weights(x)))

    def _probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return cast(Tensor, self.proj_l(scores).softmax(dim=-1))


class ClassAttention(Attention):
    """The first token asks all tokens, itself included: (B, 1 + N, D) -> (B, 1, D)."""

    inputs: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, heads, 1, width), key and value (B, heads, 1 + N, width) of every head."""
        found = (self.q(x[:, :1]), self.k(x), self.v(x))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in found)
        return query, key, value


class TalkingHeadBlock(Block):
    """A block that mixes the patches."""

    attention: ClassVar[type[Attention]] = TalkingHeadAttention


class ClassBlock(Block):
    """A block that changes the first token alone: (B, 1 + N, D) -> (B, 1 + N, D). Source: CaiT, section 3."""

    attention: ClassVar[type[Attention]] = ClassAttention

    def forward(self, x: Tensor) -> Tensor:
        """Both residual steps of the class token."""
        token = x[:, :1] + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma_1))
        token = token + self.drop_path(scaled(self.mlp(self.norm2(token)), self.gamma_2))
        return torch.cat([token, x[:, 1:]], dim=1)


class CaiT(VisionTransformer):
    """The model; see the module docstring, and `ImageClassifier.forward` for its result."""

    family: ClassVar[str] = "cait"
    head_names: ClassVar[tuple[str, ...]] = ("head",)
    block_rows: ClassVar[tuple[str, ...]] = ("blocks", "blocks_token_only")

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__(config)
        self.config: CaiTConfig = config
        width, (h, w) = config.embed_dim, config.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, h * w, width))
        self.patch_embed = PatchEmbed(config)
        self.pos_drop = nn.Dropout(config.drop_rate)
        scale, rates = config.layer_scale, drop_path_rates(config.drop_path_rate, config.depth, uniform=True)
        self.blocks = make_blocks(config, rates, layer_scale=scale, kind=TalkingHeadBlock)
        last, rates = replace(config, mlp_ratio=config.mlp_ratio_token_only), [0.0] * config.depth_token_only
        self.blocks_token_only = make_blocks(last, rates, layer_scale=scale, kind=ClassBlock)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = linear_head(width, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, in place: truncated normal with std 0.02 for the token, positions and linear layers."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_vit_weights(self)
        for name, parameter in self.named_parameters():
            if name.endswith((".proj_l.weight", ".proj_w.weight")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif ".gamma_" in name:
                nn.init.constant_(parameter, self.config.layer_scale)

    @property
    def num_block_prefix_tokens(self) -> int:
        """None: the class token joins after `blocks`."""
        return 0

    @property
    def reads_patches(self) -> bool:
        """The class blocks do."""
        return True

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the first block's input: (B, C, H, W) -> (B, N, D). Raises: ConfigError: see `input_grid`."""
        positions = self.positions(self.input_grid(x))
        return self.pos_drop(self.patch_embed(x) + positions)

    def with_class_token(self, patches: Tensor) -> Tensor:
        """The input of the class blocks from the output of `blocks`: (B, N, D) -> (B, 1 + N, D)."""
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)

    def finish(self, tokens: Tensor) -> Tensor:
        """The class blocks and the last LayerNorm: (B, N, D) -> (B, 1 + N, D)."""
        tokens = self.with_class_token(tokens)
        for block in self.blocks_token_only:
            tokens = self.run_layer(block, tokens)
        return self.norm(tokens)

    def classify(self, features: Tensor) -> HeadLogits:
        """Logits from the result of `forward_features`. There is no distillation head."""
        return HeadLogits(self.head(features[:, 0]), None)

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """Attention probabilities of every block in order: (B, heads, N, N) each, of class blocks (B, heads, 1, 1 + N).

        Those of `blocks` are after `proj_l` and before `proj_w`; each row sums to 1.
        """
        tokens, maps = maps_of(self.blocks, self.forward_tokens(x))
        return maps + maps_of(self.blocks_token_only, self.with_class_token(tokens))[1]

    def no_weight_decay(self) -> set[str]:
        """Parameters the authors exclude from weight decay besides biases and norms; `proj_l`, `proj_w` are decayed."""
        return {"pos_embed", "cls_token"}


_XXS24 = CaiTConfig()
_XXS36 = CaiTConfig(depth=36)
_S24 = CaiTConfig(embed_dim=384, num_heads=8)
_M36 = CaiTConfig(embed_dim=768, depth=36, num_heads=16, layer_scale=1e-6)

register_model("cait_xxs24_224", CaiT, _XXS24)
register_model("cait_xxs24_384", CaiT, _XXS24, img_size=384)
register_model("cait_xxs36_224", CaiT, _XXS36)
register_model("cait_xxs36_384", CaiT, _XXS36, img_size=384)
register_model("cait_xs24_384", CaiT, _XXS24, embed_dim=288, num_heads=6, img_size=384)
register_model("cait_s24_224", CaiT, _S24)
register_model("cait_s24_384", CaiT, _S24, img_size=384)
register_model("cait_s36_384", CaiT, _S24, depth=36, layer_scale=1e-6, img_size=384)
register_model("cait_m36_384", CaiT, _M36, img_size=384)
register_model("cait_m48_448", CaiT, _M36, depth=48, img_size=448)
# For 32-pixel data such as CIFAR: about the multiply-accumulates of `deit_micro_patch4_32`.
_MICRO = CaiTConfig(embed_dim=128, depth=6, depth_token_only=1, num_heads=4, img_size=32, patch_size=4, num_classes=10)
register_model("cait_micro_patch4_32", CaiT, _MICRO, layer_scale=0.1)
