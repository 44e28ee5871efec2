"""Class names of models and data sets: which logit belongs to which label."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ConfigError, DataError
from ..models.layers import ImageClassifier
from .records import ImageRecords, SubsetRecords, some

logger = logging.getLogger(__name__)

_WORDNET_ID = re.compile(r"n\d{8}")


def class_labels(model: ImageClassifier, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """A name for each logit: those given, the checkpoint's, ImageNet's, or numbers."""
    names = class_names_of(model) if given is None else _checked(model, given)
    return names or tuple(f"class {number}" for number in range(model.num_classes))


def class_names_of(model: ImageClassifier) -> tuple[str, ...] | None:
    """A name for each logit, if the weights came with them or were trained on ImageNet-1k; None if not."""
    origin = model.origin
    if origin is not None and origin.class_names is not None:
        return _checked(model, origin.class_names)
    if origin is not None and origin.dataset == "ImageNet-1k" and model.num_classes == 1000:
        from torchvision.models import get_weight

        return tuple(get_weight("ResNet18_Weights.IMAGENET1K_V1").meta["categories"])
    return None


def _checked(model: ImageClassifier, names: Sequence[str]) -> tuple[str, ...]:
    if len(names) != model.num_classes:
        raise ConfigError(f"{len(names)} labels given, {model.num_classes} expected: one for each class of the model")
    return tuple(names)


class Match(NamedTuple):
    """Correspondence of a data set's classes with a model's.

    Attributes:
        order: for each label of the data the model's logit of the same class; None if the names do not match.
        difference: of the names; empty if they match or the model has none.
    """

    order: tuple[int, ...] | None
    difference: str = ""


def match_classes(model: ImageClassifier, records: ImageRecords) -> Match:
    """Compare class names; there must be as many as the model has classes.

    ImageNet's thousand classes are accepted by their WordNet ids, whose sorted order is that of every ImageNet model's
    logits, and as torchvision's data set, which is in that order.
    """
    names, classes = class_names_of(model), records.classes
    if names is not None and len(set(names)) == len(names) and set(names) == set(classes):
        return Match(tuple(map(names.index, classes)))
    sorted_ids = list(classes) == sorted(classes) and all(map(_WORDNET_ID.fullmatch, classes))
    if len(classes) == 1000 and (sorted_ids or records.name == "imagenet"):
        return Match(tuple(range(1000)))
    if names is None:
        return Match(None)
    ours, theirs = (
        some([name for name in one if name not in set(other)]) or "no other"
        for one, other in ((names, classes), (classes, names))
    )
    return Match(None, f"the model alone knows {ours}, the data alone has {theirs}")


def in_the_models_order(
    model: ImageClassifier, records: ImageRecords, *, ignore_class_names: bool = False
) -> ImageRecords:
    """The records with labels that are numbers of the model's logits: matched by name, if the model has class names.

    Raises: DataError: another number of classes, or other names and not `ignore_class_names`.
    """
    if len(records.classes) != model.num_classes:
        raise DataError(
            f"{records.name} has {len(records.classes)} classes, the model has {model.num_classes}; evaluate a model "
            f"that was trained for these classes"
        )
    order, difference = match_classes(model, records)
    if order is not None:
        if list(order) == sorted(order):
            return records
        names = [records.classes[order.index(logit)] for logit in range(len(order))]
        return SubsetRecords(records, range(len(records)), classes=names)
    if difference and not ignore_class_names:
        raise DataError(
            f"{records.name} has other classes than the model: {difference}; rename the folders, or pass "
            f"ignore_class_names=True (--ignore-class-names) if they are the same classes in the same order"
        )
    if not ignore_class_names:
        logger.warning("the model does not name its classes: taken to be in the order of %s", records.name)
    return records
