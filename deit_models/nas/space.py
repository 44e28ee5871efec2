"""Search spaces: the choices of every stage, candidates (one choice of everything), and spaces in files.

A space is a row of stages. Each has some possible widths, and a number of places for blocks; each block has some
possible numbers of heads and hidden widths, and some places may stay empty.
Source: section 4 of the ViT-ResNAS paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

from ..checkpoint import Preprocessing
from ..config import check_whole, nearest, override
from ..errors import ConfigError
from ..files import parse_toml, read_text, toml_lines
from ..models.vit_resnas import Stage, ViTResNASConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoices:
    """The choices of one stage.

    Attributes:
        embed_dim: widths, from the largest to the smallest, like all choices.
        head_dim: width of a head.
        num_heads: heads of a block.
        mlp_hidden: hidden widths of a block's MLP.
        depth: places for a block.
        removable: places, counted from 0, that may stay empty.
    """

    embed_dim: tuple[int, ...]
    head_dim: int
    num_heads: tuple[int, ...]
    mlp_hidden: tuple[int, ...]
    depth: int
    removable: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ConfigError for choices that are no whole numbers from large to small, or places that do not exist."""
        check_whole(self, "head_dim", "depth")
        for name in ("embed_dim", "num_heads", "mlp_hidden", "removable"):
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, (list, tuple)) else (values,)
            object.__setattr__(self, name, values)
            whole = all(type(value) is int for value in values)
            if not whole or list(values) != sorted(set(values), reverse=name != "removable"):
                raise ConfigError(
                    f"{name}={values}; expected whole numbers, each once, from the largest to the smallest"
                )
            if name != "removable" and (not values or values[-1] < 1):
                raise ConfigError(f"{name}={values}; expected one choice or more, all above 0")
        if not set(self.removable) < set(range(self.depth)):
            raise ConfigError(f"removable={self.removable}; expected places 0 to {self.depth - 1}, and not all of them")


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """One place for a block: its heads, its MLP, and whether there is a block at all."""

    num_heads: int
    mlp_hidden: int
    kept: bool = True


