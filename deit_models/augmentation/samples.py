"""Training samples: their order, the seed of each, and the batches made of them; the same for one process and many."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate, get_worker_info

from ..batches.inputs import InputBatches, Transform, check_shard
from ..batches.loading import FINE, target_of
from ..batches.memory import images_on
from ..data.records import CachedRecords, ImageRecords, always_the_same
from ..errors import ConfigError, DataError, ImageError
from .augment import TrainTransform, drawn_rng, sample_rng
from .levels import TrainInput

_T = TypeVar("_T")
Keys = Sequence[tuple[int, int]]
"""Indices of images, each with the seed of its augmentation."""

_ODD, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_AT_ONCE = 1 << 16
"""Positions whose seeds are computed together."""
_SELECTED_ROUND = 256
"""With repeats, an epoch's length is rounded down to a multiple of this, as the authors' sampler does."""


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """The seed of one sample's augmentation, see `sample_seeds`."""
    return int(sample_seeds(seed, epoch, torch.tensor([position])))


def sample_seeds(seed: int, epoch: int, positions: Tensor) -> Tensor:
    """Seeds of the augmentation of samples, (N,) int64: 63 well mixed bits, computed from the three numbers.

    Within one seed and epoch, no two positions share their 64-bit word before it is shortened.
    Source: the finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014),
    applied once for each number.
    """
    word = torch.zeros((), dtype=torch.int64)
    for part in (_signed(seed), _signed(epoch), positions):
        word = word + part + _signed(_ODD)
        word = (word ^ _shifted(word, 30)) * _signed(_FIRST)
        word = (word ^ _shifted(word, 27)) * _signed(_SECOND)
        word = word ^ _shifted(word, 31)
    return _shifted(word, 1)


