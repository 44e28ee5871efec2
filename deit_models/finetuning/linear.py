"""A linear head on fixed features: multinomial logistic regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError, TrainingError
from .features import Features
from .outcomes import Outcomes, mean_logits, outcomes_of

STRENGTHS = tuple(10.0**-power for power in range(0, 8))
"""L2 penalties to choose from, strongest first: on the weights for features of mean 0 and variance 1."""
_CELLS = 1 << 24
_MOST_ITERATIONS, _FEWEST_ITERATIONS, _LOGITS = 200, 30, 10**10
"""Each solution may take so many logits in all. Beyond some 10^8 at once, as with a thousand classes and a million
images, it ends early, and the next penalty goes on from there."""


@dataclass(frozen=True, slots=True)
class LinearFit:
    """The heads that did best on the validation images.

    Attributes:
        weights: (K, D) and (K,) by the head's name: for the features as they are.
        penalty: the L2 penalty they were fitted with.
        tried: for each penalty tried its validation accuracy in percent and loss.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    penalty: float
    tried: list[dict[str, float]] = field(default_factory=list)


def fit_heads(train: Features, val: Features, *, num_classes: int, device: torch.device) -> LinearFit:
    """Fit each head by itself to the labels, with the penalty that gives their mean the best validation accuracy.

    Penalties go from strong to weak, each beginning where the one before ended, and stop after two that improve
    neither accuracy nor loss. Ties in accuracy go to the lower loss.

    Args:
        train: features of readable images.
        val: likewise.
        num_classes: K.
        device: where to compute.

    The objective is mean cross-entropy + penalty / 2 * sum of squared weights, biases free; convex, so that its minimum
    depends neither on a seed nor on the order of the images.

    Raises: DataError: no image to fit to, or to choose by. TrainingError: the features are not finite.
    """
    if not len(train.labels) or not len(val.labels):
        raise DataError(f"{len(train.labels)} readable images for training, {len(val.labels)} for validation")
    if not all(torch.isfinite(rows).all() for rows in (*train.inputs.values(), *val.inputs.values())):
        raise TrainingError("no head can be fitted: the backbone gives features that are no numbers")
    columns = {name: _Standard.of(rows.to(device)) for name, rows in train.inputs.items()}
    labels = train.labels.to(device)
    weights = {
        name: (rows.scaled.new_zeros(num_classes, rows.scaled.shape[1]), rows.scaled.new_zeros(num_classes))
        for name, rows in columns.items()
    }
    tried: list[dict[str, float]] = []
    best, best_key, lowest_loss, idle = LinearFit({}, 0.0, tried), (-1.0, 0.0), float("inf"), 0
    for penalty in STRENGTHS:
        for name, rows in columns.items():
            weights[name] = _solve(rows.scaled, labels, weights[name], penalty)
        fit = LinearFit({name: columns[name].undo(*pair) for name, pair in weights.items()}, penalty, tried)
        outcome = judge(fit, val, device=device)
        tried.append({"penalty": penalty, "top1": round(outcome.top1, 4), "loss": round(outcome.loss, 6)})
        key = (outcome.top1, -outcome.loss)
        idle = 0 if key > best_key or outcome.loss < lowest_loss else idle + 1
        lowest_loss = min(lowest_loss, outcome.loss)
        if key > best_key:
            best, best_key = fit, key
        if idle == 2:
            break
    return best


def judge(fit: LinearFit, features: Features, *, device: torch.device) -> Outcomes:
    """How the mean of the heads does on images, each unreadable one skipped."""
    parts, step = [], _rows_at_once(next(iter(fit.weights.values()))[0].shape[0])
    for start in range(0, len(features.labels), step):
        logits = [
            F.linear(rows[start : start + step].to(device), *fit.weights[name])
            for name, rows in features.inputs.items()
        ]
        labels = features.labels[start : start + step].to(device)
        indices = torch.arange(start, start + len(labels))
        parts.append(outcomes_of(mean_logits(logits), labels, indices))
    return Outcomes.join(parts)


def put_heads(heads: Mapping[str, nn.Linear], fit: LinearFit) -> None:
    """Write the weights into a model's heads, in place."""
    with torch.no_grad():
        for name, head in heads.items():
            weight, bias = fit.weights[name]
            head.weight.copy_(weight)
            head.bias.copy_(bias)


@dataclass(frozen=True, slots=True)
class _Standard:
    """Features of mean 0 and variance 1, (N, D), on which one penalty suits all columns."""

    scaled: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Standard:
        mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp(min=1e-6)
        return cls((rows - mean) / std, mean, std)

    def undo(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same function of the features as they were."""
        plain = weight / self.std
        return plain, bias - plain @ self.mean


def _rows_at_once(num_classes: int) -> int:
    return max(_CELLS // num_classes, 1)


def _solve(rows: Tensor, labels: Tensor, start: tuple[Tensor, Tensor], penalty: float) -> tuple[Tensor, Tensor]:
    """L-BFGS from a starting point; logits of at most `_CELLS` numbers exist at a time."""
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    step = _rows_at_once(len(bias))
    iterations = min(max(_LOGITS // (len(labels) * len(bias)), _FEWEST_ITERATIONS), _MOST_ITERATIONS)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = penalty / 2 * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        value = total.detach()
        for chunk, wanted in zip(torch.split(rows, step), torch.split(labels, step), strict=True):
            loss = F.cross_entropy(F.linear(chunk, weight, bias), wanted, reduction="sum") / len(labels)
            loss.backward()  # type: ignore[no-untyped-call]
            value = value + loss.detach()
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
