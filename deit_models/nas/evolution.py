"""Evolution among the networks of a space: the best of a generation are varied and crossed to make the next.

It needs no weights and no images: the caller's function scores the candidates. All draws come from one generator, so
that the same seed and scores give the same search. A search that was interrupted is run again from the start, and finds
the scores it had in its ledger. Source: section 4.3 of the ViT-ResNAS paper; numbers as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from ..errors import ConfigError
from .costs import Cost
from .settings import Evolution
from .space import BlockChoice, Candidate, SearchSpace, StageChoice, StageChoices, candidates_of

T = TypeVar("T")
_TRIES = 1000
"""Draws in a row that are too large, too small or known already, after which a search assumes there is no other."""
_FEW = 5000
"""Networks up to which every one of a space is looked at."""


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate with its cost, its accuracy in percent, and the generation (from 0) that brought it up."""

    candidate: Candidate
    cost: float
    top1: float
    generation: int


def evolve(
    space: SearchSpace,
    settings: Evolution,
    *,
    cost: Cost,
    limit: float,
    score: Callable[[Sequence[Candidate]], list[float]],
    on_generation: Callable[[list[ScoredCandidate]], None] | None = None,
) -> list[ScoredCandidate]:
    """Search a space for the best network whose cost is from `settings.floor * limit` to `limit`.

    Args:
        space: the space.
        settings: numbers of the evolution.
        cost: gives the cost of a candidate.
        limit: the largest cost.
        score: gives the accuracy of each of some candidates.
        on_generation: called with all candidates so far after each generation.

    Returns: every scored candidate, the best first; of equally good ones the cheaper first. Fewer than asked for where
        the space has no more.
    Raises: ConfigError: no network of the space is within the limit.
    """
    hunt = _Hunt(space, settings, cost, limit)
    found: list[ScoredCandidate] = []
    for generation in range(settings.generations):
        fresh = hunt.first() if generation == 0 else hunt.next(found)
        if not fresh:
            break
        for candidate, top1 in zip(fresh, score(fresh), strict=True):
            found.append(ScoredCandidate(candidate, cost(candidate), top1, generation))
        found.sort(key=lambda one: (-one.top1, one.cost, one.candidate.key()))
        if on_generation is not None:
            on_generation(found)
    return found


def check_limit(space: SearchSpace, settings: Evolution, *, cost: Cost, limit: float) -> None:
    """Raise ConfigError where `evolve` would find no network within the limit; draws as few as that takes."""
    # a small space is looked through as in the search; in a large one the search's first network is enough
    population = settings.population if space.count() <= _FEW else 1
    _Hunt(space, replace(settings, population=population), cost, limit).first()


