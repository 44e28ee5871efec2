"""Sets of small images in memory: decoded once, by the loading processes in parallel, and shared with them as bytes."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from ..checkpoint import Preprocessing
from ..errors import ConfigError, DataError, ImageError
from .loading import make_loader
from .records import CachedRecords, ImageRecords, always_the_same

logger = logging.getLogger(__name__)

Cache = Literal["auto", "ram", "none"]
_SHARE = 4
"""A set is kept unasked if it takes at most this fraction of the free memory: a quarter."""
_WORTH_A_LINE = 64 << 20
"""Bytes; smaller sets are kept without a warning."""
_PROBES = 16
_AT_ONCE = 64


def keep_in_memory(
    records: ImageRecords, cache: Cache, *, workers: int, processes: int = 1, free: int | None = None
) -> ImageRecords:
    """The images decoded, if they are to be kept; else the set as it is.

    "auto" keeps a set that is read the same each time (class folders, data sets known by name), whose images have one
    size, and that fits in a quarter of the free memory.

    Args:
        records: the set.
        cache: "ram" always keeps it, "none" never.
        workers: loading processes, which decode.
        processes: training processes on this machine, each of which keeps a set of its own.
        free: bytes that may be used; default: the free memory.

    Raises: ConfigError: another `cache`, or more than the free memory. DataError: images of several sizes; one is
        named. Both of the latter under "ram" alone.
    """
    if cache not in get_args(Cache):
        raise ConfigError(f"cache={cache!r}; expected one of {', '.join(get_args(Cache))}")
    if cache == "none" or isinstance(records, CachedRecords) or (cache == "auto" and not always_the_same(records)):
        return records
    try:
        size = _size_of(records)
        share = 1 if cache == "ram" else _SHARE
        needed = len(records) * 3 * size[0] * size[1]
        free = (free_memory(shared=workers > 0) if free is None else free) // processes
        if needed * share > free:
            raise ConfigError(
                f"the {len(records)} images of {records.name} take {needed / 1e6:.0f} MB decoded, and {free / 1e6:.0f} "
                f"MB are free; pass cache='none', which reads the files each time"
            )
        level = logging.WARNING if cache == "auto" and needed >= _WORTH_A_LINE else logging.INFO
        logger.log(
            level,
            "keeping the %d images of %s in memory (%.0f MB); cache='none' (--cache none) reads the files each time",
            len(records), records.name, needed / 1e6,
        )  # fmt: skip
        return _decoded(records, size, workers)
    except (ConfigError, DataError):
        if cache == "ram":
            raise
        return records


def keeps_pixels(records: ImageRecords, preprocessing: Preprocessing, cache: Cache) -> bool:
    """Whether to remember what the evaluation transform makes of a set, whatever the sizes of its images."""
    height, width = preprocessing.crop
    fits = always_the_same(records) and len(records) * 3 * height * width * _SHARE <= free_memory()
    return cache == "ram" or (cache == "auto" and fits)


def free_memory(*, shared: bool = False) -> int:
    """Bytes that are free: of the machine, of the container, and if it is to be shared, of /dev/shm."""
    bounds = [_available()]
    with suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(stat.get("inactive_file", 0))
        bounds.append(limit - used)
    with suppress(OSError, AttributeError):
        place = os.statvfs("/dev/shm")
        bounds += [place.f_bavail * place.f_frsize] * shared
    return max(min(bounds), 0)


def _available() -> int:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 0


def _size_of(records: ImageRecords) -> tuple[int, int]:
    """(height, width) of the images, by a look at a few. Raises: DataError: they differ, or none can be read."""
    sizes: dict[tuple[int, int], int] = {}
    for index in dict.fromkeys(len(records) * number // _PROBES for number in range(_PROBES)):
        with suppress(ImageError, OSError):
            image, _ = records[index]
            sizes.setdefault((image.height, image.width), index)
    if not sizes:
        raise DataError(f"{records.name}: none of {_PROBES} images can be read")
    if len(sizes) > 1:
        first, second = list(sizes)[:2]
        raise _unequal(records, sizes[second], second, first)
    return next(iter(sizes))


def _unequal(records: ImageRecords, index: int, size: tuple[int, int], others: tuple[int, int]) -> DataError:
    shape, usual = ("{1}x{0}".format(*each) for each in (size, others))
    return DataError(
        f"{records.describe(index)} is {shape} pixels, others {usual}; only images of one size are kept in memory: "
        "pass cache='none', or resize them"
    )


class _Decoder(Dataset[Any]):
    """Decodes images into shared memory; gives only labels and what went wrong."""

    def __init__(self, records: ImageRecords, images: Tensor) -> None:
        self.records, self.images = records, images

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, indices: list[int]) -> tuple[list[int], list[tuple[int, str]], list[tuple[int, tuple[int, int]]]]:
        """Labels, what cannot be read and why, what has another size and which."""
        labels: list[int] = []
        broken: list[tuple[int, str]] = []
        odd: list[tuple[int, tuple[int, int]]] = []
        for index in indices:
            label = -1
            try:
                image, label = self.records[index]
            except (ImageError, OSError) as error:
                broken.append((index, str(error)))
            else:
                if (image.height, image.width) == self.images.shape[2:]:
                    self.images[index] = TF.pil_to_tensor(image)
                else:
                    odd.append((index, (image.height, image.width)))
            labels.append(label)
        return labels, broken, odd


def _decoded(records: ImageRecords, size: tuple[int, int], workers: int) -> CachedRecords:
    images = torch.empty(len(records), 3, *size, dtype=torch.uint8)
    if workers:
        images.share_memory_()  # type: ignore[no-untyped-call]
    order, labels = range(len(records)), []
    broken: dict[int, str] = {}
    decoder, cpu = _Decoder(records, images), torch.device("cpu")
    for numbers, failed, odd in make_loader(decoder, order, batch_size=_AT_ONCE, workers=workers, device=cpu):
        for index, found in odd:
            raise _unequal(records, index, found, size)
        labels += numbers
        broken.update(failed)
    return CachedRecords(records, images, torch.tensor(labels), broken)


def images_on(records: CachedRecords, device: torch.device) -> Tensor | None:
    """The pixels of a set where the model is; None: they would take more than a quarter of a GPU's free memory."""
    if device.type == "cpu":
        return records.images
    if device.type == "cuda" and records.images.nbytes * _SHARE <= torch.cuda.mem_get_info(device)[0]:
        return records.images.to(device)
    return None
