"""From samples to the model's input on its device: parts joined, copied ahead of the model, kept if they come again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .augment import TrainTransform
from .cache import images_on
from .levels import Plan, ToInput, to_device
from .loading import Batch, each, make_loader
from .records import CachedRecords, ImageRecords
from .samplers import PlannedSamples, TrainingSamples

_PART_BYTES, _PART_IMAGES = 8 << 20, 256
"""The most that a worker makes at once for `InputBatches`: small parts, and an epoch begins soon."""


_PLANNERS = 4


def training_batches(
    records: ImageRecords,
    transform: TrainTransform,
    sampler: Sampler[tuple[int, int]],
    to_input: ToInput,
    *,
    batch_size: int,
    workers: int,
) -> InputBatches:
    """Augmented batches of a set as the model's input, the same wherever and by however many processes they are made.

    Of a set in memory that is only cut, flipped and erased, the device does all of it. Then no process loads; beside a
    GPU a few draw the random numbers ahead, of which one process draws some 60,000 images' a second.
    """
    device = to_input.device
    samples = TrainingSamples(records, transform)
    make: Callable[[Any], Tensor] = to_input
    if isinstance(records, CachedRecords) and transform.cuts(*records.size) and not transform.changes:
        images = images_on(records, device)
        if images is not None:
            samples, make = PlannedSamples(records, transform), _CutThere(images, transform, to_input)
            workers = min(workers, _PLANNERS) if device.type == "cuda" else 0
    return InputBatches(
        samples, sampler, make, batch_size=batch_size, workers=workers, device=device, size=transform.size
    )


class _CutThere:
    """From a plan to the model's input, on the device where the set lies."""

    def __init__(self, images: Tensor, transform: TrainTransform, to_input: ToInput) -> None:
        self.images, self.transform, self.to_input = images, transform, to_input

    def __call__(self, plan: Plan) -> Tensor:
        return self.to_input(self.transform.carry_out(self.images, plan))


class InputBatches:
    """The batches of a sampler as the model's input; read it as often as the sampler.

    On a GPU the next batch is copied and normalised while the model computes with this one. Labels and failures stay on
    the host, pinned beside a GPU.
    """

    def __init__(
        self,
        samples: Dataset[Any],
        sampler: Iterable[Any],
        to_input: Callable[[Any], Tensor],
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        size: tuple[int, int],
        keep: bool = False,
    ) -> None:
        """Prepare a loader.

        Args:
            samples: what the workers make.
            sampler: its keys.
            to_input: from a batch of levels, plans or pixels to (B, 3, H, W) float32 on the device.
            batch_size: of the model's input.
            workers: loading processes.
            device: where the model is.
            size: (height, width) of an image.
            keep: remember what the loader gave, for a sampler and samples that give the same each time.
        """
        part = min(batch_size, _PART_IMAGES, max(_PART_BYTES // (3 * size[0] * size[1]), 1))
        self.loader = make_loader(samples, sampler, batch_size=batch_size, workers=workers, device=device, part=part)
        self.to_input, self.device = to_input, device
        self._images = len(sampler)  # type: ignore[arg-type]
        self._batch_size, self._parts = batch_size, -(-batch_size // part)
        self._keep, self._kept = keep, []  # type: tuple[bool, list[Any]]

    def __len__(self) -> int:
        return -(-self._images // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type != "cuda":
            return map(self._ready, self._batches())
        return self._ahead()

    def _batches(self) -> Iterator[list[Any]]:
        """The parts of each batch."""
        parts = iter(self._kept) if self._kept else self._read()
        while batch := list(islice(parts, self._parts)):
            yield batch

    def _read(self) -> Iterator[Any]:
        kept = []
        for part in self.loader:
            if self._keep:
                kept.append(each(part, Tensor.clone))  # a mapping of shared memory holds a file open
            yield part
        self._kept = kept

    def _ready(self, parts: list[Any]) -> Batch:
        images, labels, failed = _joined(parts, self.device)
        if self.device.type == "cuda":
            labels, failed = labels.pin_memory(), failed.pin_memory()
        return self.to_input(images), labels, failed

    def _ahead(self) -> Iterator[Batch]:
        """One batch ahead of the reader, on a stream of its own."""
        stream, waiting = torch.cuda.Stream(self.device), None  # type: ignore[no-untyped-call]
        for parts in self._batches():
            with torch.cuda.stream(stream):
                batch = self._ready(parts)
            if waiting is not None:
                yield _handed_over(waiting, stream)
            waiting = batch
        if waiting is not None:
            yield _handed_over(waiting, stream)


def _handed_over(batch: Batch, stream: torch.cuda.Stream) -> Batch:
    """Before the reader's stream uses the images, it waits for them; their memory is not reused until it has."""
    current = torch.cuda.current_stream(batch[0].device)
    current.wait_stream(stream)
    batch[0].record_stream(current)
    return batch


def _joined(parts: list[Any], device: torch.device) -> Any:
    """Parts to a batch: pixels on the device, numbers on the host."""
    first = parts[0]
    if isinstance(first, Tensor):
        moved = parts if first.dtype == torch.int64 else [to_device(part, device) for part in parts]
        return moved[0] if len(parts) == 1 else torch.cat(moved)
    columns = [_joined(list(column), device) for column in zip(*parts, strict=True)]
    return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)
