"""Class names of models and data sets: which logit belongs to which label."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..checkpoint import weights_dir
from ..errors import ConfigError, DataError
from ..files import read_text
from ..models.layers import ImageClassifier
from .records import ImageRecords, SubsetRecords, some

logger = logging.getLogger(__name__)

_WORDNET_ID = re.compile(r"n\d{8}")
_WORDNET_FILE = "imagenet_wordnet_ids.txt"


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
    """The records with labels that are numbers of the model's logits.

    Classes are matched by name, WordNet id or number. They may be some of the model's; then their images are scored
    among all of the model's classes, and a line says so.

    Raises: DataError: classes that the model lacks, unless they are as many as the model's and `ignore_class_names`.
    """
    whole = len(records.classes) == model.num_classes
    order, difference = match_classes(model, records) if whole else Match(None)
    if order is None and not (whole and ignore_class_names):
        order = _order_by_spelling(model, records)
    if order is not None:
        if order == tuple(range(model.num_classes)):
            return records
        names = [f"(not in {records.name}: {logit})" for logit in range(model.num_classes)]
        for name, logit in zip(records.classes, order, strict=True):
            names[logit] = name
        return SubsetRecords(records, range(len(records)), classes=names)
    if not whole:
        raise DataError(
            f"{records.name} has {len(records.classes)} classes, the model has {model.num_classes}; evaluate a model "
            f"that was trained for these classes, or name their folders as the model names its classes"
        )
    if difference and not ignore_class_names:
        raise DataError(
            f"{records.name} has other classes than the model: {difference}; rename the folders, or pass "
            f"ignore_class_names=True (--ignore-class-names) if they are the same classes in the same order"
        )
    if not ignore_class_names:
        logger.warning("the model does not name its classes: taken to be in the order of %s", records.name)
    return records


def _order_by_spelling(model: ImageClassifier, records: ImageRecords) -> tuple[int, ...] | None:
    """The logit of each class, all different; None if they cannot be told. A line says what they are matched by."""
    names, classes = class_names_of(model) or (), records.classes
    exact, spoken = _unique((name,) for name in names), _unique(map(_synonyms, names))
    found: dict[str, list[int | None]] = {
        "name": [exact.get(name) for name in classes],
        "name in another spelling": [
            next((spoken[word] for word in _synonyms(name) if word in spoken), None) for name in classes
        ],
        "number": [int(name) if name.isdecimal() and int(name) < model.num_classes else None for name in classes],
    }
    if len(names) == 1000 and names[0].startswith("tench") and names[-1].startswith("toilet tissue"):
        ids = {name: logit for logit, name in enumerate(read_text(weights_dir() / _WORDNET_FILE).split())}
        found["WordNet id"] = [ids.get(name) for name in classes]
    for kind, logits in found.items():
        order = tuple(logit for logit in logits if logit is not None)
        if len({*order}) == len(classes):
            of_many = f"{len(classes)} of the model's {model.num_classes} classes" if len(names) else "classes"
            logger.warning("%s: %s, matched by %s; each image is scored among all", records.name, of_many, kind)
            return order
    return None


def _synonyms(name: str) -> list[str]:
    """A class name without case and punctuation, whole and by its parts between commas."""
    return [" ".join(re.split(r"[\W_]+", part.casefold())).strip() for part in (name, *name.split(","))]


def _unique(names: Iterable[Iterable[str]]) -> dict[str, int]:
    """The number of each name that belongs to one number alone."""
    found: dict[str, set[int]] = {}
    for number, synonyms in enumerate(names):
        for name in synonyms:
            found.setdefault(name, set()).add(number)
    return {name: min(numbers) for name, numbers in found.items() if len(numbers) == 1}
