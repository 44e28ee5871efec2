"""From paths to batches of pixels: in order, by threads or processes, a few batches in memory at any time.

And what is found in a batch on its way back, so that a GPU is at work on the next one meanwhile.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from os import PathLike, fspath
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .errors import DeitModelsError, ImageError

Decoded = tuple[str, Tensor | None, str | None]
"""A path and its pixels and None, or a path and None and why it has no pixels."""
_MOST_WORKERS = 12


class Batch(NamedTuple):
    """Some files in order: their paths, for each None or why it could not be decoded, the pixels of the others."""

    sources: list[str]
    errors: list[str | None]
    images: Tensor


class TopClasses(NamedTuple):
    """The likeliest classes of some images, perhaps still on their way from a GPU.

    Attributes:
        packed: probabilities and class numbers, (2, B, top_k) float32: one copy, and numbers up to 2**24 are exact.
        copied: when `packed` is complete; None where reading it waits by itself.
    """

    packed: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> list[list[tuple[float, int]]]:
        """Probability and number of each class, likeliest first, a row an image."""
        if self.copied is not None:
            self.copied.synchronize()
        probabilities, numbers = self.packed.tolist()
        pairs = zip(probabilities, numbers, strict=True)
        return [[(p, int(number)) for p, number in zip(*row, strict=True)] for row in pairs]


def top_classes(logits: Tensor, top_k: int) -> TopClasses:
    """The likeliest classes by logits (B, num_classes); on a GPU without waiting for it."""
    probabilities, numbers = logits.float().softmax(dim=-1).topk(top_k)
    packed = torch.stack([probabilities, numbers.float()])
    if packed.device.type != "cuda":
        return TopClasses(packed, None)
    packed = packed.to("cpu", non_blocking=True)  # into pinned memory, which torch takes for such a copy by itself
    return TopClasses(packed, _event_after_all_work(logits.device))


def _event_after_all_work(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def file_batches(
    paths: Iterable[str | PathLike[str]],
    decode: Callable[[str], Tensor],
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> Iterator[Batch]:
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


def _by_threads(files: _Files, paths: Iterable[str | PathLike[str]], batch_size: int) -> Iterator[Batch]:
    drawn = iter(paths)
    # As many as the model computes with. Pillow lets go of the interpreter while it decodes and resizes
    with ThreadPoolExecutor(torch.get_num_threads(), "decode") as pool:
        while chunk := list(islice(drawn, batch_size)):
            yield _collate(list(pool.map(files.__getitem__, chunk)))


def _by_processes(
    files: _Files, paths: Iterable[str | PathLike[str]], batch_size: int, workers: int, *, pin: bool
) -> Iterator[Batch]:
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


def _collate(items: list[Decoded]) -> Batch:
    tensors = [tensor for _, tensor, _ in items if tensor is not None]
    # One tensor a batch, since each that leaves a worker costs a file descriptor. Shared here and not by the queue's
    # thread, where a lack of shared memory would be printed and the batch never arrive.
    images = torch.stack(tensors) if tensors else torch.empty(0)
    if get_worker_info() is not None:
        images.share_memory_()  # type: ignore[no-untyped-call]
    return Batch([source for source, _, _ in items], [error for _, _, error in items], images)


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
