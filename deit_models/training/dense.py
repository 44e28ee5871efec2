"""Label maps of a training set, made by a teacher; `augmentation.label_maps` reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..augmentation.label_maps import ABOUT_NAME, KEPT, MAPS_NAME, images_in_words, packed, row_type
from ..batches.inputs import eval_batches
from ..batches.loading import Batch, DamageCount, Watch, explained_worker_failure, plain_watch, workers_beside
from ..checkpoint import Preprocessing
from ..data.datasets import open_images
from ..data.records import SubsetRecords
from ..distributed import Process, join_processes
from ..errors import DataError
from ..files import digest_of_numbers, read_json, write_json
from ..images.transforms import EvalTransform
from ..scoring.parts import Parts, check_same_run
from ..scoring.places import logits_of_places
from .teacher import Teacher, TeacherSpec, load_teacher


def make_label_maps(
    teacher: TeacherSpec | Teacher,
    data: Any,
    out: str | PathLike[str],
    *,
    student: Preprocessing,
    weights: str | PathLike[str] | None = None,
    img_size: tuple[int, int] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
) -> dict[str, Any]:
    """Write the label maps of training images into a folder, for `train(..., label_maps=folder)`; gives its facts.

    The whole of each image is resized to the teacher's size, whatever its aspect, so that the cells cover all of it.
    Memory does not grow with the number of images. Any number of processes may share the work, see `Parts`.

    Args:
        teacher: see `load_teacher`; one of the kinds that `logits_of_places` knows.
        data: training images, as in `train`.
        out: the folder.
        student: input of the model that is to be trained: its normalisation, and its size for a teacher of any size.
        weights: see `load_teacher`.
        img_size: (height, width) of the teacher's input; default: its own, else the student's.
        batch_size: images at once, in each process.
        workers: loading processes.
        device: where to compute; default: the GPU if there is one.
        resume: go on with an interrupted run, or keep the maps that are there.
        overwrite: replace what is there.
        corrupt_limit: fraction of the images that may be unreadable; they have no labels.
        watch: wraps the batches, for a progress bar.

    Raises: ConfigError: a teacher that gives no logits for places, or maps of other settings in the folder. DataError:
        images with several labels, or damaged ones. TrainingError: the teacher does not fit.
    """
    folder, name = Path(out), fspath(teacher) if isinstance(teacher, (str, PathLike)) else type(teacher).__name__
    with join_processes(device) as process:
        records, workers = open_images(data, "train"), workers_beside(process.device, workers)
        if records.multi_label:
            raise DataError(f"{records.name}: label maps are of one class for each image, these have several labels")
        options: dict[str, Any] = {"weights": weights, "img_size": img_size, "device": process.device}
        loaded = load_teacher(teacher, num_classes=len(records.classes), student=student, **options)
        size = loaded.img_size or student.crop
        # noise, of which the mean of a map is not its maximum
        noise = torch.randn(2, len(student.mean), *size, generator=torch.Generator().manual_seed(0)).to(process.device)
        dense = logits_of_places(loaded.network, loaded.run, noise)
        grid = loaded.run(noise, dense).shape[2:]
        about = {"teacher": name, "weights": digest_of_numbers(loaded), "pixels": list(size), "grid": list(grid)}
        about |= images_in_words(records)
        parts = Parts(folder / MAPS_NAME)
        if parts.settle(process, resume=resume, overwrite=overwrite):
            check_same_run(about, read_json(folder / ABOUT_NAME), where=folder)
            return about
        parts.begin(about, len(records), process)
        mine = SubsetRecords(records, [number for block in parts.mine for number in block])
        batches = eval_batches(
            mine,
            EvalTransform(replace(student, resize=size, crop=size, fit="squash")),
            Process(0, 1, process.device),
            batch_size=batch_size,
            workers=workers,
        )
        rows = _rows(lambda x: loaded.run(x, dense), watch(batches, len(batches)), DamageCount(mine, corrupt_limit))
        with explained_worker_failure(workers):
            for block in parts.mine:
                with parts.new(block, []) as path, path.open("wb") as file:
                    np.save(file, np.stack(list(islice(rows, len(block)))))
        parts.finish(process, partial(_join, about=about))
    return about


@torch.inference_mode()
def _rows(logits: Callable[[Tensor], Tensor], batches: Iterable[Batch], damage: DamageCount) -> Iterator[Any]:
    """The entry of each image for `maps.npy`; of one that cannot be read, probabilities of 0."""
    for images, _, failed in batches:
        damage.add(failed)
        probabilities = logits(images).float().softmax(dim=1)
        probabilities[failed >= 0] = 0
        yield from packed(probabilities)


def _join(path: Path, parts: Sequence[Path], _: list[str], *, about: Mapping[str, Any]) -> None:
    """Write the parts as one array, with the memory of one of them, and the facts beside it."""
    num_classes = len(about["classes"])
    shape = (about["images"], min(KEPT, num_classes), *about["grid"])
    header = {"descr": np.lib.format.dtype_to_descr(row_type(num_classes)), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part).tobytes())
    write_json(path.parent / ABOUT_NAME, about)
