"""Batches as the model's input: read by the loader in parts, joined, on the device one batch ahead of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data.records import ImageRecords
from ..distributed import Process
from ..errors import ConfigError, ImageError
from ..images.transforms import EvalInput, EvalTransform, to_device
from .loading import FINE, Batch, each, make_loader, target_of

_PART_BYTES, _PART_IMAGES = 8 << 20, 256
"""Upper bounds of a part, which a worker makes at once; with small parts an epoch begins soon."""

Transform = Callable[[Any], Any]
"""From an image, as `ImageRecords` give it, to a tensor or, in training, to `Levels`."""


class InputBatches:
    """The batches of a sampler as the model's input; can be read as often as the sampler.

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
        keep_workers: bool = False,
    ) -> None:
        """Prepare a loader, see `make_loader`; the sampler has a length.

        `to_input` turns a batch of samples into (B, C, H, W) float32 on the device. By the images' `size`, (height,
        width), batches are divided into parts. `keep` keeps samples in memory, which must be the same each time, and
        `keep_workers` the processes, from one reading to the next.
        """
        part = min(batch_size, _PART_IMAGES, max(_PART_BYTES // (3 * size[0] * size[1]), 1))
        self.loader = make_loader(
            samples,
            sampler,
            batch_size=batch_size,
            workers=workers,
            device=device,
            part=part,
            keep_workers=keep_workers,
        )
        self.to_input, self.device = to_input, device
        self._images = len(sampler)  # type: ignore[arg-type]
        self._batch_size, self._parts = batch_size, -(-batch_size // part)
        self._keep, self._kept = keep, []  # type: tuple[bool, list[Any]]

    def __len__(self) -> int:
        return -(-self._images // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        return self._ahead(batches) if self.device.type == "cuda" else map(self._ready, batches)

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
        pixels, *numbers = zip(*parts, strict=True)
        images, rest = _joined(list(pixels), self.device), map(torch.cat, numbers)
        if self.device.type == "cuda":
            rest = map(Tensor.pin_memory, rest)
        return (self.to_input(images), *rest)

    def _ahead(self, batches: Iterable[list[Any]], cuda: Any = torch.cuda) -> Iterator[Batch]:
        """One batch ahead of the reader, on a stream of its own."""
        stream, waiting = cuda.Stream(self.device), None

        def handed_over(batch: Batch) -> Batch:
            # the reader's stream waits before it uses the images; their memory is not reused before it has used them
            current = cuda.current_stream(self.device)
            current.wait_stream(stream)
            batch[0].record_stream(current)
            return batch

        for parts in batches:
            with cuda.stream(stream):
                batch = self._ready(parts)
            if waiting is not None:
                yield handed_over(waiting)
            waiting = batch
        if waiting is not None:
            yield handed_over(waiting)


def _joined(parts: list[Any], device: torch.device) -> Any:
    """Parts of pixels to a batch on the device; whole numbers stay on the host."""
    first = parts[0]
    if isinstance(first, Tensor):
        moved = parts if first.dtype == torch.int64 else [to_device(part, device) for part in parts]
        return moved[0] if len(parts) == 1 else torch.cat(moved)
    columns = [_joined(list(column), device) for column in zip(*parts, strict=True)]
    return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)


def eval_batches(
    records: ImageRecords,
    transform: EvalTransform,
    process: Process,
    *,
    batch_size: int,
    workers: int,
    keep: bool = False,
) -> InputBatches:
    """This process's share of a set, for evaluation; with `keep`, images are decoded the first time only.

    Workers pass bytes on; these are normalised on the model's device.
    """
    return InputBatches(
        EvalSamples(records, transform.levels, channels=len(transform.preprocessing.mean)),
        ShardSampler(len(records), rank=process.rank, world=process.world),
        EvalInput(transform.preprocessing, process.device, normalise=transform.normalise),
        batch_size=batch_size,
        workers=workers,
        device=process.device,
        size=transform.preprocessing.crop,
        keep=keep,
    )


class EvalSamples(Dataset[tuple[Any, int, int]]):
    """Evaluation samples, made by the loader's workers: index -> (tensor, label, failed index or FINE).

    An image that cannot be read comes as zeros with label -1; it is counted as skipped and never scored.
    """

    def __init__(self, records: ImageRecords, transform: Transform, *, channels: int = 3) -> None:
        self.records = records
        self.transform = transform
        self.channels = channels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        try:
            image, label = self.records[index]
            return self.transform(image), target_of(label, self.records), FINE
        except (ImageError, OSError):
            blank = PIL.Image.new("RGB", (64, 64)) if self.channels == 3 else torch.zeros(self.channels, 64, 64)
            return torch.zeros_like(self.transform(blank)), target_of(-1, self.records), index


class ShardSampler(Sampler[int]):
    """This process's share of an evaluation: every index belongs to exactly one process, none is padded."""

    def __init__(self, length: int, *, rank: int = 0, world: int = 1) -> None:
        """Take rank, rank + world, ... below length. Raises: ConfigError: a rank out of range."""
        check_shard(length, rank, world)
        self._indices = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def check_shard(length: int, rank: int, world: int) -> None:
    """Raise ConfigError unless the rank is that of one of `world` processes that share `length` images."""
    if length < 0 or world < 1 or not 0 <= rank < world:
        raise ConfigError(f"length={length}, rank={rank}, world={world}; expected 0 <= rank < world and no negative")
