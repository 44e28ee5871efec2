"""Images set aside for validation: by class, by seed, and written down."""
# MERGED """Whether the labels of a data set mean what the logits of a model mean."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from ..errors import ConfigError, DataError, ImageError, TrainingError
from ..files import atomic_write
from ..models.layers import ImageClassifier
from .records import ImageRecords, SubsetRecords, some

logger = logging.getLogger(__name__)

_WORDNET_ID = re.compile(r"n\d{8}")


class Match(NamedTuple):
    """How a data set's classes and a model's belong together.

    Attributes:
        order: for each label of the data the model's logit of the same class; None if that cannot be told.
        difference: why not; empty if the model does not know the names of its classes.
    """

    order: tuple[int, ...] | None
    difference: str = ""


def match_classes(model: ImageClassifier, records: ImageRecords) -> Match:
    """Compare class names; there must be as many as the model has classes.

    ImageNet's thousand classes are accepted by their WordNet ids, whose sorted order is that of every ImageNet model's
    logits, and as torchvision's data set, which is in that order.
    """
    names, as_they_are = class_names_of(model), tuple(range(len(records.classes)))
    if names is not None and len(set(names)) == len(names) and set(names) == set(records.classes):
        return Match(tuple(map(names.index, records.classes)))
    sorted_ids = list(records.classes) == sorted(records.classes) and all(map(_WORDNET_ID.fullmatch, records.classes))
    if len(as_they_are) == 1000 and (sorted_ids or records.name == "imagenet"):
        return Match(as_they_are)
    return Match(None, "" if names is None else _difference(names, records.classes))


def in_the_models_order(
    model: ImageClassifier, records: ImageRecords, *, ignore_class_names: bool = False
) -> ImageRecords:
    """The records with labels that count the model's logits: matched by name, by number only where it has no names.

    Raises: DataError: another number of classes, or other names and not `ignore_class_names`.
    """
    if len(records.classes) != model.num_classes:
        raise DataError(
            f"{records.name} has {len(records.classes)} classes, the model has {model.num_classes}; evaluate a model "
            f"that was trained for these classes"
        )
    order, difference = match_classes(model, records)
    if order is not None:
        return records if list(order) == sorted(order) else Relabelled(records, order)
    if difference and not ignore_class_names:
        raise DataError(
            f"{records.name} has other classes than the model: {difference}; rename the folders, or pass "
            f"ignore_class_names=True (--ignore-class-names) if they are the same classes in the same order"
        )
    if not ignore_class_names:
        logger.warning("the model does not name its classes: taken to be in the order of %s", records.name)
    return records


def _difference(names: Sequence[str], classes: Sequence[str]) -> str:
    ours, theirs = (
        [name for name in one if name not in set(other)] for one, other in ((names, classes), (classes, names))
    )
    return f"the model alone knows {some(ours) or 'no other'}, the data alone has {some(theirs) or 'no other'}"


class Relabelled(ImageRecords):
    """The same images, with the labels and the class names in another order."""

    def __init__(self, records: ImageRecords, order: Sequence[int]) -> None:
        """Wrap `records`; label i becomes order[i]."""
        self.name = records.name
        self.classes = tuple(records.classes[order.index(i)] for i in range(len(order)))
        self._records = records
        self._order = order

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        image, label = self._records[index]
        return image, self._order[label]

    def describe(self, index: int) -> str:
        return self._records.describe(index)


def class_names_of(model: ImageClassifier) -> tuple[str, ...] | None:
    """A name for each logit, if the weights came with them or were trained on ImageNet-1k; None if not."""
    origin = model.origin
    if origin is None:
        return None
    imagenet = origin.dataset == "ImageNet-1k" and model.num_classes == 1000
    return class_labels(model) if origin.class_names is not None or imagenet else None


def class_labels(model: ImageClassifier, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """A name for each logit: those given, the checkpoint's, ImageNet's, or numbers."""
    origin, count = model.origin, model.num_classes
    labels = given if given is not None else origin.class_names if origin is not None else None
    if labels is not None:
        if len(labels) != count:
            raise ConfigError(f"{len(labels)} labels given, {count} expected: one for each class of the model")
        return tuple(labels)
    if origin is not None and origin.dataset == "ImageNet-1k" and count == 1000:
        from torchvision.models import get_weight

        return tuple(get_weight("ResNet18_Weights.IMAGENET1K_V1").meta["categories"])
    return tuple(f"class {i}" for i in range(count))


SPLIT_NAME = "split.json"
_WHOLE = 4
"""A class of fewer images gives none away, unless all classes are as small."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which images of a set are for training and which for validation, each in ascending order."""

    train: list[int]
    val: list[int]
    fraction: float
    seed: int


def stratified_split(labels: Sequence[int], *, fraction: float, seed: int) -> Split:
    """Set a share of every class aside, at random, the same for the same labels and seed.

    Each class gives round(fraction * images), at least one and not all; a class of one to three images gives none,
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

    Raises: TrainingError: the folder holds a run on another split, or on other images. FetchError: no space or no
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
