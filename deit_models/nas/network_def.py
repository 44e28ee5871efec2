"""Networks in the authors' notation: nested tuples, read into stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ConfigError
from ..models.vit_resnas import Stage


def stages_of(network_def: Iterable[Sequence[Any]]) -> tuple[Stage, ...]:
    """The stages of a network written the authors' way.

    Args:
        network_def: nested tuples, one an entry: (4, D) or (0, D) for the stem; (1, (D, heads, head_dim), (D, hidden),
            kept) for a block, which is left out where `kept` is 0; (3, D, D') for a reduction; (2, D, classes) for the
            head.

    Raises: ConfigError: an entry of another kind, widths that do not meet, or stages with heads of several widths.
    """
    stages: list[Stage] = []
    width, blocks = 0, list[tuple[int, int, int]]()
    for entry in network_def:
        kind = entry[0]
        if kind in (0, 4):
            width = entry[1]
        elif kind == 1:
            (block_width, heads, head_dim), (mlp_width, hidden), kept = entry[1:]
            if not block_width == mlp_width == width:
                raise ConfigError(f"network_def: the block {entry} follows tokens of width {width}")
            blocks += [(heads, head_dim, hidden)] if kept else []
        elif kind in (2, 3) and entry[1] == width:
            stages.append(_closed_stage(width, blocks))
            width, blocks = entry[2], []
        else:
            raise ConfigError(f"network_def: the entry {entry} is of no known kind, or follows tokens of width {width}")
    return tuple(stages)


def _closed_stage(width: int, blocks: list[tuple[int, int, int]]) -> Stage:
    head_dims = {head_dim for _, head_dim, _ in blocks}
    if len(head_dims) != 1:
        raise ConfigError(
            f"network_def: a stage of width {width} has heads of widths {sorted(head_dims)}; expected one"
        )
    return Stage(
        embed_dim=width,
        head_dim=head_dims.pop(),
        num_heads=tuple(heads for heads, _, _ in blocks),
        mlp_hidden=tuple(hidden for _, _, hidden in blocks),
    )
