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

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..hub.manifest import Preprocessing
from ..models.deit import DeiT
from ..models.layers import ImageClassifier
from ..models.levit import LeViT
from ..models.transformer import Block, VisionTransformer
from .merging import MergingBlocks, TokenMerging, merging_plan


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
