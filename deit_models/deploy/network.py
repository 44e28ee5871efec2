"""Inference copy of a model: from images to final logits, with layers folded and, on request, tokens merged.

Folding gives the same logits up to rounding:

- LeViT: BatchNorms and score biases (`LeViT.fuse`).
- Transformer blocks: layer scale goes into the linear layer before, a LayerNorm's scale and shift into the one after.
  So it is in ResMLP's MLPs over the channels; its matrices over the patches have no channel to scale.
- The last block, if the heads read the prefix tokens only: it computes only their rows. With 197 tokens this saves five
  sixths of one block in twelve.
- The normalisation of pixels, on request: into the patch projection of DeiT, CaiT and ResMLP. Other families have it as
  a layer in front: their first layer pads with zeros, and zero means another colour before the normalisation than
  after it.

Merging changes the logits: the tokens most alike become one, which counts for all tokens in it. Source: Bolya et al.,
Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461; written from the paper, without its authors' code.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import Preprocessing
from ..errors import ConfigError, first_line
from ..models.layers import ImageClassifier
from ..models.levit import LeViT
from ..models.resmlp import Affine, MlpBlock
from ..models.transformer import Block, PatchEmbed, VisionTransformer, scaled

TokenMerging = int | Sequence[int]
"""Tokens to merge in every block, or one number for each block; 0 merges none."""


class Prepared(nn.Module):
    """A network for inference, with weights in `dtype`: (B, C, H, W) -> (B, num_classes) float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(self.dtype)).float()


@torch.no_grad()
def prepare(
    model: ImageClassifier,
    *,
    pixels: bool = False,
    dtype: torch.dtype = torch.float32,
    fold: bool = True,
    plan: tuple[int, ...] = (),
) -> Prepared:
    """Inference copy of a model. The model stays as it is; unchanged tensors are shared.

    Args:
        model: any family, in any mode.
        pixels: take pixels from 0 to 255 instead of normalised floats.
        dtype: dtype to compute in; folding is done in float32.
        fold: whether to fold; networks without folding serve as reference.
        plan: tokens to merge in each block, from `merging_plan`; empty for the model's own logits.

    Raises: ConfigError: layers of another library; `pixels`, but the normalisation of the model is unknown.
    """
    network = _sharing_copy(model).float()
    try:
        network = _folded(network) if fold else network
    except Exception as error:  # whatever other libraries put in place of layers
        advice = "take the model without adapters, parametrizations or quantisation: merged, removed, or from before"
        raise ConfigError(f"layers that cannot be folded ({first_line(error)}); {advice}") from error
    if plan and isinstance(network, VisionTransformer):
        network.blocks = MergingBlocks(network.blocks, plan, network.config.num_prefix_tokens)
    whole: nn.Module = network
    if pixels:
        if model.origin is None:
            made_by = "create_model or from_pretrained"
            raise ConfigError(f"this model was not made by {made_by}; its normalisation is unknown")
        patches = getattr(network, "patch_embed", None)
        if fold and isinstance(patches, PatchEmbed):
            _fold_normalisation(patches.proj, model.origin.preprocessing)
        else:
            device = next(network.parameters()).device
            whole = nn.Sequential(Normalise(model.origin.preprocessing).to(device), network)
    return Prepared(whole, dtype).eval().requires_grad_(False)