def _signed(word: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return ((word + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


class TrainSampler(Sampler[tuple[int, int]]):
    """One epoch's (index, augmentation seed) pairs for one process.

    The epoch is one list of positions, the same for any number of processes; optimiser step t owns the positions
    t * batch_size to (t + 1) * batch_size - 1, and process r takes every world-th of them from the r-th. The rest of an
    epoch is dropped; a set smaller than one batch fills that batch by starting over.

    With repeats R, neighbouring positions hold the same image R times, each with a seed of its own, so the copies fall
    on different processes where there are R or more; an epoch keeps its usual length (rounded down to a multiple of 256
    for sets of 256 images and more), so it meets about 1/R of the images.
    Source: DeiT, section 6; the authors' sampler.

    With `classes` an epoch has as many images, each class equally often: classes take turns, each going through its
    images in a random order and beginning again at their end.

    Differs from the authors' code:
    - repeats are honoured when one process trains alone too; their script then draws without repeats;
    - the order depends on `seed`, theirs on the epoch alone;
    - sets smaller than 256 images are not cut to nothing.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Plan the epochs of a set of so many images.

        `batch_size` counts the images of one optimiser step, over all processes and accumulation steps; `repeats`, how
        often an image stands in its epoch's list; `seed` is that of order and augmentation; `classes` has a number for
        each image, below 0 for those to leave out.

        Raises: ConfigError: no images, a batch that the processes cannot share evenly, or a rank out of range.
        """
        check_shard(length, rank, world)
        if repeats < 1:
            raise ConfigError(f"repeats={repeats}; expected 1 or more")
        if length < 1:
            raise ConfigError("a training set without images")
        if batch_size < 1 or batch_size % world:
            raise ConfigError(f"batch_size={batch_size} cannot be shared evenly by {world} processes; use a multiple")
        selected = length
        if repeats > 1 and length >= _SELECTED_ROUND:
            selected -= length % _SELECTED_ROUND
        self.length, self.repeats, self.seed, self.epoch = length, repeats, seed, 0
        self.steps = max(1, selected // batch_size)
        self.classes = None if classes is None else torch.tensor(classes)
        self._positions = range(rank, self.steps * batch_size, world)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; one begun earlier is not touched."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seed, epoch = self.seed, self.epoch
        # position -1 is no sample's, so the order shares its seed with no augmentation
        generator = torch.Generator().manual_seed(sample_seed(seed, epoch, -1))
        order = torch.randperm(self.length, generator=generator)
        order = order if self.classes is None else balanced_order(order, self.classes, generator)

        def drawn() -> Iterator[tuple[int, int]]:
            for start in range(0, len(self._positions), _AT_ONCE):
                few = self._positions[start : start + _AT_ONCE]
                positions = torch.arange(few.start, few.stop, few.step)
                indices = order[positions // self.repeats % self.length]
                yield from zip(indices.tolist(), sample_seeds(seed, epoch, positions).tolist(), strict=True)

        return drawn()

    def __len__(self) -> int:
        """Samples of an epoch that this process draws."""
        return len(self._positions)


def balanced_order(order: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """As many images, with each class equally often, see `TrainSampler`; the order is random again.

    Shape: two of (N,) int64, of which classes below 0 are left out -> (N,) int64.
    """
    known = order[classes[order] >= 0]
    _, found, images = torch.unique(classes[known], return_inverse=True, return_counts=True)
    grouped, starts = known[found.argsort(stable=True)], images.cumsum(0) - images
    places = torch.arange(len(order))
    turns = torch.randperm(len(images), generator=generator)[places % len(images)]
    drawn = grouped[starts[turns] + places // len(images) % images[turns]]
    return drawn[torch.randperm(len(order), generator=generator)]


class TrainingSamples(Dataset[tuple[Any, ...]]):
    """Training samples, made by the loader's workers: (index, seed) -> (changed image, label, failed index or FINE).

    All randomness of a sample comes from its seed, so it is the same whichever process reads it, and when. An image
    that cannot be read is replaced by the next of a few `substitutes`; the third value is then its index, to be
    reported. `planned` samples are the `Plan` of each batch instead of its levels, for a set on the model's device.
    With `located` a fourth value is the place of the pixels, (6,) float64: the image's number, `TrainTransform.seen`.
    """

    def __init__(
        self,
        records: ImageRecords,
        transform: Transform,
        *,
        substitutes: int = 5,
        planned: bool = False,
        located: bool = False,
    ) -> None:
        self.records, self.transform = records, transform
        self.substitutes, self.planned, self.located = substitutes, planned, located

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        """One augmented sample. Raises: DataError: neither the image nor any of its substitutes can be read."""
        index, seed = key
        if not isinstance(self.transform, TrainTransform):  # an ImageError of which is a mistake and no damaged image
            with _seeded(seed):
                (image, label), failed = self._readable(index, self.records.__getitem__)
                return self.transform(image), target_of(label, self.records), failed
        transform = self.transform
        # such a pair draws from no global generator, so it needs no seed: a sixth of the time of a small image
        unseeded = always_the_same(self.records)

        def made(number: int) -> tuple[Any, Any, list[Tensor]]:
            image, label = self.records[number]
            rng = sample_rng(seed) if unseeded else drawn_rng()
            state = rng.getstate() if self.located else None
            levels = transform(image, rng)
            if state is None:
                return levels, label, []
            rng.setstate(state)
            height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
            place = (number, *transform.seen(height, width, rng))
            return levels, label, [torch.tensor(place, dtype=torch.float64)]

        with nullcontext() if unseeded else _seeded(seed):
            (levels, label, place), failed = self._readable(index, made)
        return (levels, target_of(label, self.records), failed, *place)

    def batch(self, keys: Keys) -> tuple[Any, ...]:
        """The samples of some keys, joined; images in memory that need no resizing are cut all at once."""
        pair = _cut_at_once(self.records, self.transform)
        if pair is None:
            samples: tuple[Any, ...] = tuple(default_collate([self[key] for key in keys]))
            return samples
        records, transform = pair
        rows, seeds = (list(column) for column in zip(*keys, strict=True))
        failed = [FINE] * len(rows)
        if records.broken:
            rows, failed = map(list, zip(*(self._readable(index, records.readable) for index in rows), strict=True))
        if self.planned:
            images: Any = transform.plan(records.size, rows, seeds)
        else:
            images = transform.cut_batch(records.images, rows, seeds)
        labels = records.labels[rows]
        seen = zip(rows, seeds, strict=True) if self.located else ()
        places = [(row, *transform.seen(*records.size, sample_rng(seed))) for row, seed in seen]
        located = [torch.tensor(places, dtype=torch.float64)] if places else []
        return (images, labels.float() if records.multi_label else labels, torch.tensor(failed), *located)

    def _readable(self, index: int, read: Callable[[int], _T]) -> tuple[_T, int]:
        """An image as `read` gives it, and FINE; or the next that can be read, and the index."""
        for attempt in range(self.substitutes + 1):
            try:
                return read((index + attempt) % len(self.records)), index if attempt else FINE
            except (ImageError, OSError) as error:
                last = error
        raise DataError(
            f"{self.records.describe(index)} and the {self.substitutes} images after it cannot be read; last: {last}"
        ) from last


def _cut_at_once(records: ImageRecords, transform: Transform) -> tuple[CachedRecords, TrainTransform] | None:
    """The set and the transform, if the set is in memory and the transform does not resize its images."""
    if isinstance(records, CachedRecords) and isinstance(transform, TrainTransform) and transform.cuts(*records.size):
        return records, transform
    return None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, `random` and a loaded numpy; the main process gets its states back afterwards.

    Differs from torch.manual_seed: leaves the accelerators alone, which takes less time.
    """
    numpy = sys.modules.get("numpy")
    in_worker = get_worker_info() is not None
    if not in_worker:
        torch_state, random_state = torch.default_generator.get_state(), random.getstate()
        numpy_state = numpy.random.get_state() if numpy else None
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        if not in_worker:
            torch.default_generator.set_state(torch_state)
            random.setstate(random_state)
            if numpy:
                numpy.random.set_state(numpy_state)


_PLANNERS = 4


def training_batches(
    records: ImageRecords,
    transform: TrainTransform,
    sampler: Sampler[tuple[int, int]],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    located: bool = False,
) -> InputBatches:
    """Augmented batches of a set as the model's input; they do not depend on the device or the number of workers.

    `located`: each batch says where its pixels lie, see `TrainingSamples`.

    If a set in memory is only cut, flipped and erased, the device does all of it. Then no process loads; beside a GPU a
    few draw the random numbers ahead, one of them for some 60,000 images a second.
    """
    to_input = TrainInput(transform.preprocessing, device)
    pair = None if transform.changes else _cut_at_once(records, transform)
    images = None if pair is None else images_on(pair[0], device)
    if images is not None:
        workers = min(workers, _PLANNERS) if device.type == "cuda" else 0

    return InputBatches(
        TrainingSamples(records, transform, planned=images is not None, located=located),
        sampler,
        to_input if images is None else lambda plan: to_input(transform.carry_out(images, plan)),
        batch_size=batch_size,
        workers=workers,
        device=device,
        size=transform.size,
        keep_workers=True,
    )
