"""What a model said of each image: the basis of accuracies by class, of the confusion matrix, of the worst mistakes."""
# MERGED """How well a model does on labelled images, each counted exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import Preprocessing
from .data.classes import in_the_models_order
from .data.datasets import open_images
from .data.inputs import EvalSamples, InputBatches, ShardSampler
from .data.levels import EvalInput
from .data.loading import (
    FINE,
    PADDING,
    Batch,
    DamageCount,
    Watch,
    default_workers,
    explained_worker_failure,
    plain_watch,
)
from .data.records import ImageRecords
from .data.transforms import EvalTransform
from .distributed import Process, join_processes
from .errors import ConfigError, DataError
from .models.layers import ImageClassifier, TrainingLogits
from .training.learner import Heads, autocast
from .training.recipe import Precision


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model does on a labelled set.

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


def score(
    heads: nn.Module,
    batches: Iterable[Batch],
    process: Process,
    *,
    precision: Precision,
    damage: DamageCount,
    rounds: int | None = None,
) -> Evaluation:
    """Score a model on batches: `score_each` for one."""
    versions = {"": heads}
    return score_each(versions, batches, process, precision=precision, damage=damage, rounds=rounds)[""]


@torch.inference_mode()
def score_each(
    versions: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    process: Process,
    *,
    precision: Precision,
    damage: DamageCount,
    rounds: int | None = None,
) -> dict[str, Evaluation]:
    """Score several models in one pass; every process brings its share, and all get the same result.

    Args:
        versions: each gives `TrainingLogits`; the mode of each of its modules is left as found.
        batches: this process's share of the images.
        process: this one.
        precision: of the forward pass.
        damage: counts images that could not be read.
        rounds: batches that each process must run, for models whose parameters are divided between processes.

    Sums stay on the device; they are read once, at the end.
    Raises: DataError: more classes than logits, or too many images that cannot be read.
    """
    classes, device = len(damage.records.classes), process.device
    sums = torch.zeros(len(versions), _SUMS, dtype=torch.float64, device=device)
    two_heads: set[str] = set()
    with ExitStack() as modes:
        for heads in versions.values():
            modes.enter_context(_evaluating(heads))
        for images, labels, failures in batches if rounds is None else _padded(batches, rounds):
            damage.add(failures)
            images, labels, failures = (part.to(device, non_blocking=True) for part in (images, labels, failures))
            for row, (name, heads) in zip(sums, versions.items(), strict=True):
                with autocast(device, precision):
                    logits = heads(images)
                if logits.cls.shape[1] < classes:
                    raise DataError(f"{damage.records.name} has {classes} classes, the model {logits.cls.shape[1]}")
                if logits.dist is not None:
                    two_heads.add(name)
                row += _score_batch(logits, labels, failures)
    damage.meet(process)
    figures = dict(zip(versions, process.total(sums).tolist(), strict=True))
    return {name: _evaluation(row, two_heads=name in two_heads) for name, row in figures.items()}


def _evaluation(sums: Sequence[float], *, two_heads: bool) -> Evaluation:
    count, skipped, right, right5, loss, right_cls, right_dist = sums
    of = 100 / max(count, 1)
    each = {"class": right_cls * of, "distillation": right_dist * of} if two_heads else {}
    return Evaluation(right * of, right5 * of, loss / max(count, 1), int(count), int(skipped), each)


_SUMS = 7


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, then for each module the mode it had: a part may have been frozen on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _score_batch(logits: TrainingLogits, labels: Tensor, failures: Tensor) -> Tensor:
    """What one batch adds: images, skipped, top-1, top-5, loss, top-1 of the class head, of the distillation head."""
    fine, skipped = failures == FINE, failures >= 0
    # images that do not count are passed over by a factor: choosing the others would wait for their number
    cls, labels = logits.cls.float(), labels.where(fine, 0)
    dist = cls if logits.dist is None else logits.dist.float()
    mean = (cls + dist) / 2  # what an evaluated model returns
    ranked = (mean.topk(min(5, mean.shape[1]), dim=1).indices == labels[:, None]) & fine[:, None]
    losses = F.cross_entropy(mean, labels, reduction="none").where(fine, 0.0)
    return torch.stack(
        [
            fine.sum(),
            skipped.sum(),
            ranked[:, 0].sum(),
            ranked.sum(),
            losses.double().sum(),
            ((cls.argmax(1) == labels) & fine).sum(),
            ((dist.argmax(1) == labels) & fine).sum(),
        ]
    ).double()


