"""Whether the labels of a data set mean what the logits of a model mean."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import PIL.Image

from ..errors import DataError
from ..models.layers import ImageClassifier
from ..predict import class_names_of
from .records import ImageRecords, some

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