class _Hunt:
    """State of a search: its generator, and the networks it has met."""

    def __init__(self, space: SearchSpace, settings: Evolution, cost: Cost, limit: float) -> None:
        self.space, self.settings, self.cost, self.limit = space, settings, cost, limit
        self.rng = Random(settings.seed)
        self.met: set[str] = set()

    def first(self) -> list[Candidate]:
        """The random generation; every legal network where there are no more than it asks for."""
        self._check_limit()
        if self.space.count() <= _FEW:
            legal = {c.key(): c for c in candidates_of(self.space) if self._legal(c)}
            if not legal:
                raise ConfigError(self._nothing())
            if len(legal) <= self.settings.population:
                return self._new(iter(legal.values()).__next__, len(legal))
        fresh = self._new(self._random, self.settings.population)
        if not fresh:
            raise ConfigError(f"{self._nothing()} ({_TRIES} tries)")
        return fresh

    def next(self, found: list[ScoredCandidate]) -> list[Candidate]:
        """A generation made from the best so far; empty where it brings up nothing new."""
        parents = [one.candidate for one in found[: self.settings.parents]]
        mutants = self._new(lambda: self._mutant(parents), self.settings.mutants)
        return mutants + self._new(lambda: self._crossed(parents), self.settings.crossovers)

    def _new(self, make: Callable[[], Candidate | None], count: int) -> list[Candidate]:
        """Up to `count` legal networks that were not met before; fewer where many tries in a row give none."""
        fresh: list[Candidate] = []
        misses = 0
        while len(fresh) < count and misses < _TRIES:
            candidate = make()
            misses += 1
            if candidate is not None and candidate.key() not in self.met and self._legal(candidate):
                self.met.add(candidate.key())
                fresh.append(candidate)
                misses = 0
        return fresh

    def _legal(self, candidate: Candidate) -> bool:
        return self.settings.floor * self.limit <= self.cost(candidate) <= self.limit

    def _check_limit(self) -> None:
        smallest, largest = self.cost(self.space.smallest()), self.cost(self.space.largest())
        if smallest > self.limit or largest < self.settings.floor * self.limit:
            raise ConfigError(
                f"{self._nothing()}: its networks take {smallest:,.6g} to {largest:,.6g} {self.cost.unit}"
            )

    def _nothing(self) -> str:
        low, high = self.settings.floor * self.limit, self.limit
        return f"no network of the space is within the limit of {low:,.6g} to {high:,.6g} {self.cost.unit}"

    def _random(self) -> Candidate | None:
        stages = []
        for choices in self.space.stages:
            width, blocks = self.rng.choice(choices.embed_dim), []
            for place in range(choices.depth):
                kept = place not in choices.removable or self._happens(0.5)
                blocks.append(BlockChoice(choices.num_heads[0], choices.mlp_hidden[0], kept))
            stages.append(StageChoice(width, tuple(blocks)))
        return self._cut_down(Candidate(tuple(stages)))

    def _cut_down(self, candidate: Candidate) -> Candidate | None:
        """The candidate, made smaller at random until it is within the limit; None: that is not possible."""
        for step in range(_TRIES):
            if self.cost(candidate) <= self.limit:
                return candidate
            # heads and MLPs first, widths and whole blocks only where those do not suffice
            candidate = self._smaller(candidate, anything=step >= 100)
        return None

    def _smaller(self, candidate: Candidate, *, anything: bool) -> Candidate:
        number = self.rng.randrange(len(candidate.stages))
        choices, stage = self.space.stages[number], candidate.stages[number]
        place = self.rng.randrange(choices.depth)
        block = stage.blocks[place]
        part = self.rng.choice(("heads", "hidden", "width", "block") if anything else ("heads", "hidden"))
        if part == "width":
            stage = replace(stage, embed_dim=_below(stage.embed_dim, choices.embed_dim))
        elif part == "block":
            block = replace(block, kept=block.kept and place not in choices.removable)
        elif part == "heads":
            block = replace(block, num_heads=_below(block.num_heads, choices.num_heads))
        else:
            block = replace(block, mlp_hidden=_below(block.mlp_hidden, choices.mlp_hidden))
        stage = replace(stage, blocks=_exchanged(stage.blocks, place, block))
        return Candidate(_exchanged(candidate.stages, number, stage))

    def _mutant(self, parents: list[Candidate]) -> Candidate:
        return Candidate(tuple(map(self._mutated, self.space.stages, self.rng.choice(parents).stages)))

    def _mutated(self, choices: StageChoices, stage: StageChoice) -> StageChoice:
        blocks = []
        for place, block in enumerate(stage.blocks):
            heads = self._redrawn(block.num_heads, choices.num_heads)
            hidden = self._redrawn(block.mlp_hidden, choices.mlp_hidden)
            toggled = place in choices.removable and self._happens(self.settings.mutation)
            blocks.append(BlockChoice(heads, hidden, block.kept ^ toggled))
        return StageChoice(self._redrawn(stage.embed_dim, choices.embed_dim), tuple(blocks))

    def _redrawn(self, value: int, choices: tuple[int, ...]) -> int:
        return self.rng.choice(choices) if self._happens(self.settings.mutation) else value

    def _crossed(self, parents: list[Candidate]) -> Candidate | None:
        if len(parents) < 2:
            return None
        one, other = self.rng.sample(parents, 2)
        return Candidate(tuple(map(self._crossed_stage, one.stages, other.stages)))

    def _crossed_stage(self, one: StageChoice, other: StageChoice) -> StageChoice:
        width, blocks = self._either(one.embed_dim, other.embed_dim), []
        for a, b in zip(one.blocks, other.blocks, strict=True):
            heads, hidden = self._either(a.num_heads, b.num_heads), self._either(a.mlp_hidden, b.mlp_hidden)
            blocks.append(BlockChoice(heads, hidden, self._either(a.kept, b.kept)))
        return StageChoice(width, tuple(blocks))

    def _either(self, one: T, other: T) -> T:
        return other if self._happens(self.settings.crossover) else one

    def _happens(self, probability: float) -> bool:
        return self.rng.random() < probability


def _exchanged(values: tuple[T, ...], place: int, value: T) -> tuple[T, ...]:
    """The tuple with another value at one place."""
    return (*values[:place], value, *values[place + 1 :])


def _below(value: int, choices: tuple[int, ...]) -> int:
    """The next smaller choice, or the smallest."""
    return choices[min(choices.index(value) + 1, len(choices) - 1)]
