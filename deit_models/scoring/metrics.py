"""Figures for classes that are uneven or several an image, and their certainty: F1, average precision, calibration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.records import ImageRecords
from ..errors import DataError

logger = logging.getLogger(__name__)

FIGURES = {
    **{"map": "mAP", "top1": "top-1", "top5": "top-5"},
    **{"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1"},
}
"""Names of the figures of an `Evaluation` that are in percent, for people."""
UNSURE = 0.5
"""Threshold of a label where none was chosen."""
_UNEVEN = 10
"""Of so many times more images in the largest class than in the smallest, a line tells what helps."""


def choosing_figure(*, several: bool, balanced: bool) -> str:
    """The figure of validation images that chooses an epoch or a penalty.

    Top-1; for several labels an image mAP; where training is balanced the accuracy that is, too.
    """
    return "map" if several else "balanced_accuracy" if balanced else "top1"


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Training images of each class.

    Attributes:
        images: of each class, (K,) int64.
        total: of all images that have a label, or may have several.
        multi_label: whether an image has several labels.
    """

    images: Tensor
    total: int
    multi_label: bool

    def weights(self, *, binary: bool) -> Tensor:
        """Weights by which each class adds as much to the loss, however few images it has; 1 where it has none.

        Shape: (K,), images / (classes * images of the class); `binary`, with a question for each class: (2, K), the
            same of the images with it and of those without.
        Source: scikit-learn's class_weight="balanced", for several labels in one classifier a class.
        """
        if not binary:
            return self._balanced(self.images, int((self.images > 0).sum()))
        return torch.stack([self._balanced(part, 2) for part in (self.images, self.total - self.images)])

    def _balanced(self, images: Tensor, classes: int) -> Tensor:
        return torch.where(images > 0, self.total / (classes * images.clamp(min=1)), 1.0).float()


def count_classes(records: ImageRecords, labels: Sequence[Any], *, balanced: bool) -> ClassCounts:
    """Count the labels of a set, see `labels_of`; images that cannot be read are left out.

    A log line tells the largest and the smallest class, with advice where they are very uneven, unless the recipe is
    `balanced` already.
    """
    known = [label for label in labels if label != -1]
    numbers = [number for label in known for number in label] if records.multi_label else known
    images = torch.bincount(torch.tensor(numbers, dtype=torch.int64), minlength=len(records.classes))
    uneven = int(images.max()) >= _UNEVEN * max(int(images.min()), 1)
    advice = "; class_weights='balanced' or sampling='balanced' may help the small ones"
    most, least = (f"{records.classes[int(place)]} ({images[place]})" for place in (images.argmax(), images.argmin()))
    logger.log(
        *(logging.WARNING if uneven else logging.INFO, "%d images, %d classes: largest %s, smallest %s%s"),
        *(len(known), len(records.classes), most, least, advice if uneven and not balanced else ""),
    )
    return ClassCounts(images, len(known), records.multi_label)


def in_words(figures: Mapping[str, Any]) -> str:
    """Figures in percent, by their names in FIGURES; those that are not there are left out."""
    found = ((figures.get(key), name) for key, name in FIGURES.items())
    return ", ".join(f"{value:.2f} % {name}" for value, name in found if value is not None)


def f1_scores(right: Tensor, labelled: Tensor, predicted: Tensor) -> Tensor:
    """F1 of each class from numbers of images; NaN for a class that neither occurs nor is predicted.

    Shape: three of (K,) -> (K,) float64.
    """
    return 2 * right.double() / (labelled + predicted)


