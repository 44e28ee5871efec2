"""From paths to batches of pixels: in order, by threads or processes, a few batches in memory at any time.

And what is found in a batch on its way back, so that a GPU is at work on the next one meanwhile.
"""
# MERGED """Batches from a set of images: worker processes, pinned memory, and which images could not be read."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from ..distributed import Process
from ..errors import ConfigError, DataError, DeitModelsError, ImageError, TrainingError
from .records import ImageRecords

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W) float32, labels (B,), and for each sample FINE or the index of the image that could not be read;
in evaluation the label of such an image is -1."""
FINE = -1


def default_workers(device: torch.device) -> int:
    """Loading processes for one training process: up to 12 beside a GPU; one beside a CPU, whose cores are wanted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = max(torch.cuda.device_count(), 1) if device.type == "cuda" else 1
    return min(12, max(cores // gpus - 1, 1)) if device.type == "cuda" else min(1, cores - 1)


def make_loader(
    samples: Dataset[Any],
    sampler: Iterable[Any],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    part: int | None = None,
    keep_workers: bool = False,
) -> DataLoader[Any]:
    """A loader in the sampler's order, the same whatever the number of workers.

    It gives `Batch`es; of training samples, with `levels.Levels` or `levels.Plan` in the place of images. A worker
    makes a whole batch, or a `part` of one: no sample travels alone.

    A loader draws a number to begin with, each time only where its workers do not persist; from a generator of its own,
    or mixing and stochastic depth would depend on the workers, and on whether a run was interrupted.

    Raises: ConfigError: no image at once, or fewer than no workers.
    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"batch_size={batch_size}, workers={workers}; expected 1 or more, and 0 or more")
    return _Loader(
        _WholeParts(samples),
        batch_size=None,
        sampler=_Parts(sampler, batch_size, part or batch_size),
        num_workers=workers,
        persistent_workers=workers > 0 and keep_workers,
        collate_fn=_packed,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


class _Parts(Sampler[list[Any]]):
    """A sampler's keys in parts of at most so many, none of which belongs to two batches."""

    def __init__(self, sampler: Iterable[Any], batch_size: int, part: int) -> None:
        self.sampler, self.batch_size, self.part = sampler, batch_size, part

    def __iter__(self) -> Iterator[list[Any]]:
        keys = iter(self.sampler)
        while batch := list(islice(keys, self.batch_size)):
            yield from (batch[start : start + self.part] for start in range(0, len(batch), self.part))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)  # type: ignore[arg-type]
        return whole * -(-self.batch_size // self.part) + -(-rest // self.part)


class _WholeParts(Dataset[Any]):
    """Samples by lists of keys, joined where they are made."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, keys: list[Any]) -> Any:
        make = getattr(self.samples, "batch", None)
        return default_collate([self.samples[key] for key in keys]) if make is None else make(keys)


def each(part: Any, change: Callable[[Any], Any]) -> Any:
    """A part of a batch, nested in tuples, with every value changed."""
    if isinstance(part, (list, tuple)):  # DataLoader's thread that pins makes lists of plain tuples
        changed = [each(member, change) for member in part]
        return type(part)(*changed) if hasattr(part, "_fields") else tuple(changed)
    return change(part)


def _packed(part: Any) -> Any:
    """For the way out of a worker: pixels in shared memory, numbers as arrays, which are pickled in place.

    Each tensor costs a file descriptor and 0.15 ms on the other side. Shared here and not by the queue's thread, where
    a lack of shared memory would be printed and the part never arrive.
    """
    if get_worker_info() is None:
        return part
    return each(part, _light)


def _light(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.numpy() if value.dtype == torch.int64 else value.share_memory_()  # type: ignore[no-untyped-call]


def _unpacked(part: Any) -> Any:
    return each(part, lambda value: torch.from_numpy(value) if hasattr(value, "__array_interface__") else value)


class _Loader(DataLoader[Any]):
    """A loader whose workers leave Ctrl-C to their parent, with which they end.

    A terminal sends it to every process, and a worker that was forked just then would print a traceback.
    """

    def __iter__(self) -> Any:
        return map(_unpacked, self._parts())

    def _parts(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the workers inherit it
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def explained_worker_failure(workers: int) -> Iterator[None]:
    """Turn the loader's deaths into one line that says what to do, and its workers' errors back into their one line.

    Raises: TrainingError: a worker was killed, mostly for lack of shared memory.
    """
    try:
        yield
    except DeitModelsError as error:
        text = str(error)
        if not text.startswith("Caught "):
            raise
        # the loader's words, then the worker's traceback, which ends in the message
        raise type(error)(text.rstrip().rpartition("\n")[2].partition(": ")[2]) from error
    except (RuntimeError, OSError, EOFError) as error:
        hung_up = workers > 0 and isinstance(error, (ConnectionError, EOFError))
        if not hung_up and not any(sign in str(error) for sign in _WORKER_DEATHS):
            raise
        if hung_up:
            # torch raises RuntimeError wherever the signal of the worker's death finds us: let it find us here
            with suppress(RuntimeError):
                time.sleep(1)
        raise TrainingError(
            f"a loading process died, most likely for lack of memory in /dev/shm or of main memory; use fewer than "
            f"{workers} workers (0 loads in the training process), or give the container more (docker run --shm-size)"
        ) from error


_WORKER_DEATHS = (
    *("DataLoader worker (pid", "shared memory(shm)", "shared memory object", "torch_shm_manager", "of ancdata"),
    *("Too many open files", "unable to open file </torch_", "unable to mmap", "unable to write to file </torch_"),
)
"""Signs, in the messages of torch and of the operating system, that processes could not pass tensors to each other."""


Watch = Callable[[Iterable[Any], int], Iterable[Any]]
"""Passes batches on, given how many there will be; where a progress bar hooks in."""


def plain_watch(batches: Iterable[Any], total: int) -> Iterable[Any]:  # noqa: ARG001
    """No progress bar."""
    return batches


class DamageCount:
    """Counts the images that could not be read, names each once, and stops a run that has met too many.

    Too many are more than `limit` of all images, and three or more. Of all, not of those seen so far: early on, or
    where broken ones lie side by side, that share is high by chance.
    """

    def __init__(self, records: ImageRecords, limit: float, *, failed: Iterable[int] = ()) -> None:
        """Begin with the images that are known to have `failed`, in a run that goes on."""
        self.records = records
        self.limit = limit
        self.failed = set(failed)

    def add(self, failures: Tensor) -> None:
        """Note one batch. Raises: DataError: too many images failed."""
        for index in failures[failures >= 0].tolist():
            if index not in self.failed:
                self.failed.add(index)
                logger.warning("skipped an image that cannot be read: %s", self.records.describe(index))
        self._check()

    def meet(self, process: Process) -> int:
        """Share with the other processes what each found, and give the number. Raises: DataError: too many failed."""
        self.failed.update(*process.gather(self.failed))
        self._check()
        return len(self.failed)

    def _check(self) -> None:
        if len(self.failed) > max(self.limit * len(self.records), 2):
            raise DataError(
                f"at least {len(self.failed)} of the {len(self.records)} images of {self.records.name} cannot be read, "
                f"more than the limit of {self.limit:.1%}; one of them is {self.records.describe(max(self.failed))}"
            )


Decoded = tuple[str, Tensor | None, str | None]
"""A path and its pixels and None, or a path and None and why it has no pixels."""
_MOST_WORKERS = 12


class FileBatch(NamedTuple):
    """Some files in order: their paths, for each None or why it could not be decoded, the pixels of the others."""

    sources: list[str]
    errors: list[str | None]
    images: Tensor


def file_batches(
    paths: Iterable[str | PathLike[str]],
    decode: Callable[[str], Tensor],
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> Iterator[FileBatch]:
    """Decode files in batches; paths are drawn as needed.

    Args:
        paths: any number of them.
        decode: gives the pixels of one, all in the same shape, or raises ImageError.
        batch_size: files in a batch; the last may have fewer.
        workers: processes that decode; 0 decodes in this one, image by image. None is what suits the device. For a CPU
            these are threads that decode a batch and then rest: they take turns with the model, and every core is busy
            with either. Overlapping them brought nothing more. Beside a GPU they are processes.
        device: where the batches go.

    Raises: DeitModelsError: a decoding process died.
    """
    files = _Files(decode)
    if workers is None:
        batches = -(-len(paths) // batch_size) if isinstance(paths, Sized) else _MOST_WORKERS
        workers = 0 if device.type == "cpu" or batches < 2 else min(_MOST_WORKERS, max(_cores() - 1, 1), batches)
        if not workers:
            return _by_threads(files, paths, batch_size)
    return _by_processes(files, paths, batch_size, workers, pin=device.type == "cuda")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Files(Dataset[Decoded]):
    """Files by path."""

    def __init__(self, decode: Callable[[str], Tensor]) -> None:
        self.decode = decode

    def __getitem__(self, path: str | PathLike[str]) -> Decoded:
        source = fspath(path)
        try:
            return source, self.decode(source), None
        except ImageError as error:
            return source, None, " ".join(str(error).split())


def _by_threads(files: _Files, paths: Iterable[str | PathLike[str]], batch_size: int) -> Iterator[FileBatch]:
    drawn = iter(paths)
    # As many as the model computes with. Pillow lets go of the interpreter while it decodes and resizes
    with ThreadPoolExecutor(torch.get_num_threads(), "decode") as pool:
        while chunk := list(islice(drawn, batch_size)):
            yield _collate(list(pool.map(files.__getitem__, chunk)))


def _by_processes(
    files: _Files, paths: Iterable[str | PathLike[str]], batch_size: int, workers: int, *, pin: bool
) -> Iterator[FileBatch]:
    with _workers_explained(workers):
        with warnings.catch_warnings():
            # torch advises fewer workers than were asked for; Python 3.12 distrusts fork beside torch's idle threads
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            loader = DataLoader(
                files,
                batch_size=batch_size,
                sampler=paths,  # a "sampler" yields keys, and the keys of _Files are paths: they are drawn lazily
                num_workers=workers,
                collate_fn=_collate,
                worker_init_fn=_leave_interrupts_to_parent,
                pin_memory=pin,
            )
            batches = iter(loader)
        yield from batches


def _collate(items: list[Decoded]) -> FileBatch:
    tensors = [tensor for _, tensor, _ in items if tensor is not None]
    # One tensor a batch, since each that leaves a worker costs a file descriptor. Shared here and not by the queue's
    # thread, where a lack of shared memory would be printed and the batch never arrive.
    images = torch.stack(tensors) if tensors else torch.empty(0)
    if get_worker_info() is not None:
        images.share_memory_()  # type: ignore[no-untyped-call]
    return FileBatch([source for source, _, _ in items], [error for _, _, error in items], images)


def _leave_interrupts_to_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _workers_explained(workers: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[-1]
        signs = ("killed by signal", "exited unexpectedly", "shared memory", "shm", "No space left on device")
        if not workers or not any(sign in reason for sign in signs):
            raise
        raise DeitModelsError(
            f"a decoding process failed, most often for want of shared memory (in Docker: --shm-size=1g) or memory; "
            f"use fewer than {workers} workers, or workers=0 ({reason})"
        ) from error
