"""The search spaces that come with the package, and those in files."""
# MERGED """Networks in the authors' notation: nested tuples, read into stages."""
# MERGED """The numbers of a search, which the command line shows without loading torch."""
# MERGED """What a search may choose from, and one choice of it: a candidate. A space is a stack of stages; each has some possible widths, and a number of block places, each with some possible numbers of heads and hidden widths, and some of which may stay empty. Source: section 4 of the ViT-ResNAS paper. """

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

from ..checkpoint import Preprocessing
from ..config import check_rates, check_whole, nearest, override
from ..errors import ConfigError
from ..files import parse_toml, toml_lines
from ..models.vit_resnas import Stage, ViTResNASConfig


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How candidates are drawn while the super-network trains; the defaults are the paper's.

    Attributes:
        images: images of a batch for each candidate; a batch of 128 trains two candidates with 64.
        warmup_epochs: epochs until every choice may be drawn. At first all is at its largest; smaller choices join one
            by one, and at the start of each of these epochs channels are sorted by importance.
    """

    images: int = 64
    warmup_epochs: int = 30

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that cannot work."""
        check_whole(self, "images")
        if self.warmup_epochs < 0:
            raise ConfigError(f"warmup_epochs={self.warmup_epochs}; expected 0 or more")

    def enabled(self, choices: int, epoch: int) -> int:
        """How many of an item's choices, the largest first, may be drawn in an epoch (from 0)."""
        if epoch >= self.warmup_epochs:
            return choices
        return min(1 + epoch * (choices - 1) // self.warmup_epochs, choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """The numbers of a search; the defaults are the paper's, 3,350 candidates in all.

    Attributes:
        population: candidates drawn at random to begin with.
        generations: rounds, the random one counted.
        parents: the best so far, from which a generation is made.
        mutants: candidates of a generation that are varied parents.
        crossovers: candidates of a generation that are crossed parents.
        mutation: probability that a mutant draws an item anew.
        crossover: probability that a crossed candidate takes an item from its second parent.
        floor: smallest cost, as a fraction of the limit; larger networks are better, so smaller ones need no scoring.
        seed: of all draws.
    """

    population: int = 500
    generations: int = 20
    parents: int = 75
    mutants: int = 75
    crossovers: int = 75
    mutation: float = 0.3
    crossover: float = 0.5
    floor: float = 0.975
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that cannot work."""
        check_whole(self, "population", "generations", "parents", "mutants", "crossovers")
        check_rates(self, "mutation", "crossover", "floor")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoices:
    """What one stage may be.

    Attributes:
        embed_dim: widths, the largest first, as all choices are given.
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
        """Raise ConfigError for choices that are no whole numbers from large to small, or places that are not there."""
        check_whole(self, "head_dim", "depth")
        for name in ("embed_dim", "num_heads", "mlp_hidden", "removable"):
            values = getattr(self, name)
            object.__setattr__(self, name, values := tuple([values] if isinstance(values, int) else values))
            order = sorted(set(values), reverse=name != "removable")
            if not all(type(value) is int for value in values) or list(values) != order:
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
    """One choice of everything in a space. Empty places remember what they would hold: evolution can bring it back."""

    stages: tuple[StageChoice, ...]

    def key(self) -> str:
        """The network in one line, such as "48: 2x96 - 1x72 | ...": equal for candidates that are the same network."""
        return " | ".join(
            f"{stage.embed_dim}: {' '.join(f'{b.num_heads}x{b.mlp_hidden}' for b in stage.blocks if b.kept)}"
            for stage in self.stages
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The stages' choices, and what all networks of the space have in common.

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
        return Candidate(
            tuple(
                StageChoice(s.embed_dim[0], (BlockChoice(s.num_heads[0], s.mlp_hidden[0]),) * s.depth)
                for s in self.stages
            )
        )

    def smallest(self) -> Candidate:
        """The network that all others contain."""
        return Candidate(
            tuple(
                StageChoice(
                    s.embed_dim[-1],
                    tuple(BlockChoice(s.num_heads[-1], s.mlp_hidden[-1], i not in s.removable) for i in range(s.depth)),
                )
                for s in self.stages
            )
        )

    def config_of(self, candidate: Candidate, **overrides: Any) -> ViTResNASConfig:
        """The config that builds a candidate; `overrides` replace its other fields."""
        stages = []
        for choices, stage in zip(self.stages, candidate.stages, strict=True):
            kept = [block for block in stage.blocks if block.kept]
            stages.append(
                Stage(
                    embed_dim=stage.embed_dim,
                    head_dim=choices.head_dim,
                    num_heads=tuple(block.num_heads for block in kept),
                    mlp_hidden=tuple(block.mlp_hidden for block in kept),
                )
            )
        config: ViTResNASConfig = override(ViTResNASConfig(), {**self.settings, **overrides, "stages": tuple(stages)})
        return config

    def count(self) -> int:
        """How many choices there are; a network that comes about in two ways counts twice."""
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


def candidate_from_key(space: SearchSpace, key: str) -> Candidate:
    """The network behind a `Candidate.key`: its blocks stand in the first places that must or may hold one.

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
    """A stage of these blocks; the last removable places stay empty. Raises: ValueError: they do not fit."""
    missing = choices.depth - len(blocks)
    empty = set(choices.removable[len(choices.removable) - missing :]) if missing else set()
    if not 0 <= missing <= len(choices.removable) or width not in choices.embed_dim:
        raise ValueError("another depth or width")
    left = iter(blocks)
    nothing = BlockChoice(choices.num_heads[0], choices.mlp_hidden[0], kept=False)
    return StageChoice(width, tuple(nothing if i in empty else BlockChoice(*next(left)) for i in range(choices.depth)))


def candidates_of(space: SearchSpace) -> Iterator[Candidate]:
    """Every candidate of a space; only for small ones, see `SearchSpace.count`."""
    stages = []
    for stage in space.stages:
        places = [
            [
                BlockChoice(heads, hidden, kept)
                for kept in ((True, False) if place in stage.removable else (True,))
                for heads in (stage.num_heads if kept else stage.num_heads[:1])
                for hidden in (stage.mlp_hidden if kept else stage.mlp_hidden[:1])
            ]
            for place in range(stage.depth)
        ]
        stages.append([StageChoice(width, blocks) for width in stage.embed_dim for blocks in product(*places)])
    for chosen in product(*stages):
        yield Candidate(chosen)


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
    try:
        return space_from_toml(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error