def _padded(batches: Iterable[Batch], rounds: int) -> Iterator[Batch]:
    """The batches, then the last one again as mere padding, `rounds` in all."""
    for batch in batches:
        rounds -= 1
        yield batch
    for _ in range(rounds):
        yield batch[0], batch[1], torch.full_like(batch[2], PADDING)


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
            number where the model does not name its own (which is logged), or is no model of this package.
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
        records = in_the_models_order(model, records, ignore_class_names=ignore_class_names)
    transform = transform or EvalTransform(preprocessing_of(model))
    with join_processes(device) as process:
        workers = default_workers(process.device) if workers is None else workers
        batches = eval_batches(records, transform, process, batch_size=batch_size, workers=workers)
        damage = DamageCount(records, corrupt_limit)
        with explained_worker_failure(workers):
            heads = Heads(model.to(process.device))
            return score(heads, watch(batches, len(batches)), process, precision=precision, damage=damage)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """What a model's input looks like. Raises: ConfigError: it does not say."""
    if isinstance(model, ImageClassifier) and model.origin is not None:
        return model.origin.preprocessing
    raise ConfigError("this model does not say how its input is normalised; pass it along, as a Preprocessing")


def eval_batches(
    records: ImageRecords,
    transform: EvalTransform,
    process: Process,
    *,
    batch_size: int,
    workers: int,
    keep: bool = False,
) -> InputBatches:
    """This process's share of an evaluation, as the model's input; with `keep`, decoded the first time alone.

    Bytes travel; they are normalised where the model is.
    """
    return InputBatches(
        EvalSamples(records, transform.levels),
        ShardSampler(len(records), rank=process.rank, world=process.world),
        EvalInput(transform.preprocessing, process.device, normalise=transform.normalise),
        batch_size=batch_size,
        workers=workers,
        device=process.device,
        size=transform.preprocessing.crop,
        keep=keep,
    )


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One entry an image that could be read; all (N,).

    Attributes:
        index: its number in the set.
        label: its class.
        predicted: the likeliest class.
        probability: how likely.
        in_top5: whether the label is among the five likeliest.
        losses: cross-entropy.
    """

    index: Tensor
    label: Tensor
    predicted: Tensor
    probability: Tensor
    in_top5: Tensor
    losses: Tensor

    @classmethod
    def join(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """Those of several batches, one or more, in the order of the images."""
        columns = {item.name: torch.cat([getattr(part, item.name) for part in parts]) for item in fields(cls)}
        order = columns["index"].argsort()
        return cls(**{name: column[order] for name, column in columns.items()})

    @property
    def images(self) -> int:
        return len(self.index)

    @property
    def top1(self) -> float:
        """Percent of the images whose likeliest class is the label."""
        return self._percent(self.predicted == self.label)

    @property
    def top5(self) -> float:
        return self._percent(self.in_top5)

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.losses.double().mean()) if self.images else 0.0

    def by_class(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """For each class how many images there were, and how many of them were recognised."""
        return (
            torch.bincount(self.label, minlength=num_classes),
            torch.bincount(self.label[self.predicted == self.label], minlength=num_classes),
        )

    def worst(self, count: int) -> list[int]:
        """Positions of the mistakes with the highest loss, the highest first."""
        wrong = (self.predicted != self.label).nonzero().flatten()
        order = self.losses[wrong].argsort(descending=True, stable=True)
        return wrong[order][:count].tolist()

    def _percent(self, right: Tensor) -> float:
        return 100 * float(right.double().mean()) if self.images else 0.0


def mean_logits(heads: Sequence[Tensor]) -> Tensor:
    """What a model with these heads answers in eval mode."""
    return torch.stack(list(heads)).mean(dim=0)


def outcomes_of(logits: Tensor, labels: Tensor, index: Tensor) -> Outcomes:
    """Judge a batch: (B, K) logits, (B,) labels of which those below 0 are left out, (B,) numbers of the images."""
    fine = labels >= 0
    logits, labels, index = logits.float()[fine], labels[fine], index.to(labels.device)[fine]
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    losses = F.cross_entropy(logits, labels, reduction="none")
    columns = (index, labels, predicted, probability, ranked.any(dim=1), losses)
    return Outcomes(*(column.cpu() for column in columns))


@torch.inference_mode()
def collect_outcomes(
    model: ImageClassifier,
    records: ImageRecords,
    process: Process,
    *,
    precision: Precision,
    workers: int,
    batch_size: int,
    corrupt_limit: float,
) -> Outcomes:
    """What a model says of every image; each process brings its share, and all get the whole.

    Raises: DataError: too many images cannot be read.
    """
    model.to(process.device).eval()
    transform = EvalTransform(preprocessing_of(model))
    batches = eval_batches(records, transform, process, batch_size=batch_size, workers=workers)
    share = iter(ShardSampler(len(records), rank=process.rank, world=process.world))
    damage, parts = DamageCount(records, corrupt_limit), []
    with explained_worker_failure(workers):
        for images, labels, failures in batches:
            damage.add(failures)
            index = torch.tensor([next(share) for _ in range(len(labels))])
            with autocast(process.device, precision):
                heads: Iterable[Tensor | None] = model.forward_heads(images)
            logits = mean_logits([head.float() for head in heads if head is not None])
            parts.append(outcomes_of(logits, labels.to(process.device), index))
    damage.meet(process)
    return Outcomes.join([part for share_of in process.gather(parts) for part in share_of])
