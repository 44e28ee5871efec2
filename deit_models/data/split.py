"""Images set aside for validation: by class, by seed, and written down."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DataError, ImageError, TrainingError
from ..files import atomic_write
from .records import ImageRecords, SubsetRecords

logger = logging.getLogger(__name__)

SPLIT_NAME = "split.json"
_WHOLE = 4
"""Smaller classes contribute no validation images, unless all classes are small."""


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the training and of the validation images of a set, each in ascending order."""

    train: list[int]
    val: list[int]
    fraction: float
    seed: int


def stratified_split(labels: Sequence[int], *, fraction: float, seed: int) -> Split:
    """Set a share of every class aside, at random, the same for the same labels and seed.

    Each class contributes round(fraction * images), at least one and not all; a class of one to three images none,
    unless there are no others. Images of unknown label, -1, stay in training.

    Raises: ConfigError: a fraction that is not between 0 and 1. DataError: no class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction={fraction}; expected more than 0 and less than 1")
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        if label >= 0:
            by_class[label].append(index)
    largest = max((len(members) for members in by_class.values()), default=0)
    if largest < 2:
        raise DataError("no class has two images, so none can be set aside for validation; pass images for it (val)")
    val: set[int] = set()
    generator = random.Random(seed)
    for label in sorted(by_class):
        members = by_class[label]
        if len(members) >= min(_WHOLE, largest):
            count = min(max(math.floor(fraction * len(members) + 0.5), 1), len(members) - 1)
            val.update(generator.sample(members, count))
    undivided = sum(len(members) < min(_WHOLE, largest) for members in by_class.values())
    if undivided:
        logger.warning("%d of %d classes have too few images to set one aside for validation", undivided, len(by_class))
    return Split([index for index in range(len(labels)) if index not in val], sorted(val), fraction, seed)


def labels_of(records: ImageRecords) -> list[int]:
    """The label of each image; -1 where it cannot be told without an image that cannot be read."""
    labels = []
    for index in range(len(records)):
        try:
            labels.append(records.label(index))
        except (ImageError, OSError):
            labels.append(-1)
    return labels


def parts(records: ImageRecords, split: Split) -> tuple[ImageRecords, ImageRecords]:
    """The two sets of images, with all classes each."""
    return SubsetRecords(records, split.train), SubsetRecords(records, split.val)


def keep_split(out: Path, records: ImageRecords, split: Split) -> None:
    """Write the split into `out`, by the files' names; one that is there already must be the same.

    Raises: TrainingError: the folder holds a run on another split, or on other images. SaveError: no space or no
        permission.
    """
    path = out / SPLIT_NAME
    names = {part: [records.key(index) for index in getattr(split, part)] for part in ("train", "val")}
    text = json.dumps({"data": records.name, "seed": split.seed, "fraction": split.fraction, **names}, indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise TrainingError(
            f"{path} is the split of other images, or with another seed or fraction; use a new folder for this run"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
