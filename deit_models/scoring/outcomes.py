"""Outcomes of scored images: collected over a pass, summed up as figures, kept in a file in parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..batches.loading import Batch
from ..data.records import ImageRecords
from ..distributed import Process
from ..images.transforms import to_device
from .metrics import UNSURE, average_precision, f1_scores, percent
from .parts import about_of, check_same_run, column, join_columns, texts

_COLUMNS = ("label", "predicted", "probability", "in_top5", "losses")
_HEAD = "right_"
"""In a file, in front of the name of a head: whether its likeliest class is a label."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy and loss of a model on a labelled set; figures but the loss in percent.

    Attributes:
        top1: images whose likeliest class is the label, or one of several.
        top5: images with a label among the five likeliest classes (among all, with fewer than five).
        loss: mean cross-entropy; of several labels an image the binary one, averaged over the classes, too.
        images: images scored, each once.
        skipped: images that could not be read.
        heads: top-1 of each head by itself, for models with two.
        balanced_accuracy: mean over the classes of the share of their images that is recognised; None for several
            labels an image.
        macro_f1: mean over the classes of F1, without classes that neither occur nor are predicted.
        micro_f1: F1 of all decisions together; for several labels an image, as is the next, else None.
        map: mean average precision, over the classes that occur.
    """

    top1: float
    top5: float
    loss: float
    images: int
    skipped: int
    heads: dict[str, float] = field(default_factory=dict)
    balanced_accuracy: float | None = None
    macro_f1: float = 0.0
    micro_f1: float | None = None
    map: float | None = None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The result for each image that could be read, in the order of the set; tensors on the CPU, (N,).

    Attributes:
        index: its number in the set.
        label: its class; of several labels an image (N, K) bool.
        predicted: the likeliest class.
        probability: of that class.
        in_top5: whether a label is among the five likeliest.
        losses: cross-entropy, see `Evaluation`.
        heads: for each head of a model with two, whether its own likeliest class is a label.
        skipped: images that could not be read.
        scores: of several labels an image the probability of each, (N, K); else None.
    """

    index: Tensor
    label: Tensor
    predicted: Tensor
    probability: Tensor
    in_top5: Tensor
    losses: Tensor
    heads: dict[str, Tensor]
    skipped: int
    scores: Tensor | None = None

    def evaluation(self, thresholds: Sequence[float] | None = None) -> Evaluation:
        """The means over the images; 0 without images. `thresholds` are those of several labels, by default UNSURE."""
        top1, top5, *heads = (100 * _mean(right) for right in (self.right(), self.in_top5, *self.heads.values()))
        last = max((int(numbers.max()) for numbers in (self.label, self.predicted) if len(numbers)), default=0)
        images, right, predicted = self.by_class(last + 1, thresholds)
        figures: dict[str, Any] = {"macro_f1": percent(f1_scores(right, images, predicted))}
        if self.scores is None:
            figures["balanced_accuracy"] = percent(right.double() / images)
        else:
            figures["micro_f1"] = percent(f1_scores(*(counts.sum()[None] for counts in (right, images, predicted))))
            figures["map"] = percent(average_precision(self.scores, self.label))
        each = dict(zip(self.heads, heads, strict=True))
        return Evaluation(top1, top5, _mean(self.losses), len(self.index), self.skipped, each, **figures)

    def right(self) -> Tensor:
        """Whether the likeliest class is a label, (N,) bool."""
        if self.scores is None:
            return self.predicted == self.label
        return self.label.gather(1, self.predicted[:, None])[:, 0]

    def by_class(self, num_classes: int, thresholds: Sequence[float] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """For each class the number of its images, of those recognised, and of all that are taken for it; (K,) each."""
        if self.scores is not None:
            chosen = self.scores.double() >= torch.tensor(thresholds or UNSURE, dtype=torch.double)
            return self.label.sum(0), (self.label & chosen).sum(0), chosen.sum(0)
        groups = (self.label, self.label[self.right()], self.predicted)
        images, right, predicted = (torch.bincount(group, minlength=num_classes) for group in groups)
        return images, right, predicted

    def worst(self, count: int) -> list[int]:
        """Positions of the mistakes with the highest loss, the highest first."""
        wrong = (~self.right()).nonzero().flatten()
        order = self.losses[wrong].argsort(descending=True, stable=True)
        return wrong[order][:count].tolist()


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


class Tally:
    """Collects the results of a pass over images; they stay on the model's device until `outcomes` reads them."""

    def __init__(self) -> None:
        self._labels: list[Tensor] = []
        self._results: list[Tensor] = []
        self._scores: list[Tensor] = []

    def add(self, heads: Sequence[Tensor], labels: Tensor) -> None:
        """Note a batch.

        Args:
            heads: the logits of one or two heads, (B, K) each; their mean decides, as in eval mode.
            labels: (B,) int64, or (B, K) of 0 and 1 for several an image, beside the logits or on the CPU; below 0 for
                images that could not be read.
        """
        heads = [logits.float() for logits in heads]
        mean = torch.stack(heads).mean(dim=0)
        # unreadable images are left out at the end: to choose the others here would wait for their number
        target = to_device(labels, mean.device).clamp(min=0)
        likeliest = mean.topk(min(5, mean.shape[1]), dim=1).indices
        if labels.ndim == 1:
            scores, losses = mean.softmax(dim=1), F.cross_entropy(mean, target, reduction="none")
        else:
            scores = mean.sigmoid()
            losses = F.binary_cross_entropy_with_logits(mean, target, reduction="none").mean(dim=1)
            self._scores.append(scores)

        def met(classes: Tensor) -> Tensor:  # (B, n): whether one of them is a label
            return (classes == target[:, None] if labels.ndim == 1 else target.gather(1, classes) > 0).any(dim=1)

        tops = (logits.argmax(dim=1, keepdim=True) for logits in heads)
        rows = [likeliest[:, 0], scores.amax(dim=1), met(likeliest), losses, *map(met, tops)]
        self._labels.append(labels)
        self._results.append(torch.stack([row.float() for row in rows]))  # class numbers up to 2**24 are exact

    def outcomes(self, process: Process | None = None) -> Outcomes:
        """The results; with a process, those of all of them, of which each had every world-th image."""
        labels, results, scores = torch.empty(0, dtype=torch.int64), torch.empty(5, 0), None
        if self._labels:
            labels, results = torch.cat(self._labels).cpu(), torch.cat(self._results, dim=1).cpu()
            scores = torch.cat(self._scores).cpu() if self._scores else None
        shares = [(labels, results, scores)] if process is None else process.gather((labels, results, scores))
        index = torch.cat([torch.arange(len(share)) * len(shares) + rank for rank, (share, *_) in enumerate(shares)])
        labels = torch.cat([share for share, *_ in shares])
        results = torch.cat([share for _, share, _ in shares if share.numel()] or [results], dim=1)
        scored = [share for *_, share in shares if share is not None]
        order = index.argsort()
        order = order[(labels[order] if labels.ndim == 1 else labels[order, 0]) >= 0]
        predicted, probability, in_top5, losses, *right = results[:, order]
        heads = dict(zip(("class", "distillation"), (row.bool() for row in right), strict=True)) if right[1:] else {}
        skipped = len(labels) - len(order)
        index, label = index[order], labels[order]
        label, scores = (label.bool(), torch.cat(scored)[order]) if scored else (label, None)
        return Outcomes(index, label, predicted.long(), probability, in_top5.bool(), losses, heads, skipped, scores)


# In a file


def in_blocks(batches: Iterable[Batch], blocks: Sequence[range]) -> Iterator[tuple[range, Iterator[Batch]]]:
    """The images of each block in batches, from the batches of all blocks' images one after the other.

    Their failures, positions in that order, become numbers of the set. Read each block before asking for the next one.
    """
    numbers = torch.tensor([number for block in blocks for number in block])
    stream, rest = iter(batches), None  # type: tuple[Iterator[Batch], Batch | None]

    def some(count: int) -> Iterator[Batch]:
        nonlocal rest
        while count > 0:
            images, labels, failures = rest or next(stream)
            failures = torch.where(failures >= 0, numbers[failures], failures) if rest is None else failures
            yield images[:count], labels[:count], failures[:count]
            rest = (images[count:], labels[count:], failures[count:]) if len(labels) > count else None
            count -= len(labels)

    for block in blocks:
        yield block, some(len(block))


def write_block(path: Path, outcomes: Outcomes, block: range, records: ImageRecords) -> None:
    """Write the outcomes of a block of the set, whose own numbers are those in the block."""
    tensors = {name: getattr(outcomes, name) for name in _COLUMNS} | {"index": outcomes.index + block.start}
    tensors |= {_HEAD + name: right for name, right in outcomes.heads.items()}
    tensors |= {} if outcomes.scores is None else {"scores": outcomes.scores}
    images = texts(records.key(i) for i in tensors["index"].tolist())
    with path.open("wb") as file:
        np.savez(file, images=images, **{name: tensor.numpy() for name, tensor in tensors.items()})


def join_blocks(path: Path, blocks: Sequence[Path], _: list[str], *, run: Mapping[str, Any]) -> None:
    """Write the files of all blocks as one, beside the run's settings."""
    with np.load(blocks[0]) as arrays:
        names = list(arrays)
    join_columns(path, blocks, names, json.dumps(run), sum(len(column(block, "index")) for block in blocks))


def read_outcomes(path: Path, run: Mapping[str, Any]) -> Outcomes:
    """The outcomes in a file. Raises: DataError: it is no such file. ConfigError: it is of another run."""
    check_same_run(run, about_of(path, "outcomes that evaluate wrote"), where=path)
    with np.load(path) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays if name not in ("about", "images")}
    heads = {name.removeprefix(_HEAD): tensors.pop(name) for name in list(tensors) if name.startswith(_HEAD)}
    return Outcomes(heads=heads, skipped=int(run["images"]) - len(tensors["index"]), **tensors)
