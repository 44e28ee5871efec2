"""Whether the labels of a data set mean what the logits of a model mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import PIL.Image

from ..finetuning.head import class_names_of
from ..models.layers import ImageClassifier
from ..training.records import ImageRecords, some

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
