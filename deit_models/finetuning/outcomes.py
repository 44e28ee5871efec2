"""What a model said of each image: the basis of accuracies by class, of the confusion matrix, of the worst mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.layers import ImageClassifier
from ..training.distributed import Process
from ..training.evaluation import eval_batches, preprocessing_of
from ..training.learner import autocast
from ..training.loading import DamageCount, explained_worker_failure
from ..training.recipe import Precision
from ..training.records import ImageRecords
from ..training.samplers import ShardSampler
from ..transforms import EvalTransform


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
