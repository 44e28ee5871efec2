"""How well a model does on labelled images, each counted exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..errors import ConfigError, DataError
from ..hub.manifest import Preprocessing
from ..models.layers import ImageClassifier, TrainingLogits
from ..transforms import EvalTransform
from .datasets import EvalSamples
from .distributed import Process, join_processes
from .learner import Heads, autocast
from .loading import (
    FINE,
    PADDING,
    Batch,
    DamageCount,
    Watch,
    default_workers,
    explained_worker_failure,
    make_loader,
    open_images,
    plain_watch,
)
from .recipe import Precision
from .records import ImageRecords
from .samplers import ShardSampler


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


@torch.inference_mode()
def score(
    heads: nn.Module,
    batches: Iterable[Batch],
    process: Process,
    *,
    precision: Precision,
    damage: DamageCount,
    rounds: int | None = None,
) -> Evaluation:
    """Score a model on batches; every process brings its share, and all get the same result.

    Args:
        heads: gives `TrainingLogits`; the mode of each of its modules is left as found.
        batches: this process's share of the images.
        process: this one.
        precision: of the forward pass.
        damage: counts images that could not be read.
        rounds: batches that each process must run, for models whose parameters are divided between processes.

    Raises: DataError: more classes than logits, or too many images that cannot be read.
    """
    classes = len(damage.records.classes)
    sums, has_dist = torch.zeros(_SUMS, dtype=torch.float64, device=process.device), False
    with _evaluating(heads):
        for images, labels, failures in batches if rounds is None else _padded(batches, rounds):
            damage.add(failures)
            with autocast(process.device, precision):
                logits = heads(images.to(process.device, non_blocking=True))
            if logits.cls.shape[1] < classes:
                raise DataError(f"{damage.records.name} has {classes} classes, the model {logits.cls.shape[1]}")
            has_dist |= logits.dist is not None
            sums += _score_batch(logits, labels.to(process.device), failures.to(process.device))
    damage.meet(process)
    count, skipped, right, right5, loss, right_cls, right_dist = process.total(sums).tolist()
    of = 100 / max(count, 1)
    each = {"class": right_cls * of, "distillation": right_dist * of} if has_dist else {}
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
    cls, labels = logits.cls.float()[fine], labels[fine]
    dist = cls if logits.dist is None else logits.dist.float()[fine]
    mean = (cls + dist) / 2  # what an evaluated model returns
    ranked = mean.topk(min(5, mean.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack(
        [
            fine.sum(),
            skipped.sum(),
            ranked[:, 0].sum(),
            ranked.sum(),
            F.cross_entropy(mean, labels, reduction="sum"),
            (cls.argmax(1) == labels).sum(),
            (dist.argmax(1) == labels).sum(),
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
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
) -> Evaluation:
    """Score a model on labelled images, each exactly once, also under torchrun.

    Args:
        model: gives (B, K) logits; moved to the device, the mode of each of its modules is left as found.
        data: a folder or the name of a data set, or a Dataset; the labels must count the model's classes.
        batch_size: images at once, in each process.
        workers: loading processes.
        device: where to compute; default: the GPU if there is one.
        precision: of the forward pass.
        transform: default: the one that belongs to the model's weights.
        corrupt_limit: fraction of the images that may be unreadable.
        watch: wraps the batches, for a progress bar.

    Raises: DataError: images missing, more classes than logits, too many damaged. ConfigError: no transform known.
    """
    records = open_images(data, "val")
    if isinstance(model, ImageClassifier) and model.num_classes != len(records.classes):
        raise DataError(f"{records.name} has {len(records.classes)} classes, the model {model.num_classes}")
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
    records: ImageRecords, transform: EvalTransform, process: Process, *, batch_size: int, workers: int
) -> DataLoader[Batch]:
    """This process's share of an evaluation."""
    sampler = ShardSampler(len(records), rank=process.rank, world=process.world)
    samples = EvalSamples(records, transform)
    return make_loader(samples, sampler, batch_size=batch_size, workers=workers, device=process.device)