@dataclass(frozen=True, slots=True)
class StageChoice:
    """One stage of a candidate: its width, and every place."""

    embed_dim: int
    blocks: tuple[BlockChoice, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice of everything in a space. Empty places keep their heads and MLP, so that evolution can fill them."""

    stages: tuple[StageChoice, ...]

    def key(self) -> str:
        """The network in one line, such as "48: 2x96 1x72 | ...": equal for candidates that are the same network."""
        return " | ".join(
            f"{stage.embed_dim}: {' '.join(f'{b.num_heads}x{b.mlp_hidden}' for b in stage.blocks if b.kept)}"
            for stage in self.stages
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The choices of each stage, and the settings that all networks of the space share.

    Attributes:
        stages: the choices, stage by stage.
        settings: fields of `ViTResNASConfig` besides `stages`.
        preprocessing: how images become input; None: DeiT's way, at the networks' size.
    """

    stages: tuple[StageChoices, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError unless every network of the space can be built."""
        if not self.stages:
            raise ConfigError("a search space needs one stage or more")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.embed_dim[0] > after.embed_dim[-1]:
                raise ConfigError(
                    f"a stage may be {before.embed_dim[0]} wide and the next one {after.embed_dim[-1]}; tokens never "
                    f"get narrower, so every width of a stage must be at most the smallest of the next"
                )
        if "stages" in self.settings:
            raise ConfigError("settings of a search space cannot hold stages; those are what is searched")
        self.config_of(self.largest())

    def largest(self) -> Candidate:
        """The network that contains all others."""
        return self._extreme(0)

    def smallest(self) -> Candidate:
        """The network that is contained in all others."""
        return self._extreme(-1)

    def _extreme(self, end: int) -> Candidate:
        stages = []
        for s in self.stages:
            filled = [end == 0 or place not in s.removable for place in range(s.depth)]
            blocks = tuple(BlockChoice(s.num_heads[end], s.mlp_hidden[end], kept) for kept in filled)
            stages.append(StageChoice(s.embed_dim[end], blocks))
        return Candidate(tuple(stages))

    def config_of(self, candidate: Candidate, **overrides: Any) -> ViTResNASConfig:
        """The config that builds a candidate; `overrides` replace its other fields."""
        stages = []
        for choices, stage in zip(self.stages, candidate.stages, strict=True):
            kept = [(block.num_heads, block.mlp_hidden) for block in stage.blocks if block.kept]
            stages.append(_stage_of(stage.embed_dim, choices.head_dim, kept))
        config: ViTResNASConfig = override(ViTResNASConfig(), {**self.settings, **overrides, "stages": tuple(stages)})
        return config

    def count(self) -> int:
        """Number of candidates; a network that several candidates describe counts several times."""
        total = 1
        for stage in self.stages:
            block, free = len(stage.num_heads) * len(stage.mlp_hidden), len(stage.removable)
            total *= len(stage.embed_dim) * block ** (stage.depth - free) * (block + 1) ** free
        return total

    def to_toml(self) -> str:
        """The space as TOML, which `read_space` reads."""
        tables = [f"[settings]\n{toml_lines(self.settings)}"]
        if self.preprocessing is not None:
            tables.append(f"[preprocessing]\n{toml_lines(self.preprocessing.to_dict())}")
        return "\n".join([*tables, *(f"[[stages]]\n{toml_lines(asdict(stage))}" for stage in self.stages)])


def _stage_of(width: int, head_dim: int, blocks: Sequence[tuple[int, int]]) -> Stage:
    """A stage whose blocks have these heads and hidden widths."""
    heads, hidden = zip(*blocks, strict=True)
    return Stage(embed_dim=width, head_dim=head_dim, num_heads=heads, mlp_hidden=hidden)


def candidates_of(space: SearchSpace) -> Iterator[Candidate]:
    """Every candidate of a space; only for small ones, see `SearchSpace.count`."""
    stages = []
    for stage in space.stages:
        filled = [BlockChoice(*chosen) for chosen in product(stage.num_heads, stage.mlp_hidden)]
        empty = BlockChoice(stage.num_heads[0], stage.mlp_hidden[0], kept=False)
        places = [[*filled, empty] if place in stage.removable else filled for place in range(stage.depth)]
        stages.append([StageChoice(width, blocks) for width in stage.embed_dim for blocks in product(*places)])
    return map(Candidate, product(*stages))


def candidate_from_key(space: SearchSpace, key: str) -> Candidate:
    """The network of a `Candidate.key`: its blocks fill the places in order, the last removable places stay empty.

    Raises: ConfigError: no network of this space.
    """
    try:
        parts = [part.partition(": ") for part in key.split(" | ")]
        stages = [
            _placed(choices, int(width), [(int(b.split("x")[0]), int(b.split("x")[1])) for b in blocks.split()])
            for choices, (width, _, blocks) in zip(space.stages, parts, strict=True)
        ]
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{key!r} is no network of this space") from error
    return Candidate(tuple(stages))


def _placed(choices: StageChoices, width: int, blocks: list[tuple[int, int]]) -> StageChoice:
    """A stage of these blocks. Raises: ValueError: another depth or width."""
    missing = choices.depth - len(blocks)
    empty = set(choices.removable[len(choices.removable) - missing :]) if missing else set()
    if not 0 <= missing <= len(choices.removable) or width not in choices.embed_dim:
        raise ValueError("another depth or width")
    left = iter(blocks)
    nothing = BlockChoice(choices.num_heads[0], choices.mlp_hidden[0], kept=False)
    return StageChoice(width, tuple(nothing if i in empty else BlockChoice(*next(left)) for i in range(choices.depth)))


def stages_of(network_def: Iterable[Sequence[Any]]) -> tuple[Stage, ...]:
    """The stages of a network in the authors' notation.

    Args:
        network_def: nested tuples, one an entry: (4, D) or (0, D) for the stem; (1, (D, heads, head_dim), (D, hidden),
            kept) for a block, which is left out where `kept` is 0; (3, D, D') for a reduction; (2, D, classes) for the
            head.

    Raises: ConfigError: an entry of another kind, widths that do not meet, or stages with heads of several widths.
    """
    stages: list[Stage] = []
    width, blocks, head_dims = 0, list[tuple[int, int]](), set[int]()
    for entry in network_def:
        kind = entry[0]
        if kind in (0, 4):
            width = entry[1]
        elif kind == 1:
            (block_width, heads, head_dim), (mlp_width, hidden), kept = entry[1:]
            if not block_width == mlp_width == width:
                raise ConfigError(f"network_def: the block {entry} follows tokens of width {width}")
            if kept:
                blocks.append((heads, hidden))
                head_dims.add(head_dim)
        elif kind in (2, 3) and entry[1] == width:
            if len(head_dims) != 1:
                raise ConfigError(
                    f"network_def: a stage of width {width} has heads of widths {sorted(head_dims)}; expected one"
                )
            stages.append(_stage_of(width, head_dims.pop(), blocks))
            width, blocks = entry[2], []
        else:
            raise ConfigError(f"network_def: the entry {entry} is of no known kind, or follows tokens of width {width}")
    return tuple(stages)


def space_from_toml(text: str) -> SearchSpace:
    """A space from TOML: tables `settings` and `preprocessing`, and a table `stages` for each stage.

    Raises: ConfigError: not TOML, an unknown field, or choices that cannot work.
    """
    data = parse_toml(text)
    known = {"settings", "preprocessing", "stages"}
    if not set(data) <= known:
        raise ConfigError(f"a search space has tables {', '.join(sorted(known))}; not {min(set(data) - known)!r}")
    spec = data.get("preprocessing")
    return SearchSpace(
        stages=tuple(map(_read_stage, data.get("stages", []))),
        settings=data.get("settings", {}),
        preprocessing=None if spec is None else Preprocessing.from_dict(spec),
    )


def _read_stage(table: Mapping[str, Any]) -> StageChoices:
    known = [item.name for item in fields(StageChoices)]
    for name in table:
        if name not in known:
            raise ConfigError(f"unknown field {name!r} of a stage{nearest(name, known)}")
    missing = [name for name in known if name not in table and name != "removable"]
    if missing:
        raise ConfigError(f"a stage lacks {', '.join(missing)}")
    return StageChoices(**table)


def _paper_space(depth: int, unit: int, heads: tuple[tuple[int, ...], ...], widths: tuple[int, ...]) -> SearchSpace:
    """One of the paper's spaces: stages twice as wide as the one before, MLPs in steps of `unit`."""
    stages = (
        StageChoices(
            embed_dim=tuple(width * 2**i for width in widths),
            head_dim=(32, 48, 64)[i],
            num_heads=heads[i],
            mlp_hidden=tuple(unit * 2**i * step for step in range(12, 5, -1)),
            depth=depth,
            removable=(1, 3, 5),
        )
        for i in range(3)
    )
    return SearchSpace(stages=tuple(stages), settings={"patch_head": True})


SPACES: Mapping[str, SearchSpace] = {
    "tiny": _paper_space(6, 64, ((6, 5, 4, 3), (12, 10, 8, 6), (12, 10, 8, 6)), (256, 224, 192, 176, 160)),
    "small": _paper_space(7, 80, ((8, 7, 6, 5), (16, 14, 12, 10), (16, 14, 12, 10)), (320, 280, 240, 220, 200)),
    "small32": SearchSpace(
        stages=tuple(
            StageChoices(
                embed_dim=tuple(width * 2**i for width in (40, 36, 32, 28, 24)),
                head_dim=16,
                num_heads=tuple(heads * 2**i for heads in (3, 2, 1)),
                mlp_hidden=tuple(hidden * 2**i for hidden in (128, 112, 96, 80, 64)),
                depth=4,
                removable=(1, 3),
            )
            for i in range(3)
        ),
        settings={"img_size": 32, "patch_size": 4, "stem_dim": 16, "num_classes": 10},
        preprocessing=Preprocessing(
            resize=32, crop=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)
        ),
    ),
}
"""The paper's two spaces for 224-pixel images, and a small one for 32-pixel images, which two CPU cores can search."""


def read_space(source: str | PathLike[str]) -> SearchSpace:
    """A space by its name in `SPACES`, or from a TOML file.

    Raises: ConfigError: there is neither, or `space_from_toml` refuses the file.
    """
    if isinstance(source, str) and source in SPACES:
        return SPACES[source]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no search space {str(source)!r}{nearest(str(source), SPACES)}; or name a TOML file")
    text = read_text(path)
    try:
        return space_from_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, AttributeError) as error:  # a value in the place of a table
        raise ConfigError(f"{path} is not a search space: {error}") from error
