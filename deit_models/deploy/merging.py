"""Fewer tokens from block to block: those most alike become one, which counts for as many as it holds.

Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461, written from the paper's text; no
code of its authors was used. Other than the folds of `prepared` this changes the answers: not training, but a check on
images decides whether they stay good enough.

Reading order: the plan (how many tokens a block merges), the pairs, the merge, the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..models.layers import ImageClassifier
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
        x = x + scaled(self.attn.project(mixed.transpose(1, 2).flatten(2)), self.gamma_1)
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
