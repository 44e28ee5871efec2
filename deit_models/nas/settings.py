"""Numbers of a search; the command line shows them, so this file needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


def _number(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """Numbers of an evolution; the defaults are the paper's, 3,350 candidates in all."""

    population: int = _number(500, "candidates drawn at random to begin with")
    generations: int = _number(20, "rounds, the random one counted")
    parents: int = _number(75, "the best so far, from which a round is made")
    mutants: int = _number(75, "varied parents in a round")
    crossovers: int = _number(75, "crossed parents in a round")
    mutation: float = _number(0.3, "probability that a mutant draws an item anew")
    crossover: float = _number(0.5, "probability that a crossed candidate takes an item from its second parent")
    # larger networks are better, so smaller ones need no scoring
    floor: float = _number(0.975, "smallest cost, as a fraction of the limit")
    seed: int = _number(0, "of all draws")

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that cannot work."""
        check_whole(self, "population", "generations", "parents", "mutants", "crossovers")
        check_rates(self, "mutation", "crossover", "floor")
