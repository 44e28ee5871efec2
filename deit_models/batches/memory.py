"""Sets of small images in memory: decoded once, by the loading processes in parallel, and shared with them as bytes."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from ..checkpoint import Preprocessing
from ..data.records import CachedRecords, ImageRecords, always_the_same
from ..errors import ConfigError, DataError, ImageError
from .loading import make_loader, target_of

logger = logging.getLogger(__name__)

Cache = Literal["auto", "ram", "none"]
_SHARE = 4
"""With cache="auto" a set may take one part in so many of the free memory."""
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
        logger.log(
            logging.WARNING if cache == "auto" and needed >= _WORTH_A_LINE else logging.INFO,
            f"keeping the {len(records)} images of {records.name} in memory ({needed / 1e6:.0f} MB); cache='none' "
            "(--cache none) reads the files each time",
        )
        return _decoded(records, size, workers)
    except (ConfigError, DataError):
        if cache == "ram":
            raise
        return records


def keeps_pixels(records: ImageRecords, preprocessing: Preprocessing, cache: Cache) -> bool:
    """Whether to keep the output of the evaluation transform for a set, whatever the sizes of its images."""
    height, width = preprocessing.crop
    fits = always_the_same(records) and len(records) * 3 * height * width * _SHARE <= free_memory()
    return cache == "ram" or (cache == "auto" and fits)


def free_memory(*, shared: bool = False) -> int:
    """Free bytes of the machine and of the container; of /dev/shm too, if they are to be `shared`."""
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
            image = _picture(records, index)[0]
            sizes.setdefault((image.height, image.width), index)
    if not sizes:
        raise DataError(f"{records.name}: none of {_PROBES} images can be read")
    if len(sizes) > 1:
        first, second = list(sizes)[:2]
        raise _unequal(records, sizes[second], second, first)
    return next(iter(sizes))


def _picture(records: ImageRecords, index: int) -> tuple[PIL.Image.Image, Any]:
    image, label = records[index]
    if isinstance(image, Tensor):
        raise DataError(f"{records.name}: images of {len(image)} channels are not kept in memory; pass cache='none'")
    return image, label


def _unequal(records: ImageRecords, index: int, size: tuple[int, int], others: tuple[int, int]) -> DataError:
    shape, usual = ("{1}x{0}".format(*each) for each in (size, others))
    return DataError(
        f"{records.describe(index)} is {shape} pixels, others {usual}; only images of one size are kept in memory: "
        "pass cache='none', or resize them"
    )


class _Decoder(Dataset[Any]):
    """Decodes images of one size into shared memory; gives the label, and why an image could not be read."""

    def __init__(self, records: ImageRecords, images: Tensor) -> None:
        self.records, self.images = records, images

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            image, label = _picture(self.records, index)
        except (ImageError, OSError) as error:
            return -1, str(error)
        size, expected = (image.height, image.width), (self.images.shape[2], self.images.shape[3])
        if size != expected:
            raise _unequal(self.records, index, size, expected)
        self.images[index] = TF.pil_to_tensor(image)
        return label, None

    def batch(self, indices: list[int]) -> list[tuple[int, str | None]]:
        return [self[index] for index in indices]


def _decoded(records: ImageRecords, size: tuple[int, int], workers: int) -> CachedRecords:
    images = torch.empty(len(records), 3, *size, dtype=torch.uint8)
    if workers:
        images.share_memory_()  # type: ignore[no-untyped-call]
    decoder, order, cpu = _Decoder(records, images), range(len(records)), torch.device("cpu")
    parts = make_loader(decoder, order, batch_size=_AT_ONCE, workers=workers, device=cpu)
    labels, reasons = zip(*(pair for part in parts for pair in part), strict=True)
    broken = {index: reason for index, reason in enumerate(reasons) if reason is not None}
    rows = [target_of(label, records) for label in labels] if records.multi_label else []
    return CachedRecords(records, images, torch.stack(rows).byte() if rows else torch.tensor(labels), broken)


def images_on(records: CachedRecords, device: torch.device) -> Tensor | None:
    """The pixels of a set on the model's device; None: they would take more than a quarter of a GPU's free memory."""
    if device.type == "cpu":
        return records.images
    if device.type == "cuda" and records.images.nbytes * _SHARE <= torch.cuda.mem_get_info(device)[0]:
        return records.images.to(device)
    return None
