"""A model as it goes out: one network for inference, from images to final logits, with all folded that folds exactly.

What is folded gives the same logits up to rounding, and every fold has a test that says so:

- LeViT's BatchNorms and score biases (`LeViT.fuse`).
- DeiT III's layer scale, into the linear layer before it.
- Scale and shift of the LayerNorms in transformer blocks, into the linear layer behind each.
- The last block of a model whose heads read the prefix tokens alone: only their rows are computed. At 197 tokens that
  saves five sixths of one block in twelve.
- On request the normalisation of the pixels: into DeiT's patch projection; in front of the other families, whose first
  layer pads with zeros that mean something else before the normalisation than after it.

Merging tokens, on request, is no fold: it gives other logits, see `merging`.
"""
# MERGED """Fewer tokens from block to block: those most alike become one, which counts for as many as it holds. Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461, written from the paper's text; no code of its authors was used. Other than the folds of `prepared` this changes the answers: not training, but a check on images decides whether they stay good enough. Reading order: the plan (how many tokens a block merges), the pairs, the merge, the blocks. """

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import Preprocessing
from ..errors import ConfigError
from ..models.deit import DeiT
from ..models.layers import ImageClassifier
from ..models.levit import LeViT
from ..models.transformer import Block, VisionTransformer, scaled

TokenMerging = int | Sequence[int]
"""Tokens that every block merges, or those of each block in turn; 0 merges none."""


def decreasing(r: int, depth: int) -> tuple[int, ...]:
    """A plan that starts with 2 * r tokens and falls linearly to 0 at the last block: r a block on average.

    Source: section 3 of the paper. Rounded so that the first blocks together are never off by more than half a token.
    """
    falling = [2 * r * (1 - i / (depth - 1)) if depth > 1 else float(r) for i in range(depth)]
    totals = [round(sum(falling[:i])) for i in range(depth + 1)]
    return tuple(after - before for before, after in pairwise(totals))


def merging_plan(model: ImageClassifier, token_merging: TokenMerging) -> tuple[int, ...]:
    """The tokens that each block is to merge; empty if none does.

    Raises: ConfigError: a model whose tokens cannot be merged, a negative number, a plan for another number of blocks.
    """
    plan = (token_merging,) if isinstance(token_merging, int) else tuple(token_merging)
    if any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in plan):
        raise ConfigError(f"token_merging={token_merging!r}; expected a whole number from 0, or one for each block")
    if not any(plan):
        return ()
    token_head = getattr(model.config, "token_head", False)
    if token_head or not isinstance(model, VisionTransformer):
        reads = "has a head that reads every patch" if token_head else "needs its tokens on a grid"
        raise ConfigError(
            f"token_merging={token_merging!r}: {type(model).__name__} {reads}; expected DeiT, DeiT III or T2T-ViT "
            "whose heads read the prefix tokens alone, or token_merging=0"
        )
    depth = len(model.blocks)
    if isinstance(token_merging, int):
        return plan * depth
    if len(plan) != depth:
        raise ConfigError(f"token_merging has {len(plan)} numbers; this model has {depth} blocks, one for each")
    return plan


class Pairs(NamedTuple):
    """Which tokens go where. Past the prefix, tokens are counted in turns: first, second, first, second, ...

    Attributes:
        num_prefix: tokens in front that are left alone.
        kept: the first tokens that stay, by their place among the first, in order: (B, F - r).
        gone: the first tokens that are merged away, likewise: (B, r).
        into: 1 where a second token takes one of those in, else 0: (B, S, r) float32.
    """

    num_prefix: int
    kept: Tensor
    gone: Tensor
    into: Tensor


