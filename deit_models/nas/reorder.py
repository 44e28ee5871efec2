"""Important channels first: what a small network keeps is the front of each tensor, so the front should be the best."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.transformer import Attention, Block, Mlp


@torch.no_grad()
def reorder_channels(blocks: Iterable[nn.Module]) -> None:
    """Sort the hidden units and the heads of every block by importance, in place; what the network computes stays.

    Importance is the sum of the magnitudes of all weights and biases of a unit or head. Stage widths are not sorted.
    Source: the paper's channel re-ordering, as in the authors' code.
    """
    for block in blocks:
        if isinstance(block, Block):
            _reorder_hidden(block.mlp)
            _reorder_heads(block.attn)


def _reorder_hidden(mlp: Mlp) -> None:
    weight = mlp.fc1.weight.abs().sum(1) + mlp.fc1.bias.abs() + mlp.fc2.weight.abs().sum(0)
    order = weight.argsort(descending=True, stable=True)
    for tensor in (mlp.fc1.weight, mlp.fc1.bias):
        tensor.copy_(tensor[order])
    mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])


def _reorder_heads(attention: Attention) -> None:
    heads, out = attention.num_heads, attention.proj.weight
    by_head = [_by_head(tensor, heads) for tensor in (attention.qkv.weight, attention.qkv.bias) if tensor is not None]
    columns = out.view(len(out), heads, -1)
    weight = sum((part.abs().sum((0, *range(2, part.ndim))) for part in by_head), columns.abs().sum((0, 2)))
    order = torch.as_tensor(weight).argsort(descending=True, stable=True)
    for part in by_head:
        part.copy_(part[:, order])
    columns.copy_(columns[:, order])


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q, k and v as (3, heads, head_dim, ...), a view."""
    return tensor.view(3, heads, -1, *tensor.shape[1:])