def _sharing_copy(model: ImageClassifier) -> ImageClassifier:
    """New modules on the same tensors, in eval mode."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**parameters, **{id(buffer): buffer for buffer in model.buffers()}}).eval()


class Normalise(nn.Module):
    """Normalise pixels from 0 to 255 as the model's evaluation transform does: (B, C, H, W) -> (B, C, H, W)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean, std = _channels(preprocessing)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class TransformLayer(nn.Module):
    """The evaluation transform inside the network: (B, C, any height, any width) pixels to (B, C, H, W).

    Differs from `EvalTransform`: resized levels are not rounded to whole numbers.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        """Take a checkpoint's preprocessing. Raises: ConfigError: it cannot be computed in a network."""
        super().__init__()
        spec, resize = preprocessing, preprocessing.resize
        sides = (resize, resize) if isinstance(resize, int) else resize or (0, 0)
        if spec.interpolation not in ("bilinear", "bicubic") or any(map(operator.lt, sides, spec.crop)):
            raise ConfigError(f"a network cannot compute '{spec}': it resizes by bilinear or bicubic, and does not pad")
        self.spec, self.normalise = spec, Normalise(spec)

    def forward(self, x: Tensor) -> Tensor:
        spec, resize, (height, width) = self.spec, self.spec.resize, x.shape[2:]
        if isinstance(resize, int):
            shorter = torch.sym_min(height, width)
            rows, columns = resize * height // shorter, resize * width // shorter
        else:
            rows, columns = cast(tuple[int, int], resize)
            if spec.fit == "cover":  # the quotients are rounded to the nearest number
                higher = (2 * height * columns + width) // (2 * width)
                wider = (2 * width * rows + height) // (2 * height)
                rows, columns = torch.sym_max(rows, higher), torch.sym_max(columns, wider)
        size = cast(list[int], [rows, columns])  # symbols, while the network is traced
        x = F.interpolate(x, size, mode=spec.interpolation, antialias=True).clamp(0, 255)
        for dim, side, crop in zip((2, 3), (rows, columns), spec.crop, strict=True):
            rest = side - crop
            # (r + r // 2 % 2) // 2 is r / 2 rounded to the nearest even number
            start = (rest if spec.rounding == "down" else rest + rest // 2 % 2) // 2
            x = x.index_select(dim, torch.arange(crop, device=x.device) + start)  # traced to a fixed size, as no slice
        return self.normalise(x)


def _channels(preprocessing: Preprocessing) -> Tensor:
    """Mean and standard deviation, (2, C, 1, 1) float64."""
    return torch.tensor([preprocessing.mean, preprocessing.std], dtype=torch.float64)[..., None, None]


def random_images(model: ImageClassifier, count: int, *, pixels: bool) -> Tensor:
    """Images to compare networks on, the same ones in each call. Smooth, since a network sees no difference in noise.

    Shape: (count, C, H, W) on the CPU; uint8 pixels, or floats normalised by the model's transform if it is known.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, model.config.in_chans, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, model.config.image_hw, mode="bilinear", align_corners=True)
    levels = (smooth * 255).to(torch.uint8)
    if pixels:
        return levels
    if model.origin is None or len(model.origin.preprocessing.mean) != levels.shape[1]:
        return levels.float() / 64 - 2
    return Normalise(model.origin.preprocessing)(levels.float())


# Folds


def _folded(network: ImageClassifier) -> ImageClassifier:
    """A network with the same logits from fewer operations; changes `network` in place or replaces it."""
    if isinstance(network, LeViT) and not network.is_fused:
        return network.fuse()
    for module in network.modules():
        if isinstance(module, Block):
            _fold_block(module)
        elif isinstance(module, MlpBlock) and isinstance(module.norm2, Affine) and module.gamma_2 is not None:
            _scale_outputs(module.mlp.fc2, module.gamma_2)
            _scale_inputs(module.mlp.fc1, module.norm2.alpha, module.norm2.beta)
            module.gamma_2, module.norm2 = None, nn.Identity()
    if isinstance(network, VisionTransformer) and not network.reads_patches:
        *others, last = (block for block in network.blocks if isinstance(block, Block))
        network.blocks = nn.Sequential(*others, PrefixBlock(last, network.config.num_prefix_tokens))
    return network


def _fold_block(block: Block) -> None:
    """Fold layer scale and LayerNorms into the linear layers, in place.

    gamma * (W x + b) = (gamma W) x + gamma b, and W (g x + s) + b = (W g) x + (W s + b).
    """
    for layer, gamma in ((block.attn.proj, block.gamma_1), (block.mlp.fc2, block.gamma_2)):
        if gamma is not None:
            _scale_outputs(layer, gamma)
    block.gamma_1 = block.gamma_2 = None
    readers = [(block.norm1, getattr(block.attn, name)) for name in block.attn.inputs]
    for norm, layer in (*readers, (block.norm2, block.mlp.fc1)):
        _scale_inputs(layer, norm.weight, norm.bias)
    block.norm1, block.norm2 = (
        nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False) for norm in (block.norm1, block.norm2)
    )


def _scale_outputs(layer: nn.Linear, factors: Tensor) -> None:
    _set(layer, layer.weight * factors[:, None], layer.bias * factors)


def _scale_inputs(layer: nn.Linear, factors: Tensor, shift: Tensor) -> None:
    shifted = layer.weight @ shift
    _set(layer, layer.weight * factors, shifted if layer.bias is None else layer.bias + shifted)


def _set(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def _fold_normalisation(projection: nn.Conv2d, preprocessing: Preprocessing) -> None:
    """Make a convolution without padding take pixels, in place: W (x / 255 - m) / s = (W / 255 s) x - sum(W m / s)."""
    mean, std = _channels(preprocessing).to(projection.weight.device)
    weight = projection.weight.double() / std
    shift = (weight * mean).sum(dim=(1, 2, 3))
    bias = -shift if projection.bias is None else projection.bias.double() - shift
    _set(projection, weight / 255, bias)


class PrefixBlock(nn.Module):
    """The prefix tokens of a block's output, from keys and values of all tokens: (B, P + N, D) -> (B, P, D)."""

    def __init__(self, block: Block, num_prefix: int) -> None:
        super().__init__()
        attention, width = block.attn, block.attn.proj.in_features
        self.num_prefix, self.num_heads = num_prefix, attention.num_heads
        self.norm1, self.proj, self.norm2, self.mlp = block.norm1, attention.proj, block.norm2, block.mlp
        self.query = _rows(attention.qkv, 0, width)
        self.key_value = _rows(attention.qkv, width, 3 * width)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """Both residual steps; `attn_bias` (B, 1, 1, P + N) is added to the attention logits."""
        normed, prefix = self.norm1(x), x[:, : self.num_prefix]
        query = self.query(normed[:, : self.num_prefix]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        # (B, P + N, 2 * D) -> twice (B, heads, P + N, D / heads)
        key_value = self.key_value(normed).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key_value[0], key_value[1], attn_mask=attn_bias)
        prefix = prefix + self.proj(mixed.transpose(1, 2).flatten(2))
        return prefix + self.mlp(self.norm2(prefix))


def _rows(layer: nn.Linear, start: int, stop: int) -> nn.Linear:
    """A layer with some of the outputs of another, on the same memory."""
    part = nn.Linear(layer.in_features, stop - start, bias=layer.bias is not None, device="meta")
    part.load_state_dict({name: tensor[start:stop] for name, tensor in layer.state_dict().items()}, assign=True)
    return part


# Merging


def decreasing(r: int, depth: int) -> tuple[int, ...]:
    """A plan that falls linearly from 2 * r tokens in the first block to 0 in the last; r a block on average.

    Source: section 3 of the paper. Rounded so that the sum over the first blocks is off by half a token at most.
    """
    falling = [2 * r * (1 - i / (depth - 1)) if depth > 1 else float(r) for i in range(depth)]
    totals = [round(sum(falling[:i])) for i in range(depth + 1)]
    return tuple(after - before for before, after in pairwise(totals))


def merging_plan(model: ImageClassifier, token_merging: TokenMerging) -> tuple[int, ...]:
    """The number of tokens to merge in each block; empty if no block merges.

    Raises: ConfigError: a model whose tokens cannot be merged, a negative number, a plan for another number of blocks.
    """
    plan = (token_merging,) if isinstance(token_merging, int) else tuple(token_merging)
    if any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in plan):
        raise ConfigError(f"token_merging={token_merging!r}; expected a whole number from 0, or one for each block")
    if not any(plan):
        return ()
    is_transformer = isinstance(model, VisionTransformer)
    if not is_transformer or model.reads_patches:
        reads = "reads every patch after its blocks" if is_transformer else "needs its tokens on a grid"
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
    """Tokens to merge. Tokens after the prefix alternate: F first tokens at even places, S second tokens at odd ones.

    Shape: `kept` (B, F - r) and `gone` (B, r) are indices of first tokens that stay, in order, or are merged away;
    `into` (B, S, r) float32 is 1 where a second token takes in a gone one, else 0.
    """

    num_prefix: int
    kept: Tensor
    gone: Tensor
    into: Tensor