def match_tokens(keys: Tensor, r: int, *, num_prefix: int = 0) -> Pairs:
    """The r pairs most alike of a first and a second token, every first token with the second most like it.

    Shape: (B, P + N, D), what tokens are compared by; r is at most N // 2.
    Source: section 3 of the paper, "bipartite soft matching"; likeness is the cosine of the angle.
    """
    # in float32 always: half precision would not tell the last pair that is merged from the first that is not
    unit = F.normalize(keys.float(), dim=-1)
    first, second = _in_turns(unit, num_prefix)
    likeness, partner = (first @ second.transpose(1, 2)).max(dim=2)
    order = likeness.argsort(dim=1, descending=True)
    # in order, or a difference in rounding would decide which tokens are first and second at the next merge
    gone, kept = order[:, :r], order[:, r:].sort(dim=1).values
    seconds = torch.arange(second.shape[1], device=keys.device)
    into = (partner.gather(1, gone)[:, None] == seconds[:, None]).float()
    return Pairs(num_prefix, kept, gone, into)


def merge_tokens(tokens: Tensor, sizes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Means of the tokens that belong together, weighted by size, and the sums of their sizes.

    Shape: (B, P + N, D) and (B, P + N, 1) float32 -> the same with r tokens fewer: prefix, first tokens, second tokens.
    """
    first, second = _in_turns(tokens, pairs.num_prefix)
    first_sizes, second_sizes = _in_turns(sizes, pairs.num_prefix)
    gone_sizes = _at(first_sizes, pairs.gone)
    # products with zeros and ones, not a scatter: every backend has them, and adds in the same order
    merged_sizes = second_sizes + pairs.into @ gone_sizes
    share = pairs.into * gone_sizes.transpose(1, 2) / merged_sizes
    merged = second * (second_sizes / merged_sizes).to(tokens.dtype)
    merged = merged + share.to(tokens.dtype) @ _at(first, pairs.gone)
    return (
        torch.cat([tokens[:, : pairs.num_prefix], _at(first, pairs.kept), merged], dim=1),
        torch.cat([sizes[:, : pairs.num_prefix], _at(first_sizes, pairs.kept), merged_sizes], dim=1),
    )


def _in_turns(x: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    return x[:, num_prefix::2], x[:, num_prefix + 1 :: 2]


def _at(x: Tensor, index: Tensor) -> Tensor:
    """The rows of each item: (B, N, D) at (B, n) -> (B, n, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def log_sizes(sizes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to attention logits so that a key counts once for every token in it: (B, N, 1) -> (B, 1, 1, N).

    Source: equation 1 of the paper, "proportional attention".
    """
    return None if sizes is None else sizes.log().to(dtype).transpose(1, 2).unsqueeze(1)


class MergingBlock(nn.Module):
    """A block that merges tokens between attention and MLP, in eval mode: (B, P + N, D) -> (B, P + N - r, D).

    Takes and gives the sizes too, (B, P + N, 1); None while every token is one patch. At most half of the N go.
    """

    def __init__(self, block: Block, r: int, num_prefix: int) -> None:
        super().__init__()
        self.r, self.num_prefix = r, num_prefix
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.gamma_1, self.gamma_2 = block.gamma_1, block.gamma_2

    def forward(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both residual steps."""
        query, key, value = self.attn.heads(self.norm1(x))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=log_sizes(sizes, x.dtype))
        x = x + scaled(self.attn.proj(mixed.transpose(1, 2).flatten(2)), self.gamma_1)
        r = min(self.r, (x.shape[1] - self.num_prefix) // 2)
        if r:
            sizes = torch.ones_like(x[..., :1], dtype=torch.float32) if sizes is None else sizes
            x, sizes = merge_tokens(x, sizes, match_tokens(key.mean(dim=1), r, num_prefix=self.num_prefix))
        return x + scaled(self.mlp(self.norm2(x)), self.gamma_2), sizes


class MergingBlocks(nn.Module):
    """All blocks of a network in turn: (B, P + N, D) -> (B, P + fewer, D).

    A last block that computes the prefix alone has no tokens to merge; it is given the sizes.
    """

    def __init__(self, blocks: nn.Sequential, plan: Sequence[int], num_prefix: int) -> None:
        super().__init__()
        whole = [block for block in blocks if isinstance(block, Block)]
        self.merging = nn.ModuleList(MergingBlock(b, r, num_prefix) for b, r in zip(whole, plan, strict=False))
        self.last = None if len(whole) == len(blocks) else blocks[-1]

    def forward(self, x: Tensor) -> Tensor:
        """The tokens after the last block."""
        sizes: Tensor | None = None
        for block in self.merging:
            x, sizes = block(x, sizes)
        return x if self.last is None else cast(Tensor, self.last(x, log_sizes(sizes, x.dtype)))


class Prepared(nn.Module):
    """A network in eval mode and what comes before and after it: (B, C, H, W) -> (B, num_classes) float32.

    Attributes:
        network: what computes the logits.
        pixels: whether the input is pixels, 0 to 255 as uint8 or floats; otherwise it is normalised already.
        dtype: what the network computes in.
    """

    def __init__(self, network: nn.Module, *, pixels: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.pixels = pixels
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits, in float32 whatever the network computes in."""
        return self.network(x.to(self.dtype)).float()


class Normalise(nn.Module):
    """Pixels from 0 to 255 to what a network was trained on, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        # (C, 1, 1) each
        self.register_buffer("scale", 1 / (255 * torch.tensor(preprocessing.std, dtype=torch.float64)).view(-1, 1, 1))
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("shift", -mean * 255 * cast(Tensor, self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        return x * cast(Tensor, self.scale) + cast(Tensor, self.shift)


def as_input(model: ImageClassifier, levels: Tensor, *, pixels: bool) -> Tensor:
    """Pixels as uint8 (B, C, H, W), or as the model takes them normalised: float32, by its own transform if known."""
    if pixels:
        return levels
    if model.origin is None or len(model.origin.preprocessing.mean) != levels.shape[1]:
        return levels.float() / 64 - 2
    return Normalise(model.origin.preprocessing).float()(levels.float())


class PrefixBlock(nn.Module):
    """A block of which only the prefix tokens' rows are wanted: (B, P + N, D) -> (B, P, D).

    Keys and values are still those of all tokens. The same rows as the block's own, from fewer operations.
    """

    def __init__(self, block: Block, num_prefix: int) -> None:
        super().__init__()
        attention, width = block.attn, block.attn.proj.in_features
        self.num_prefix, self.num_heads = num_prefix, attention.num_heads
        self.norm1, self.proj, self.norm2, self.mlp = block.norm1, attention.proj, block.norm2, block.mlp
        self.query = _rows(attention.qkv, 0, width)
        self.key_value = _rows(attention.qkv, width, 3 * width)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """Both residual steps; the bias is added to the attention logits, (B, 1, 1, P + N)."""
        normed, prefix = self.norm1(x), x[:, : self.num_prefix]
        query = self.query(normed[:, : self.num_prefix]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        # (B, P + N, 2 * D) -> twice (B, heads, P + N, D / heads)
        key_value = self.key_value(normed).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key_value[0], key_value[1], attn_mask=attn_bias)
        prefix = prefix + self.proj(mixed.transpose(1, 2).flatten(2))
        return prefix + self.mlp(self.norm2(prefix))


def _rows(layer: nn.Linear, start: int, stop: int) -> nn.Linear:
    """A layer that gives some of the outputs of another, from the same memory."""
    part = nn.Linear(layer.in_features, stop - start, bias=layer.bias is not None, device="meta")
    part.weight = nn.Parameter(layer.weight[start:stop], requires_grad=False)
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias[start:stop], requires_grad=False)
    return part


@torch.no_grad()
def prepare(
    model: ImageClassifier,
    *,
    pixels: bool = False,
    dtype: torch.dtype = torch.float32,
    fold: bool = True,
    token_merging: TokenMerging = 0,
) -> Prepared:
    """A network for inference from a model, which is left as it is; memory is shared where nothing changes.

    Args:
        model: any family, in any mode.
        pixels: take pixels from 0 to 255 rather than normalised floats.
        dtype: what to compute in; folding is done in float32.
        fold: whether to fold; a network that is not folded is what others are compared with.
        token_merging: patch tokens that every block merges, or those of each block; with 0 the logits are the model's.

    Raises: ConfigError: pixels are asked for, and the model does not know its normalisation; tokens that cannot be
        merged, see `merging_plan`.
    """
    if pixels and model.origin is None:
        raise ConfigError("this model was not made by create_model or from_pretrained; its normalisation is unknown")
    plan = merging_plan(model, token_merging)
    network = _sharing_copy(model).float()
    if fold:
        network = _folded(network)
    if plan:
        blocks = cast(nn.Sequential, network.blocks)
        network.blocks = MergingBlocks(blocks, plan, network.config.num_prefix_tokens)
    whole: nn.Module = network
    if pixels and model.origin is not None:
        if fold and isinstance(network, DeiT):
            _fold_normalisation(network.patch_embed.proj, model.origin.preprocessing)
        else:
            device = next(network.parameters()).device
            whole = nn.Sequential(Normalise(model.origin.preprocessing).to(device, torch.float32), network)
    return Prepared(whole.to(dtype), pixels=pixels, dtype=dtype).eval().requires_grad_(False)


def _sharing_copy(model: ImageClassifier) -> ImageClassifier:
    """The same modules anew, on the same tensors."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**parameters, **{id(buffer): buffer for buffer in model.buffers()}}).eval()


def _folded(network: ImageClassifier) -> ImageClassifier:
    """A network that does less for the same logits; the one given is used up."""
    if isinstance(network, LeViT) and not network.is_fused:
        return network.fuse()
    for module in network.modules():
        if isinstance(module, Block):
            _fold_layer_scale(module)
            module.norm1 = _fold_norm(module.norm1, module.attn.qkv)
            module.norm2 = _fold_norm(module.norm2, module.mlp.fc1)
    if isinstance(network, VisionTransformer):
        if not getattr(network.config, "token_head", False):
            last = cast(Block, network.blocks[-1])
            network.blocks[-1] = PrefixBlock(last, network.config.num_prefix_tokens)
    return network


def _fold_layer_scale(block: Block) -> None:
    """Multiply the factors of each branch into its last layer, in place: gamma * (W x + b) = (gamma W) x + gamma b."""
    if block.gamma_1 is not None:
        _scale(block.attn.proj, block.gamma_1)
        block.gamma_1 = None
    if block.gamma_2 is not None:
        _scale(block.mlp.fc2, block.gamma_2)
        block.gamma_2 = None


def _scale(layer: nn.Linear, factors: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight * factors[:, None], requires_grad=False)
    layer.bias = nn.Parameter(layer.bias * factors, requires_grad=False)


def _fold_norm(norm: nn.LayerNorm, layer: nn.Linear) -> nn.LayerNorm:
    """The norm without scale and shift, which go into the layer behind it: W (g x + s) + b = (W g) x + (W s + b)."""
    shift = layer.weight @ norm.bias
    layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift, requires_grad=False)
    layer.weight = nn.Parameter(layer.weight * norm.weight, requires_grad=False)
    return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def _fold_normalisation(projection: nn.Conv2d, preprocessing: Preprocessing) -> None:
    """Have a convolution without padding take pixels, in place: W (x / 255 - m) / s = (W / 255 s) x - sum(W m / s)."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=projection.weight.device).view(-1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    weight = projection.weight.double() / std
    shift = (weight * mean).sum(dim=(1, 2, 3))
    bias = -shift if projection.bias is None else projection.bias.double() - shift
    projection.weight = nn.Parameter((weight / 255).to(projection.weight.dtype), requires_grad=False)
    projection.bias = nn.Parameter(bias.to(projection.weight.dtype), requires_grad=False)
