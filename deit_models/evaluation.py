"""Accuracy and loss of models on labelled images; each image is counted exactly once, also by several processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data.classes import in_the_models_order
from .data.datasets import open_images
from .data.inputs import eval_batches
from .data.loading import Batch, DamageCount, Watch, default_workers, explained_worker_failure, plain_watch
from .data.records import ImageRecords
from .data.transforms import EvalTransform, preprocessing_of, to_device
from .distributed import Process, join_processes
from .errors import DataError
from .models.layers import HeadLogits, ImageClassifier
from .training.recipe import Precision


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy and loss of a model on a labelled set.

    Attributes:
        top1: percent of images whose likeliest class is the label.
        top5: percent whose label is among the five likeliest (among all, with fewer than five classes).
        loss: mean cross-entropy.
        images: images scored, each once.
        skipped: images that could not be read.
        heads: top-1 of each head by itself, for models with two.
    """

    top1: float
    top5: float
    loss: float
    images: int
    skipped: int
    heads: dict[str, float] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
    transform: EvalTransform | None = None,
    ignore_class_names: bool = False,
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
) -> Evaluation:
    """Score a model on labelled images, each exactly once, also under torchrun.

    Args:
        model: gives (B, K) logits; moved to the device, the mode of each of its modules is left as found.
        data: a folder or the name of a data set, or a Dataset. Its classes are matched with the model's by name; by
            number where the model has no class names (which is logged), or is no model of this package.
        batch_size: images at once, in each process.
        workers: loading processes.
        device: where to compute; default: the GPU if there is one.
        precision: of the forward pass.
        transform: default: the one that belongs to the model's weights.
        ignore_class_names: match by number although the names differ.
        corrupt_limit: fraction of the images that may be unreadable.
        watch: wraps the batches, for a progress bar.

    Raises: DataError: images missing or damaged, other classes than the model's. ConfigError: no transform known.
    """
    records = open_images(data, "val")
    if isinstance(model, ImageClassifier):
        if model.origin is not None:
            model.origin.check_single_label("evaluation")
        records = in_the_models_order(model, records, ignore_class_names=ignore_class_names)
    with join_processes(device) as process:
        return collect_outcomes(
            model,
            records,
            process,
            transform=transform,
            batch_size=batch_size,
            workers=default_workers(process.device) if workers is None else workers,
            precision=precision,
            corrupt_limit=corrupt_limit,
            watch=watch,
        ).evaluation()


def collect_outcomes(
    model: nn.Module,
    records: ImageRecords,
    process: Process,
    *,
    precision: Precision,
    workers: int,
    batch_size: int,
    corrupt_limit: float,
    transform: EvalTransform | None = None,
    watch: Watch = plain_watch,
) -> Outcomes:
    """Score each image of a set; every process does its share, and all get the whole result.

    The arguments are those of `evaluate`; labels of `records` are the numbers of the model's logits.
    Raises: DataError: too many images cannot be read. ConfigError: no transform known.
    """
    transform = transform or EvalTransform(preprocessing_of(model))
    heads, damage = Heads(model.to(process.device)), DamageCount(records, corrupt_limit)
    batches = eval_batches(records, transform, process, batch_size=batch_size, workers=workers)
    with explained_worker_failure(workers):
        return score(heads, watch(batches, len(batches)), process, precision=precision, damage=damage)


def score(
    heads: nn.Module, batches: Iterable[Batch], process: Process, *, precision: Precision, damage: DamageCount
) -> Outcomes:
    """Score one model on batches; see `score_each`."""
    return score_each({"": heads}, batches, process, precision=precision, damage=damage)[""]


@torch.inference_mode()
def score_each(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    process: Process,
    *,
    precision: Precision,
    damage: DamageCount,
    rounds: int | None = None,
) -> dict[str, Outcomes]:
    """Score several models in one pass; every process brings its share, and all get the same result.

    The models give the logits of their heads, see `Heads`; the mode of each module is left as found. The batches are
    this process's share, in the order of `ShardSampler`. Where parameters are divided between processes, each must run
    as many forward passes, `rounds`. Results stay on the device; they are read once, at the end.

    Raises: DataError: more classes than logits, or too many images that cannot be read.
    """
    tallies, device, done = {name: Tally() for name in models}, process.device, 0
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(eval_mode(model))
        for images, labels, failures in batches:
            damage.add(failures)
            images = images.to(device, non_blocking=True)
            for name, model in models.items():
                logits = _forward(model, images, precision)
                if (found := logits[0].shape[1]) < (needed := len(damage.records.classes)):
                    raise DataError(f"{damage.records.name} has {needed} classes, the model {found}")
                tallies[name].add(logits, labels)
            done += 1
        for _ in range(done, rounds or 0):  # the other processes still have images
            for model in models.values():
                _forward(model, images, precision)
    damage.meet(process)
    return {name: tally.outcomes(process) for name, tally in tallies.items()}


