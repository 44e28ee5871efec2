"""Images set aside for validation: a share of each class, by seed, written to split.json."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, ImageError, TrainingError
from ..files import read_text, write_text
from .records import ImageRecords, Label, SubsetRecords

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


def stratified_split(labels: Sequence[Label], *, fraction: float, seed: int) -> Split:
    """Set a share of each class aside for validation, at random; the same labels and seed give the same split.

    An image with several labels counts for one class, see `one_class`.

    Each class contributes round(fraction * images), at least one and not all; a class of one to three images none,
    unless all classes are that small. Images with label -1 (unknown) stay in training.

    Raises: ConfigError: a fraction that is not between 0 and 1. DataError: no class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction={fraction}; expected more than 0 and less than 1")
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(one_class(labels)):
        if label >= 0:
            by_class[label].append(index)
    largest = max((len(members) for members in by_class.values()), default=0)
    if labels and not by_class:
        raise DataError(f"none of the {len(labels)} images can be read, so none can be set aside for validation")
    if largest < 2:
        raise DataError("no class has two images, so none can be set aside for validation; pass images for it (val)")
    divided = [members for _, members in sorted(by_class.items()) if len(members) >= min(_WHOLE, largest)]
    val: set[int] = set()
    generator = random.Random(seed)
    for members in divided:
        count = min(max(math.floor(fraction * len(members) + 0.5), 1), len(members) - 1)
        val.update(generator.sample(members, count))
    if whole := len(by_class) - len(divided):
        logger.warning("%d of %d classes have too few images to set one aside for validation", whole, len(by_class))
    return Split([index for index in range(len(labels)) if index not in val], sorted(val), fraction, seed)


def one_class(labels: Sequence[Label]) -> list[int]:
    """One class for each image: of several labels the rarest, of equally rare ones the first.

    Images without any label are a class of their own, after the others.
    """
    count = Counter(number for label in labels if isinstance(label, tuple) for number in label)
    none = max(count, default=-1) + 1
    return [
        min(label, key=lambda number: (count[number], number), default=none) if isinstance(label, tuple) else label
        for label in labels
    ]


def labels_of(records: ImageRecords) -> list[Any]:
    """The label of each image; -1 if it comes with the image, and that cannot be read."""
    labels: list[Any] = []
    for index in range(len(records)):
        try:
            labels.append(records.label(index))
        except (ImageError, OSError):
            labels.append(-1)
    return labels


def parts(records: ImageRecords, split: Split) -> tuple[ImageRecords, ImageRecords]:
    """The images for training and those for validation, both with all classes."""
    return SubsetRecords(records, split.train), SubsetRecords(records, split.val)


def keep_split(out: Path, records: ImageRecords, split: Split, *, write: bool = True) -> Split:
    """The split, by the images' names in `out`; if there is one with fewer images, that one and the others in training.

    Raises: TrainingError: `out` has the split of other images, or another one. SaveError: no space or no permission.
    """
    path = out / SPLIT_NAME
    if path.exists():
        split = _with_more_images(path, records, split)
    names = {part: [records.key(index) for index in getattr(split, part)] for part in ("train", "val")}
    text = json.dumps({"data": records.name, "seed": split.seed, "fraction": split.fraction, **names}, indent=1) + "\n"
    if write:
        write_text(path, text)
    return split


def _with_more_images(path: Path, records: ImageRecords, split: Split) -> Split:
    text = read_text(path, error=TrainingError)
    with suppress(ValueError, TypeError, KeyError):
        before = json.loads(text)
        held, others = {*before["val"]}, {*before["train"]}
        keys = [*map(records.key, range(len(records)))]
        if (before["seed"], before["fraction"]) == (split.seed, split.fraction) and held | others <= {*keys}:
            if added := len(keys) - len(held) - len(others):
                logger.warning("%s: %d images were added since; they are for training", path, added)
            train, val = ([i for i, key in enumerate(keys) if (key in held) is part] for part in (False, True))
            return Split(train, val, split.fraction, split.seed)
    raise TrainingError(
        f"{path} is the split of other images, or with another seed or fraction; use a new folder for this run"
    )