def match_tokens(keys: Tensor, r: int, *, num_prefix: int = 0) -> Pairs:
    """The r most similar pairs of a first token and the second token most similar to it.

    Shape: keys (B, P + N, D); r is at most N // 2.
    Source: section 3 of the paper, "bipartite soft matching"; the similarity is the cosine of the angle.
    """
    # always float32: in half precision many similarities are equal, and the choice among them is arbitrary
    unit = F.normalize(keys.float(), dim=-1)
    first, second = _alternating(unit, num_prefix)
    similarity, partner = (first @ second.transpose(1, 2)).max(dim=2)
    order = similarity.argsort(dim=1, descending=True)
    # sorted, since otherwise rounding would decide which tokens are first and second at the next merge
    gone, kept = order[:, :r], order[:, r:].sort(dim=1).values
    seconds = torch.arange(second.shape[1], device=keys.device)
    into = (partner.gather(1, gone)[:, None] == seconds[:, None]).float()
    return Pairs(num_prefix, kept, gone, into)


def merge_tokens(tokens: Tensor, sizes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Merge each pair into its mean, weighted by size; the sizes are added.

    Shape: (B, P + N, D) and (B, P + N, 1) float32 -> the same with r tokens fewer: prefix, first tokens, second tokens.
    """
    first, second = _alternating(tokens, pairs.num_prefix)
    first_sizes, second_sizes = _alternating(sizes, pairs.num_prefix)
    gone_sizes = _take(first_sizes, pairs.gone)
    # products with zeros and ones instead of a scatter: every backend has them and adds in the same order
    merged_sizes = second_sizes + pairs.into @ gone_sizes
    share = pairs.into * gone_sizes.transpose(1, 2) / merged_sizes
    merged = second * (second_sizes / merged_sizes).to(tokens.dtype)
    merged = merged + share.to(tokens.dtype) @ _take(first, pairs.gone)
    return (
        torch.cat([tokens[:, : pairs.num_prefix], _take(first, pairs.kept), merged], dim=1),
        torch.cat([sizes[:, : pairs.num_prefix], _take(first_sizes, pairs.kept), merged_sizes], dim=1),
    )


def _alternating(x: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    return x[:, num_prefix::2], x[:, num_prefix + 1 :: 2]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each item by index: (B, N, D) and (B, n) -> (B, n, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _log_sizes(sizes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias for attention logits: a key counts once for every token in it. (B, N, 1) -> (B, 1, 1, N).

    Source: equation 1 of the paper, "proportional attention".
    """
    return None if sizes is None else sizes.log().to(dtype).transpose(1, 2).unsqueeze(1)


class MergingBlock(nn.Module):
    """A block that merges r tokens between attention and MLP, in eval mode: (B, P + N, D) -> (B, P + N - r, D).

    The sizes (B, P + N, 1) go along; None means that every token is one patch. At most half of the N tokens are merged.
    """

    def __init__(self, block: Block, r: int, num_prefix: int) -> None:
        super().__init__()
        self.block, self.r, self.num_prefix = block, r, num_prefix

    def forward(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        block = self.block
        query, key, value = block.attn.heads(block.norm1(x))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=_log_sizes(sizes, x.dtype))
        x = x + scaled(block.attn.proj(mixed.transpose(1, 2).flatten(2)), block.gamma_1)
        r = min(self.r, (x.shape[1] - self.num_prefix) // 2)
        if r:
            sizes = torch.ones_like(x[..., :1], dtype=torch.float32) if sizes is None else sizes
            x, sizes = merge_tokens(x, sizes, match_tokens(key.mean(dim=1), r, num_prefix=self.num_prefix))
        return x + scaled(block.mlp(block.norm2(x)), block.gamma_2), sizes


class MergingBlocks(nn.Sequential):
    """All blocks of a network, with merging: (B, P + N, D) -> (B, P + fewer, D). A final PrefixBlock merges none."""

    def __init__(self, blocks: nn.Sequential, plan: Sequence[int], num_prefix: int) -> None:
        pairs = zip(blocks, plan, strict=True)
        super().__init__(*(MergingBlock(b, r, num_prefix) if isinstance(b, Block) else b for b, r in pairs))

    def forward(self, x: Tensor) -> Tensor:
        sizes: Tensor | None = None
        for block in self:
            if isinstance(block, MergingBlock):
                x, sizes = block(x, sizes)
            else:
                x = block(x, _log_sizes(sizes, x.dtype))
        return x


@torch.no_grad()
def merged_patches(model: ImageClassifier, images: Tensor, token_merging: TokenMerging) -> Tensor:
    """The number of the token that each patch is part of in the last block: (B, C, H, W) -> (B, h, w), from 0.

    Raises: ConfigError: see `merging_plan`.
    """
    plan, prefix = merging_plan(model, token_merging), model.num_prefix_tokens
    network = cast(VisionTransformer, prepare(model, plan=plan, fold=False).network)
    tokens, sizes = network.forward_tokens(images), None
    members = torch.eye(tokens.shape[1], device=images.device).expand(len(images), -1, -1)
    counts = torch.ones_like(members[..., :1])
    for merging in [*network.blocks][:-1] if plan else ():  # no attention follows the merging of the last block
        block, r = cast(MergingBlock, merging).block, min(merging.r, (tokens.shape[1] - prefix) // 2)
        if r:
            key = block.attn.heads(block.norm1(tokens))[1]
            members, counts = merge_tokens(members, counts, match_tokens(key.mean(dim=1), r, num_prefix=prefix))
        tokens, sizes = merging(tokens, sizes)
    return (members[:, prefix:, prefix:] > 0).float().argmax(dim=1).view(-1, *network.input_grid(images))