def _forward(heads: nn.Module, images: Tensor, precision: Precision) -> list[Tensor]:
    """The logits of each head that is there, (B, K), without those of patches."""
    with autocast(images.device, precision):
        return [logits for logits in heads(images)[:2] if logits is not None]


class Heads(nn.Module):
    """A model whose forward gives the logits of each head, in training and in eval mode alike.

    This module is compiled and distributed, because DDP and torch.compile go through `forward`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> HeadLogits | tuple[Any, ...]:
        """(B, 3, H, W) -> the heads' logits; a foreign network has one head."""
        return (
            self.model.forward_heads(x) if isinstance(self.model, ImageClassifier) else HeadLogits(self.model(x), None)
        )


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Mixed precision on a device; nothing for float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module gets its mode back: a part may have been frozen on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The result for each image that could be read, in the order of the set; tensors on the CPU, (N,).

    Attributes:
        index: its number in the set.
        label: its class.
        predicted: the likeliest class.
        probability: of that class.
        in_top5: whether the label is among the five likeliest.
        losses: cross-entropy.
        heads: for each head of a model with two, whether its own likeliest class is the label.
        skipped: images that could not be read.
    """

    index: Tensor
    label: Tensor
    predicted: Tensor
    probability: Tensor
    in_top5: Tensor
    losses: Tensor
    heads: dict[str, Tensor]
    skipped: int

    def evaluation(self) -> Evaluation:
        """The means over the images; 0 without images."""
        top1, top5, *heads = (
            100 * _mean(right) for right in (self.predicted == self.label, self.in_top5, *self.heads.values())
        )
        each = dict(zip(self.heads, heads, strict=True))
        return Evaluation(top1, top5, _mean(self.losses), len(self.index), self.skipped, each)

    def by_class(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """The number of images of each class, and how many of them were recognised; (K,) each."""
        return (
            torch.bincount(self.label, minlength=num_classes),
            torch.bincount(self.label[self.predicted == self.label], minlength=num_classes),
        )

    def worst(self, count: int) -> list[int]:
        """Positions of the mistakes with the highest loss, the highest first."""
        wrong = (self.predicted != self.label).nonzero().flatten()
        order = self.losses[wrong].argsort(descending=True, stable=True)
        return wrong[order][:count].tolist()


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


class Tally:
    """Collects the results of a pass over images; they stay on the model's device until `outcomes` reads them."""

    def __init__(self) -> None:
        self._labels: list[Tensor] = []
        self._results: list[Tensor] = []

    def add(self, heads: Sequence[Tensor], labels: Tensor) -> None:
        """Note a batch.

        Args:
            heads: the logits of one or two heads, (B, K) each; their mean decides, as in eval mode.
            labels: (B,) int64, beside the logits or on the CPU; below 0 for images that could not be read.
        """
        heads = [logits.float() for logits in heads]
        mean = torch.stack(heads).mean(dim=0)
        # unreadable images are left out at the end: to choose the others here would wait for their number
        target = to_device(labels, mean.device).clamp(min=0)
        likeliest = mean.topk(min(5, mean.shape[1]), dim=1).indices
        rows = [
            likeliest[:, 0],
            mean.softmax(dim=1).amax(dim=1),
            (likeliest == target[:, None]).any(dim=1),
            F.cross_entropy(mean, target, reduction="none"),
            *(logits.argmax(dim=1) == target for logits in heads),
        ]
        self._labels.append(labels)
        self._results.append(torch.stack([row.float() for row in rows]))  # class numbers up to 2**24 are exact

    def outcomes(self, process: Process | None = None) -> Outcomes:
        """The results; with a process, those of all of them, of which each had every world-th image."""
        labels, results = torch.empty(0, dtype=torch.int64), torch.empty(5, 0)
        if self._labels:
            labels, results = torch.cat(self._labels).cpu(), torch.cat(self._results, dim=1).cpu()
        shares = [(labels, results)] if process is None else process.gather((labels, results))
        index = torch.cat([torch.arange(len(share)) * len(shares) + rank for rank, (share, _) in enumerate(shares)])
        labels = torch.cat([share for share, _ in shares])
        results = torch.cat([share for _, share in shares if share.numel()] or [results], dim=1)
        order = index.argsort()
        order = order[labels[order] >= 0]
        predicted, probability, in_top5, losses, *right = results[:, order]
        heads = dict(zip(("class", "distillation"), (row.bool() for row in right), strict=True)) if right[1:] else {}
        skipped = len(labels) - len(order)
        index, label = index[order], labels[order]
        return Outcomes(index, label, predicted.long(), probability, in_top5.bool(), losses, heads, skipped)
