"""Numbers of a search; the command line shows them, so this file needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check_rates, check_whole
from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Numbers for drawing candidates while the super-network trains; the defaults are the paper's.

    Attributes:
        images: images of a batch for each candidate; a batch of 128 trains two candidates with 64.
        warmup_epochs: epochs until every choice may be drawn. At first only the largest choices are drawn; smaller ones
            join one by one, and at the start of each of these epochs channels are sorted by importance.
    """

    images: int = 64
    warmup_epochs: int = 30

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that cannot work."""
        check_whole(self, "images")
        if self.warmup_epochs < 0:
            raise ConfigError(f"warmup_epochs={self.warmup_epochs}; expected 0 or more")

    def enabled(self, choices: int, epoch: int) -> int:
        """Number of an item's choices, the largest first, that may be drawn in an epoch (from 0)."""
        if epoch >= self.warmup_epochs:
            return choices
        return min(1 + epoch * (choices - 1) // self.warmup_epochs, choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """Numbers of an evolution; the defaults are the paper's, 3,350 candidates in all.

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
