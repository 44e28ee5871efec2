"""Features of a model's layers: maps after blocks or stages, and timm's names for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast

from torch import Tensor, nn

from ..config import check_choice
from ..errors import ConfigError


class LayerTokens(NamedTuple):
    """Tokens after one block: `prefix` (B, P, D) in the model's order, `patches` as a feature map (B, D, h, w)."""

    prefix: Tensor
    patches: Tensor


class FeatureLevel(NamedTuple):
    """Where a model has a map of features: after layer `layer` of `blocks`, `width` channels, `step` pixels apart.

    `has_norm`: the final norm fits it.
    """

    layer: int
    width: int
    step: int
    has_norm: bool = True


def chosen_layers(layers: int | Sequence[int], count: int, what: str) -> list[int]:
    """Indices from 0 to count - 1: the last `layers` ones, or those listed (negative ones count from the end).

    Raises: ConfigError: an index that does not exist; `what` is the plural of the things counted.
    """
    lowest, indices = (0, range(count - layers, count)) if isinstance(layers, int) else (-count, layers)
    if not indices or not all(lowest <= i < count for i in indices):
        raise ConfigError(f"layers={layers}; this model has {what} 0 to {count - 1}")
    return [i % count for i in indices]


class LayerFeatures(nn.Module):
    """Base of `ImageClassifier`: a model that is tokens, `blocks` in a row and what follows them."""

    head_names: ClassVar[tuple[str, ...]]
    """Submodules that depend on `num_classes`; only their tensors may be missing in a checkpoint."""
    level_name: ClassVar[str] = "stages"
    """The `feature_levels` in plain words."""
    block_rows: ClassVar[tuple[str, ...]] = ("blocks",)
    """Submodules that are layers in a row, in the order of use."""
    config: Any
    blocks: nn.Sequential

    @property
    def all_blocks(self) -> list[nn.Module]:
        """The layers of all `block_rows`, in the order of use."""
        return [layer for row in self.block_rows for layer in getattr(self, row)]

    def block_of(self, name: str) -> int | None:
        """Place among `all_blocks` of the layer that has a parameter of this name; None: it is in none."""
        row, _, rest = name.partition(".")
        if row not in self.block_rows:
            return None
        before = self.block_rows[: self.block_rows.index(row)]
        return sum(len(getattr(self, earlier)) for earlier in before) + int(rest.partition(".")[0])

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the input of `blocks`, (B, C, H, W) -> (B, P + N, D)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_tokens")

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to the tokens that are classified, (B, C, H, W) -> (B, P + N, D)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_features")

    def finish(self, tokens: Tensor) -> Tensor:
        """From the tokens after `blocks` to those that are classified: the last norm, if there is one."""
        return cast(Tensor, getattr(self, "norm", nn.Identity())(tokens))

    def run_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x), perhaps with gradient checkpointing."""
        raise NotImplementedError(f"{type(self).__name__} does not define run_layer")

    # Features of layers

    @property
    def feature_levels(self) -> list[FeatureLevel]:
        """The maps of features a model has: after each block, or each stage."""
        raise NotImplementedError(f"{type(self).__name__} does not define feature_levels")

    def level_grid(self, _x: Tensor, level: int) -> tuple[int, int]:
        """(height, width) of the map of a level, for images x."""
        return cast("tuple[int, int]", self.config.grids[level])

    def _collect(
        self, x: Tensor, wanted: Collection[int], *, norm: bool, stop_early: bool = False
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The last tokens, and those of the wanted levels; in training mode no patches are left out."""
        levels, tokens, found = self.feature_levels, self.forward_tokens(x), dict[int, Tensor]()
        last_norm = getattr(self, "norm", nn.Identity())
        start, layers = 0, list(self.blocks)
        for number, level in enumerate(levels[: max(wanted) + 1] if stop_early else levels):
            for layer in layers[start : level.layer + 1]:
                tokens = self.run_layer(layer, tokens)
            start = level.layer + 1
            if number in wanted:
                found[number] = last_norm(tokens) if norm and level.has_norm else tokens
        return self.finish(tokens) if level.has_norm else tokens, found

    def get_intermediate_layers(
        self, x: Tensor, layers: int | Sequence[int] = 1, *, norm: bool = True
    ) -> list[LayerTokens]:
        """Tokens after chosen blocks or stages, for dense tasks and probes.

        Args:
            x: images, (B, C, H, W).
            layers: how many of the last ones, or their indices (negative ones count from the end).
            norm: apply the final LayerNorm, as DINO does: to each block, of stages to the last; LeViT has none.

        Raises: ConfigError: a block or stage that does not exist.
        """
        wanted = chosen_layers(layers, len(self.feature_levels), self.level_name)
        found = self._collect(x, wanted, norm=norm)[1]
        return [LayerTokens(*self._parts(found[level], self.level_grid(x, level))) for level in wanted]

    def _parts(self, tokens: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Prefix tokens, (B, P, D), and patches, as a map (B, D, h, w) or, without a grid, (B, N, D)."""
        count = self.num_block_prefix_tokens
        prefix, patches = tokens[:, :count], tokens[:, count:]
        return prefix, patches if grid is None else patches.mT.reshape(patches.shape[0], -1, *grid).contiguous()

    # timm's surface, beside `forward_features`, `set_grad_checkpointing` and `no_weight_decay`

    @property
    def num_features(self) -> int:
        """Width of the tokens that are classified."""
        return self.feature_levels[-1].width

    @property
    def head_hidden_size(self) -> int:
        """Width of the input of the heads."""
        return self.num_features

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches, in the result of `forward_features`."""
        return int(getattr(self.config, "num_prefix_tokens", 0))

    @property
    def num_block_prefix_tokens(self) -> int:
        """Those of them that pass `blocks`: in CaiT the class token joins afterwards."""
        return self.num_prefix_tokens

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """`num_chs`, `reduction` and `module` of each map that `forward_intermediates` gives."""
        return [
            {"num_chs": level.width, "reduction": level.step, "module": f"blocks.{level.layer}"}
            for level in self.feature_levels
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of features after blocks or stages, in their order; and before them, the result of `forward_features`.

        Args:
            x: images, (B, C, H, W).
            indices: how many of the last ones, or their indices; None: all.
            return_prefix_tokens: pairs of the map and the prefix tokens, (B, P, D), where the model has any.
            norm: see `get_intermediate_layers`.
            stop_early: run no layer after the last wanted one; the first result is of that layer, then.
            output_fmt: maps as "NCHW", (B, D, h, w), or "NLC", (B, h * w, D).
            intermediates_only: give the list of maps alone.

        Raises: ConfigError: a block or stage that does not exist, or another format.
        """
        check_choice("output_fmt", output_fmt, Literal["NCHW", "NLC"])
        count = len(self.feature_levels)
        wanted = set(chosen_layers(count if indices is None else indices, count, self.level_name))
        features, found = self._collect(x, wanted, norm=norm, stop_early=stop_early)
        maps: list[Any] = []
        for level, tokens in found.items():
            prefix, patches = self._parts(tokens, self.level_grid(x, level) if output_fmt == "NCHW" else None)
            maps.append((patches, prefix) if return_prefix_tokens and self.num_block_prefix_tokens else patches)
        return maps if intermediates_only else (features, maps)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names for timm's groups of parameters: the stem, each block (`coarse`: each level), the rest."""
        blocks: list[tuple[str, Any]] = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        if coarse:
            ends = [-1, *(level.layer for level in self.feature_levels)]
            numbers = ["|".join(map(str, range(a + 1, b + 1))) for a, b in pairwise(ends)]
            blocks[:1] = [(rf"^blocks\.(?:{some})\.", (level,)) for level, some in enumerate(numbers)]
        count = len(self.feature_levels if coarse else self.blocks)
        for row in self.block_rows[1:]:
            blocks += [(rf"^{row}\.{number}\.", (count + number,)) for number in range(len(getattr(self, row)))]
        rest = "|".join((*self.block_rows, "norm", *self.head_names))
        return {"stem": rf"^(?!(?:{rest})\.)", "blocks": blocks}
