"""A linear head on fixed features: multinomial logistic regression."""
# MERGED """What a frozen backbone makes of each image: computed once, in shards on disk, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.inputs import EvalSamples
from ..data.levels import EvalInput
from ..data.loading import DamageCount, Watch, explained_worker_failure, make_loader
from ..data.records import ImageRecords
from ..data.transforms import EvalTransform, preprocessing_of
from ..distributed import Process
from ..errors import ConfigError, DataError, TrainingError
from ..evaluation import Outcomes, Tally, autocast
from ..files import atomic_write
from ..models.layers import ImageClassifier
from ..training.recipe import Precision
from ..training.state import digest_of_numbers

logger = logging.getLogger(__name__)

_BATCH = 64
_SHARD = 16 * _BATCH
_IDENTITY_NAME = "features.json"
_NO_HEAD_MODE = "is not one linear layer on one vector an image; use mode='last-0' or 'full'"


@dataclass(frozen=True, slots=True)
class Features:
    """The input of each head for each image of a set.

    Attributes:
        inputs: by the head's name in the model, (N, D) float32.
        labels: (N,) int64; -1 where the image could not be read, its features then mean nothing.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def of(self, indices: Sequence[int]) -> Features:
        """Those of some images."""
        chosen = torch.tensor(indices, dtype=torch.long)
        return Features({name: rows[chosen] for name, rows in self.inputs.items()}, self.labels[chosen])

    def readable(self) -> Features:
        """Those of the images that could be read."""
        return self.of((self.labels >= 0).nonzero().flatten().tolist())


@torch.inference_mode()
def extract_features(
    model: ImageClassifier,
    records: ImageRecords,
    folder: Path,
    process: Process,
    *,
    precision: Precision,
    workers: int,
    corrupt_limit: float,
    watch: Watch,
) -> Features:
    """Send each image through the backbone once, unless its features are in `folder` already.

    The evaluation transform is applied, no augmentation: that is what makes once enough.

    Args:
        model: in whatever mode; used in eval mode, on the process's device.
        records: the images.
        folder: for the shards of features, of 1024 images each.
        process: this one, which must be alone.
        precision: of the forward pass.
        workers: loading processes.
        corrupt_limit: fraction of the images that may be unreadable.
        watch: wraps the batches, for a progress bar.

    Raises: TrainingError: `folder` holds the features of other images, or of another model. ConfigError: a head that is
        not one linear layer. DataError: too many images cannot be read. FetchError: no space or no permission.
    """
    _claim(folder, model, records, precision)
    shards = {start: _read(_file(folder, start)) for start in range(0, len(records), _SHARD)}
    missing = [start for start, shard in shards.items() if shard is None]
    order = [index for start in missing for index in range(start, min(start + _SHARD, len(records)))]
    damage = DamageCount(records, corrupt_limit)
    for shard in shards.values():
        if shard is not None:
            damage.add(shard["failures"])
    preprocessing = preprocessing_of(model)
    samples, to_input = (
        EvalSamples(records, EvalTransform(preprocessing).levels),
        EvalInput(preprocessing, process.device),
    )
    # all shards but the last hold whole batches, so none of the batches belongs to two
    loader = make_loader(samples, order, batch_size=_BATCH, workers=workers, device=process.device)
    batches = iter(watch(loader, len(loader)))
    with _head_inputs(model.to(process.device)) as taken, explained_worker_failure(workers):
        for start in missing:
            size = min(_SHARD, len(records) - start)
            shards[start] = shard = _next_shard(model, batches, to_input, taken, size, precision, damage)
            with atomic_write(_file(folder, start)) as temporary:
                save_file(shard, temporary)
    found = [shard for shard in shards.values() if shard is not None]
    inputs = {name: torch.cat([shard[name] for shard in found]) for name in linear_heads(model)}
    return Features(inputs, torch.cat([shard["labels"] for shard in found]))


def _next_shard(
    model: ImageClassifier,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    to_input: EvalInput,
    taken: dict[str, Tensor],
    size: int,
    precision: Precision,
    damage: DamageCount,
) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {"labels": [], "failures": []}
    for _ in range(-(-size // _BATCH)):
        images, labels, failures = next(batches)
        damage.add(failures)
        with autocast(to_input.device, precision):
            model.forward_heads(to_input(images))
        for name, rows in {**taken, "labels": labels, "failures": failures}.items():
            columns.setdefault(name, []).append(rows.float().cpu() if name in taken else rows)
    return {name: torch.cat(rows).contiguous() for name, rows in columns.items()}


@contextmanager
def _head_inputs(model: ImageClassifier) -> Iterator[dict[str, Tensor]]:
    """Eval mode, and a table that after each forward pass holds what went into each head."""
    taken: dict[str, Tensor] = {}
    handles = []
    for name, head in linear_heads(model).items():

        def take(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            if inputs[0].ndim != 2:  # T2T-ViT's second head reads every patch
                raise ConfigError(f"{name} of {type(model).__name__} {_NO_HEAD_MODE}")
            taken[name] = inputs[0]

        handles.append(head.register_forward_pre_hook(take))
    was_training = model.training
    model.eval()
    try:
        yield taken
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def linear_heads(model: ImageClassifier) -> dict[str, nn.Linear]:
    """The linear layer of each head, by the head's name.

    A LeViT's heads begin with a BatchNorm, which stays as it is: what is learned is the layer after it. Heads that
    answer in training alone are left out.

    Raises: ConfigError: a head has none, or several.
    """
    names = [name for name in model.head_names if name not in getattr(model, "extra_head_names", ())]
    heads = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    layers = {name: [part for part in head.modules() if isinstance(part, nn.Linear)] for name, head in heads.items()}
    for name, found in layers.items():
        if len(found) != 1:
            raise ConfigError(f"{name} of {type(model).__name__} {_NO_HEAD_MODE}")
    return {name: found[0] for name, found in layers.items()}


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:09}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """A shard, or None if it is not there or damaged, and so to be made again."""
    try:
        return load_file(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s); its images are read again", path, error)
        return None


def _claim(folder: Path, model: ImageClassifier, records: ImageRecords, precision: Precision) -> None:
    """Note whose features these are, or check it."""
    identity = {
        "images": len(records),
        "data": _digest_of_data(records),
        "backbone": digest_of_numbers(model, without=model.head_names),
        "transform": str(preprocessing_of(model)),
        "precision": precision,
        "shard": _SHARD,
    }
    path = folder / _IDENTITY_NAME
    if path.exists():
        with suppress(ValueError):
            if json.loads(path.read_text(encoding="utf-8")) == identity:
                return
        raise TrainingError(f"{folder} holds the features of other images, or of another model; use a new folder")
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def _digest_of_data(records: ImageRecords) -> str:
    """Of every image's name and, where it is a file, of its size."""
    digest = hashlib.sha256()
    for index in range(len(records)):
        size = -1
        with suppress(OSError, ValueError):
            size = os.stat(records.describe(index)).st_size
        digest.update(f"{records.key(index)}\0{size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


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
        outcome = judge(fit, val, device=device).evaluation()
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
    """Score the mean of the heads on images; unreadable ones are skipped."""
    tally, step = Tally(), _rows_at_once(next(iter(fit.weights.values()))[0].shape[0])
    for start in range(0, len(features.labels), step):
        logits = [
            F.linear(rows[start : start + step].to(device), *fit.weights[name])
            for name, rows in features.inputs.items()
        ]
        tally.add(logits, features.labels[start : start + step])
    return tally.outcomes()


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