def percent(values: Tensor) -> float:
    """The mean of those values that are numbers, in percent; 0 without any."""
    known = values[~values.isnan()].double()
    return 100 * float(known.mean()) if len(known) else 0.0


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Area under precision over recall, as a sum of steps, of each class; NaN for a class without images.

    Shape: scores (N, K) float, truth (N, K) bool -> (K,) float64.
    Source: Everingham et al., The PASCAL VOC challenge, 2010, without interpolation, as in scikit-learn.
    """
    return torch.tensor([_area(*_cuts(scores[:, k], truth[:, k])) for k in range(scores.shape[1])], dtype=torch.double)


def best_thresholds(scores: Tensor, truth: Tensor) -> tuple[float, ...]:
    """The threshold of each class with the highest F1 on these images, in the middle between two scores.

    Shape: scores (N, K) float from 0 to 1, truth (N, K) bool -> K numbers; UNSURE for a class without images.
    """
    return tuple(_threshold(*_cuts(scores[:, k], truth[:, k])) for k in range(scores.shape[1]))


def _cuts(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct scores of a class, falling; for each, the images from there up, and those of the class among them.

    Shape: (N,) and (N,) -> three of (C,), float64.
    """
    scores, order = scores.double().sort(descending=True)
    ends = torch.cat([scores[1:] != scores[:-1], torch.ones(min(len(scores), 1), dtype=torch.bool)])
    taken = torch.arange(1, len(scores) + 1, dtype=torch.double)
    return scores[ends], taken[ends], truth[order].double().cumsum(0)[ends]


def _area(_: Tensor, taken: Tensor, right: Tensor) -> float:
    if not len(right) or not right[-1]:
        return float("nan")
    return float((right.diff(prepend=right.new_zeros(1)) * right / taken).sum() / right[-1])


def _threshold(scores: Tensor, taken: Tensor, right: Tensor) -> float:
    if not len(right) or not right[-1]:
        return UNSURE
    best = int((2 * right / (taken + right[-1])).argmax())
    below = float(scores[best + 1]) if best + 1 < len(scores) else 0.0
    return (float(scores[best]) + below) / 2


def wilson_interval(right: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the 95 % interval of a share, `right` of `images`, from 0 to 1; NaN without images.

    Shape: (K,) numbers of images, twice -> two of (K,) float64.
    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927, without correction.
    """
    total, z = images.double(), 1.959963984540054
    share = right / total
    middle, half = share + z**2 / (2 * total), z * (share * (1 - share) / total + (z / total) ** 2 / 4).sqrt()
    low, high = ((middle + side * half) / (1 + z**2 / total) for side in (-1, 1))
    # exactly 0 and 1 where the last bits would say otherwise
    return torch.where(share == 0, 0.0, low), torch.where(share == 1, 1.0, high)


class Calibration(NamedTuple):
    """Predictions by their probability, in bins of equal width; tensors of (bins,), NaN where a bin is empty.

    Attributes:
        images: predictions in each bin.
        confidence: mean of their probabilities.
        right: share of them that is right.
        error: expected calibration error in percent: the mean over the images of |right - confidence| of their bin.
    """

    images: Tensor
    confidence: Tensor
    right: Tensor
    error: float


def calibration(probability: Tensor, right: Tensor, *, bins: int = 15) -> Calibration:
    """Compare the probabilities of predictions, (N,) from 0 to 1, with whether they are right, (N,).

    Source: Guo et al., On calibration of modern neural networks, 2017; a bin includes its upper end.
    """
    probability, right = probability.double(), right.double()
    place = torch.bucketize(probability, torch.linspace(0, 1, bins + 1, dtype=torch.double)[1:-1])
    images, certain, hits = (
        torch.bincount(place, weights=weights, minlength=bins)
        for weights in (torch.ones_like(probability), probability, right)
    )
    error = 100 * float((hits - certain).abs().sum()) / max(len(right), 1)
    return Calibration(images.long(), certain / images, hits / images, error)


def check_kinds(records: ImageRecords, *others: ImageRecords | None) -> None:
    """Raise DataError unless all sets have as many labels an image, one or several, as the first."""
    for other in others:
        if other is not None and other.multi_label != records.multi_label:
            one, several = sorted((records, other), key=lambda each: each.multi_label)
            raise DataError(
                f"images of {several.name} have several labels, those of {one.name} one class; bring both into one form"
            )
