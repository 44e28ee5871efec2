"""Which images, in which order, with which seeds: the same for one process and for many."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ..errors import ConfigError

_WORD = (1 << 64) - 1
_SELECTED_ROUND = 256
"""With repeats, an epoch's length is rounded down to a multiple of this, as the authors' sampler does."""


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """The seed of one sample's augmentation: 63 bits, all well mixed, from nothing but the three numbers.

    Within one seed and epoch, no two positions share their 64-bit word before it is shortened.
    Source: the finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014),
    applied once for each number.
    """
    word = 0
    for part in (seed, epoch, position):
        word = (word + part + 0x9E3779B97F4A7C15) & _WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        word ^= word >> 31
    return word >> 1


class TrainSampler(Sampler[tuple[int, int]]):
    """One epoch's (index, augmentation seed) pairs for one process.

    The epoch is one list of positions, the same whatever the number of processes; optimiser step t owns the positions
    t * batch_size to (t + 1) * batch_size - 1, and process r takes every world-th of them from the r-th. What is left
    over at the end of an epoch is dropped; a set smaller than one batch fills that batch by starting over.

    With repeats R, neighbouring positions hold the same image R times, each with a seed of its own, so the copies fall
    on different processes where there are R or more; an epoch keeps its usual length (rounded down to a multiple of 256
    for sets of 256 images and more), so it meets about 1/R of the images.
    Source: DeiT, section 6; the authors' sampler.

    Differs from the authors' code:
    - repeats are honoured when one process trains alone too; their script then draws without repeats;
    - `seed` enters the order, theirs hangs on the epoch alone;
    - sets smaller than 256 images are not cut to nothing.
    """

    def __init__(
        self, length: int, *, batch_size: int, repeats: int = 1, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        """Plan the epochs.

        Args:
            length: images in the training set.
            batch_size: images of one optimiser step, over all processes and accumulation steps.
            repeats: times each image stands in its epoch's list.
            seed: of order and augmentation.
            rank: this process, from 0.
            world: number of processes.

        Raises: ConfigError: no images, a batch that the processes cannot share evenly, or a rank out of range.
        """
        _check_shard(length, rank, world)
        if repeats < 1:
            raise ConfigError(f"repeats={repeats}; expected 1 or more")
        if length < 1:
            raise ConfigError("a training set without images")
        if batch_size < 1 or batch_size % world:
            raise ConfigError(f"batch_size={batch_size} cannot be shared evenly by {world} processes; use a multiple")
        selected = length
        if repeats > 1 and length >= _SELECTED_ROUND:
            selected -= length % _SELECTED_ROUND
        self.length = length
        self.repeats = repeats
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.steps = max(1, selected // batch_size)
        self._positions = range(rank, self.steps * batch_size, world)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; one begun earlier is not touched."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seed, epoch = self.seed, self.epoch
        # position -1 is no sample's, so the order shares its seed with no augmentation
        generator = torch.Generator().manual_seed(sample_seed(seed, epoch, -1))
        order = torch.randperm(self.length, generator=generator).tolist()
        return (
            (order[position // self.repeats % self.length], sample_seed(seed, epoch, position))
            for position in self._positions
        )

    def __len__(self) -> int:
        """Samples of an epoch that this process draws."""
        return len(self._positions)


class ShardSampler(Sampler[int]):
    """This process's share of an evaluation: every index belongs to exactly one process, none is padded."""

    def __init__(self, length: int, *, rank: int = 0, world: int = 1) -> None:
        """Take rank, rank + world, ... below length. Raises: ConfigError: a rank out of range."""
        _check_shard(length, rank, world)
        self._indices = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def _check_shard(length: int, rank: int, world: int) -> None:
    if length < 0 or world < 1 or not 0 <= rank < world:
        raise ConfigError(f"length={length}, rank={rank}, world={world}; expected 0 <= rank < world and no negative")
