"""The one loader: from samples or files to batches, in order, by worker processes or threads; images that failed."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import current_process, get_all_start_methods, get_start_method
from os import PathLike, fspath
from pickle import PicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from ..data.records import ImageRecords, Label
from ..distributed import Process
from ..errors import ConfigError, DataError, DeitModelsError, ImageError, TrainingError, first_line, shown

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, ...]
"""Images (B, 3, H, W) float32, labels (B,) int64, and for each sample FINE or the index of the image that could not be
read; in evaluation the label of such an image is -1. Several labels an image are (B, K) float32 of 0 and 1. For token
labelling a fourth tensor has the places of the pixels, see `TrainingSamples`."""
FINE = -1
_MOST_WORKERS, _MOST_GIVEN = 12, 1024
"""Loading processes of the default, and those that may be asked for."""
_MANY = 1024


def target_of(label: Label, records: ImageRecords) -> Any:
    """A label of a set as a batch holds it: a number, or (K,) of 0 and 1, all -1 for the label -1."""
    if not records.multi_label:
        return label
    if not isinstance(label, tuple):
        return torch.full((len(records.classes),), float(label))
    target = torch.zeros(len(records.classes))
    target[list(label)] = 1
    return target


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int | None) -> None:
    """Raise ConfigError unless a number of loading processes is None, for the default, or lies between 0 and 1024."""
    if workers is not None and (type(workers) is not int or not 0 <= workers <= _MOST_GIVEN):
        raise ConfigError(f"workers={shown(workers)}; expected a whole number from 0 to {_MOST_GIVEN}, or None")


def workers_beside(device: torch.device, given: int | None = None, *, images: int = _MANY) -> int:
    """Loading processes of a process: as given; else up to 12 beside a GPU, one beside a CPU, whose cores compute.

    None for few `images` that are read once, unless processes are forked: others import everything anew, for seconds.
    """
    if given is not None:
        return given
    if images < _MANY and (get_start_method(allow_none=True) or get_all_start_methods()[0]) != "fork":
        return 0
    cores = cpu_cores()
    return _beside_gpu(cores // max(torch.cuda.device_count(), 1)) if device.type == "cuda" else min(1, cores - 1)


def _beside_gpu(cores: int) -> int:
    return min(_MOST_WORKERS, max(cores - 1, 1))


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

    It gives `Batch`es; of training samples, with `Levels` or `Plan` in the place of images. A worker makes a whole
    batch, or a `part` of one: no sample travels alone. Samples with a method `batch(keys)` are joined by it.

    DataLoader seeds itself from the global generator; a private one keeps mixing and stochastic depth independent of
    the workers, and of interruptions.

    Raises: ConfigError: batch_size below 1, or workers below 0 or above 1024.
    """
    check_workers(workers)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; expected 1 or more")
    if workers and getattr(current_process(), "_inheriting", False):  # multiprocessing's own sign of a missing guard
        raise ConfigError(f"a loading process runs the script that started it: {_GUARD}")
    with _quiet():
        return _Loader(
            _WholeParts(samples),
            batch_size=None,
            sampler=_Parts(sampler, batch_size, part or batch_size),
            num_workers=workers,
            persistent_workers=workers > 0 and keep_workers,
            collate_fn=_packed,
            worker_init_fn=_leave_interrupts_to_parent,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice to use fewer workers than were asked for; no warning of Python 3.12 of fork beside idle threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class _Parts(Sampler[list[Any]]):
    """A sampler's keys in parts of at most so many, none of which belongs to two batches; keys are drawn as needed."""

    def __init__(self, sampler: Iterable[Any], batch_size: int, part: int) -> None:
        self.sampler, self.batch_size, self.part = sampler, batch_size, part

    def __iter__(self) -> Iterator[list[Any]]:
        keys = iter(self.sampler)
        while batch := list(islice(keys, self.batch_size)):
            yield from (batch[start : start + self.part] for start in range(0, len(batch), self.part))


class _WholeParts(Dataset[Any]):
    """Samples by lists of keys, joined where they are made."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, keys: list[Any]) -> Any:
        make = getattr(self.samples, "batch", None)
        return default_collate([self.samples[key] for key in keys]) if make is None else make(keys)


def each(part: Any, change: Callable[[Any], Any]) -> Any:
    """A part of a batch, nested in tuples, with `change` applied to every value."""
    if isinstance(part, (list, tuple)):  # DataLoader's thread that pins makes lists of plain tuples
        changed = [each(member, change) for member in part]
        return type(part)(*changed) if hasattr(part, "_fields") else tuple(changed)
    return change(part)


def _packed(part: Any) -> Any:
    """For the way out of a worker: pixels in shared memory, numbers as arrays, which are pickled in place.

    Each tensor costs a file descriptor and 0.15 ms on the other side. Shared here and not by the queue's thread, where
    a lack of shared memory would be printed and the part never arrive.
    """
    return part if get_worker_info() is None else each(part, _light)


def _light(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.numpy() if value.dtype == torch.int64 else value.share_memory_()  # type: ignore[no-untyped-call]


def _unpacked(part: Any) -> Any:
    return each(part, lambda value: torch.from_numpy(value) if hasattr(value, "__array_interface__") else value)


class _Loader(DataLoader[Any]):
    """A loader whose workers leave Ctrl-C, which a terminal sends to every process, to their parent."""

    def __iter__(self) -> Any:
        with _quiet():
            return map(_unpacked, self._parts())

    def _parts(self) -> Any:
        with _without_interrupts():
            try:
                return super().__iter__()
            except (AttributeError, TypeError, PicklingError) as error:
                if not self.num_workers or not re.search("pickle|get local", str(error)):
                    raise
                raise TrainingError(
                    f"the Dataset cannot be sent to loading processes started by {get_start_method()}: "
                    f"{first_line(error)}; define its classes and functions at the top of a module, or pass workers=0"
                ) from error


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits, also in the workers that start here: one that was forked just then would print a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_interrupts_to_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def explained_worker_failure(workers: int) -> Iterator[None]:
    """Explain a worker's death in one line, with a remedy, and reduce our own errors in workers to their one line.

    Raises: TrainingError: a worker was killed, mostly for lack of shared memory.
    """
    try:
        yield
    except DeitModelsError as error:
        text = str(error.args[0]) if error.args else ""  # str(error) is one line
        if not text.startswith("Caught "):
            raise
        # torch's text, then the worker's traceback, which ends in the message
        raise type(error)(text.rstrip().rpartition("\n")[2].partition(": ")[2]) from error
    except (RuntimeError, OSError, EOFError) as error:
        hung_up = workers > 0 and isinstance(error, (ConnectionError, EOFError))
        if not hung_up and not any(sign in str(error) for sign in _WORKER_DEATHS):
            raise
        if hung_up:
            # torch raises RuntimeError wherever the signal of the worker's death arrives: wait for it here
            with suppress(RuntimeError):
                time.sleep(1)
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        if "exited unexpectedly" in reason and get_start_method() != "fork":
            how = f"a loading process, started by {get_start_method()}, has ended"
            raise TrainingError(f"{how}: {_GUARD} ({reason})") from error
        raise TrainingError(
            f"a loading process died, most likely for lack of main memory or, in /dev/shm, of shared memory (in "
            f"Docker: --shm-size=1g); use fewer than {workers} workers, or workers=0, which loads in this process "
            f"({reason})"
        ) from error


_GUARD = "it imports the script again; put the script's calls under `if __name__ == '__main__':`, or pass workers=0"
_WORKER_DEATHS = (
    *("DataLoader worker (pid", "shared memory(shm)", "shared memory object", "torch_shm_manager", "of ancdata"),
    *("Too many open files", "unable to open file </torch_", "unable to mmap", "unable to write to file </torch_"),
)
"""Signs, in the messages of torch and of the operating system, that processes could not pass tensors to each other."""


class FileBatch(NamedTuple):
    """Some files in order: their paths, for each None or the reason of a failure, the pixels of the others."""

    sources: Sequence[str]
    errors: Sequence[str | None]
    images: Tensor


def file_batches(
    paths: Iterable[str | PathLike[str] | tuple[str, bytes]],
    decode: Callable[[Any], Tensor],
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> Iterator[FileBatch]:
    """Decode files in batches; paths, or pairs of a name and encoded bytes, any number of them, are drawn as needed.

    `decode` gives the pixels of a file or of bytes, all in the same shape, or raises ImageError. `workers` are
    processes; 0 decodes in this one, image by image. None: beside a GPU processes, on a CPU threads that decode a batch
    and then rest while the model computes; to overlap them brought nothing more.

    Raises: TrainingError: a loading process died.
    """
    files = _Files(decode)
    if workers is None:
        batches = -(-len(paths) // batch_size) if isinstance(paths, Sized) else None
        workers = decoding_workers(batches, device, cores=cpu_cores())
    if workers is not None:
        with explained_worker_failure(workers):
            yield from make_loader(files, paths, batch_size=batch_size, workers=workers, device=device)
        return
    drawn = iter(paths)
    # as many threads as the model computes with; Pillow releases the interpreter while it decodes and resizes
    with ThreadPoolExecutor(torch.get_num_threads(), "decode") as pool:
        while chunk := list(islice(drawn, batch_size)):
            yield files.batch(chunk, pool.map)


def decoding_workers(batches: int | None, device: torch.device, *, cores: int) -> int | None:
    """Processes to decode so many batches, or an unknown number; None: threads of this one, which suit a CPU."""
    if device.type == "cpu" or batches == 1:
        return None
    return min(_beside_gpu(cores), batches or _MOST_WORKERS)


class _Files(Dataset[Any]):
    """Files by path, or by name and encoded bytes."""

    def __init__(self, decode: Callable[[Any], Tensor]) -> None:
        self.decode = decode

    def __getitem__(self, path: str | PathLike[str] | tuple[str, bytes]) -> tuple[str, Tensor | None, str | None]:
        """The path or name, its pixels, and the reason if there are none."""
        source, image = path if isinstance(path, tuple) else (fspath(path), fspath(path))
        try:
            return source, self.decode(image), None
        except ImageError as error:
            reason = " ".join(str(error).split())
            return source, None, f"{source}: {reason}" if isinstance(image, bytes) else reason

    def batch(self, paths: list[Any], mapped: Callable[..., Iterable[Any]] = map) -> FileBatch:
        """The files of a batch, joined; `mapped` may read several at once."""
        sources, pixels, errors = zip(*mapped(self.__getitem__, paths), strict=True)
        found = [image for image in pixels if image is not None]
        return FileBatch(sources, errors, torch.stack(found) if found else torch.empty(0))


Watch = Callable[[Iterable[Any], int], Iterable[Any]]
"""Passes batches on, given how many there will be; a progress bar goes here.

In training, a method `set_postfix` of what it returns, as tqdm has it, is given the mean loss of the epoch so far."""


def plain_watch(batches: Iterable[Any], total: int) -> Iterable[Any]:  # noqa: ARG001
    """No progress bar."""
    return batches


class DamageCount:
    """Counts the images that could not be read, logs each once, and stops a run with too many.

    Too many are three or more, and more than `limit` of all images; of those seen so far the share may be high by
    chance, early on or where broken images lie side by side.
    """

    def __init__(self, records: ImageRecords, limit: float, *, failed: Iterable[int] = ()) -> None:
        """Begin with the images that are known to have `failed`, in a run that goes on."""
        self.records = records
        self.limit = limit
        self.failed = set(failed)

    def add(self, failures: Tensor) -> None:
        """Note one batch's failures. Raises: DataError: too many images failed."""
        for index in failures[failures >= 0].tolist():
            if index not in self.failed:
                self.failed.add(index)
                logger.warning("skipped an image that cannot be read: %s", self.records.describe(index))
        self._check()

    def meet(self, process: Process) -> int:
        """Join the failures of all processes, and give their number. Raises: DataError: too many images failed."""
        self.failed.update(*process.gather(self.failed))
        self._check()
        return len(self.failed)

    def _check(self) -> None:
        if len(self.failed) > max(self.limit * len(self.records), 2):
            one, reason = self.records.describe(max(self.failed)), ""
            try:
                self.records[max(self.failed)]
            except (ImageError, OSError) as error:
                reason = f" ({first_line(error)})".replace(f"{one}: ", "")
            raise DataError(
                f"at least {len(self.failed)} of the {len(self.records)} images of {self.records.name} cannot be read, "
                f"more than the limit of {self.limit:.1%}; one of them is {one}{reason}"
            )
