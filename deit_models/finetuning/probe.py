"""Heads on a frozen backbone: features of each image, kept in shards on disk, and logistic regression on them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..batches.inputs import eval_batches
from ..batches.loading import DamageCount, explained_worker_failure, target_of, workers_beside
from ..data.records import ImageRecords, Label, SubsetRecords
from ..data.split import labels_of
from ..distributed import Process
from ..errors import ConfigError, DataError, TrainingError
from ..files import digest_of_numbers, write_tensors, write_text
from ..images.transforms import EvalTransform, preprocessing_of
from ..models.layers import ImageClassifier
from ..recipes.recipe import Precision
from ..scoring.evaluation import autocast
from ..scoring.metrics import choosing_figure
from ..scoring.outcomes import Outcomes, Tally
from ..training.losses import several_labels
from ..training.run import Computing

logger = logging.getLogger(__name__)

_BATCH = 64
_SHARD = 16 * _BATCH
_IDENTITY_NAME = "features.json"
_NO_HEAD_MODE = "is not one linear layer on one vector an image; use mode='last-0' or 'full'"


@dataclass(frozen=True, slots=True)
class Features:
    """Inputs of each head for the images of a set.

    Attributes:
        inputs: by the head's name in the model, (N, D) float32.
        labels: (N,) int64, or (N, K) of 0 and 1 for several an image; -1 for images that could not be read, whose
            features are meaningless.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def of(self, indices: Sequence[int]) -> Features:
        """Features of some images."""
        chosen = torch.tensor(indices, dtype=torch.long)
        return Features({name: rows[chosen] for name, rows in self.inputs.items()}, self.labels[chosen])

    def readable(self) -> Features:
        """Features of the images that could be read."""
        found = (self.labels if self.labels.ndim == 1 else self.labels[:, 0]) >= 0
        return self if found.all() else self.of(found.nonzero().flatten().tolist())

    def plain_labels(self) -> list[Label]:
        """The labels as a set gives them; -1 where the image could not be read."""
        if self.labels.ndim == 1:
            return self.labels.tolist()
        return [-1 if row.min() < 0 else tuple(row.nonzero().flatten().tolist()) for row in self.labels]


@torch.no_grad()
def extract_features(
    model: ImageClassifier,
    records: ImageRecords,
    folder: Path,
    *,
    process: Process,
    precision: Precision,
    computing: Computing,
) -> Features:
    """Send each image through the backbone once, in eval mode, without augmentation.

    The features go to `folder`, in shards of 1024 images; images whose shard is there already are not read.

    Raises: ConfigError: several processes, or a head that is not one linear layer. TrainingError: `folder` holds the
        features of other images, or of another model. DataError: too many images cannot be read. SaveError: no space
        or no permission.
    """
    if process.world > 1:
        raise ConfigError("mode='head' takes one process, which is done in seconds once the features are there")
    heads = linear_heads(model)
    _claim(folder, model, records, precision)
    files = {start: folder / f"{start:09}.safetensors" for start in range(0, len(records), _SHARD)}
    shards = {start: shard for start, file in files.items() if (shard := _read(file)) is not None}
    sizes = {start: min(_SHARD, len(records) - start) for start in files if start not in shards}
    damage = DamageCount(records, computing.corrupt_limit)
    for shard in shards.values():
        damage.add(shard["failures"])
    # all shards but the last hold whole batches, so no batch belongs to two shards
    order = [index for start, size in sizes.items() for index in range(start, start + size)]
    missing, transform = SubsetRecords(records, order), EvalTransform(preprocessing_of(model))
    workers = workers_beside(process.device, computing.workers, images=len(order))
    loader = eval_batches(missing, transform, process, batch_size=_BATCH, workers=workers)
    batches = iter(computing.watch(loader, len(loader)))
    with _inputs_of(heads, model.to(process.device)) as inputs, explained_worker_failure(workers):

        def features_of(images: Tensor, labels: Tensor, failures: Tensor) -> dict[str, Tensor]:
            failures = torch.tensor([number if number < 0 else order[number] for number in failures.tolist()])
            damage.add(failures)
            with autocast(process.device, precision):
                model.forward_heads(images)
            # copies, because a view would keep the tokens of all patches
            rows = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in inputs.items()}
            return {**rows, "labels": labels, "failures": failures}

        for start, size in sizes.items():
            parts = [features_of(*batch) for batch in islice(batches, -(-size // _BATCH))]
            shards[start] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            write_tensors(files[start], shards[start])
    columns = {name: torch.cat([shards[start][name] for start in files]) for name in shards[0]}
    labels = columns["labels"]
    if records.knows_labels:  # someone may have corrected labels since
        labels = torch.stack([torch.as_tensor(target_of(label, records)) for label in labels_of(records)])
        labels[columns["failures"] >= 0] = -1
    # a head that works in training only got no input
    return Features({name: columns[name] for name in heads if name in columns}, labels)


@contextmanager
def _inputs_of(heads: Mapping[str, nn.Linear], model: ImageClassifier) -> Iterator[dict[str, Tensor]]:
    """A table that holds the input of each head after each forward pass; the model is in eval mode meanwhile."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].ndim != 2:  # T2T-ViT's second head reads every patch
            raise ConfigError(f"{name} of {type(model).__name__} {_NO_HEAD_MODE}")
        inputs[name] = arguments[0]

    handles = [head.register_forward_pre_hook(partial(keep, name)) for name, head in heads.items()]
    was_training = model.training
    model.eval()
    try:
        yield inputs
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def linear_heads(model: ImageClassifier) -> dict[str, nn.Linear]:
    """The linear layer of each head, by the head's name.

    The heads of a LeViT begin with a BatchNorm, which stays as it is; the layer after it learns.

    Raises: ConfigError: a head has no linear layer, or several.
    """
    found = {}
    for name in model.head_names:
        if (head := getattr(model, name)) is not None:
            layers = [part for part in head.modules() if isinstance(part, nn.Linear)]
            if len(layers) != 1:
                raise ConfigError(f"{name} of {type(model).__name__} {_NO_HEAD_MODE}")
            found[name] = layers[0]
    return found


def _read(path: Path) -> dict[str, Tensor] | None:
    """A shard; None if it is missing or damaged, so that it is made again."""
    try:
        return load_file(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s); its images are read again", path, error)
        return None


def _claim(folder: Path, model: ImageClassifier, records: ImageRecords, precision: Precision) -> None:
    """Write a description of the images and the model into the folder, or compare it with the one that is there."""
    identity = {
        "images": len(records),
        "data": _digest_of_data(records),
        "backbone": digest_of_numbers(model, without=model.head_names),
        "transform": str(preprocessing_of(model)),
        "precision": precision,
        "shard": _SHARD,
        **({"labels": "several"} if records.multi_label else {}),
    }
    path = folder / _IDENTITY_NAME
    if path.exists():
        with suppress(ValueError, AttributeError):
            before = json.loads(path.read_bytes())
            if before | {"precision": precision} == identity:
                if (old := before["precision"]) != precision:
                    logger.warning("%s goes on in %s; the features in it are in %s", folder, precision, old)
                return
        raise TrainingError(f"{folder} holds the features of other images, or of another model; use a new folder")
    write_text(path, json.dumps(identity, indent=1) + "\n")


def _digest_of_data(records: ImageRecords) -> str:
    """Digest of the name of each image and, if it is a file, of its size."""
    digest = hashlib.sha256()
    for index in range(len(records)):
        size = -1
        with suppress(OSError, ValueError):
            size = os.stat(records.describe(index)).st_size
        digest.update(f"{records.key(index)}\0{size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


STRENGTHS = tuple(10.0**-power for power in range(0, 8))
"""L2 penalties to choose from, strongest first: on the weights for features of mean 0 and variance 1."""
_CELLS = 1 << 21
"""Logits at once: 8 MB, which a processor's cache holds."""
_MOST_ITERATIONS, _FEWEST_ITERATIONS, _LOGITS = 200, 30, 10**10
"""Each solution may take so many logits in all. Beyond some 10^8 at once, as with a thousand classes and a million
images, it ends early, and the next penalty goes on from there."""
_SMALL = 1 << 24
"""Multiplications for the logits of all images; one core does so many in about a millisecond."""


@dataclass(frozen=True, slots=True)
class LinearFit:
    """Heads with the best result on the validation images.

    Attributes:
        weights: (K, D) and (K,) by the head's name, for features that are not standardised.
        penalty: the L2 penalty they were fitted with.
        tried: the choosing figure on the validation images in percent, and their loss, of each penalty tried.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    penalty: float
    tried: list[dict[str, float]]


def fit_heads(
    train: Features,
    val: Features,
    *,
    num_classes: int,
    device: torch.device,
    weights: Tensor | None = None,
    cells: int = _CELLS,
) -> LinearFit:
    """Fit each head by itself to the labels, with the penalty that gives their mean the best validation accuracy.

    Of several labels an image, each is fitted by itself. `weights` are those of `ClassCounts.weights`. Where there are
    either, another accuracy decides, see `choosing_figure`.

    Penalties go from strong to weak, each beginning where the one before ended, and stop after two that improve
    neither accuracy nor loss. Of equal accuracies, the lower loss wins. Unreadable images are left out.

    The objective is mean cross-entropy (several labels: the sum of the binary ones over the labels) + penalty / 2 * sum
    of squared weights, biases free; it is convex, so the minimum depends neither on a seed nor on the order of the
    images. At most `cells` logits exist at once.

    Raises: DataError: no image to fit to, or to choose by. TrainingError: the features are not finite.
    """
    train, val = train.readable(), val.readable()
    if not len(train.labels) or not len(val.labels):
        raise DataError(f"{len(train.labels)} readable images for training, {len(val.labels)} for validation")
    if not all(torch.isfinite(rows).all() for rows in (*train.inputs.values(), *val.inputs.values())):
        raise TrainingError("no head can be fitted: the backbone gives features that are no numbers")
    problem = _Regression(train, device, cells, weights)
    chooser = choosing_figure(several=val.labels.ndim == 2, balanced=weights is not None)
    tried: list[dict[str, float]] = []
    best, best_key, lowest_loss, idle = LinearFit({}, 0.0, tried), (-1.0, 0.0), float("inf"), 0
    start = {
        name: (torch.zeros(num_classes, rows.shape[1], device=device), torch.zeros(num_classes, device=device))
        for name, rows in train.inputs.items()
    }
    for penalty in STRENGTHS:
        start = problem.solve(start, penalty)
        fit = LinearFit(start, penalty, tried)
        outcome = judge(fit, val, device=device, cells=cells).evaluation()
        score = getattr(outcome, chooser)
        tried.append({"penalty": penalty, chooser: round(score, 4), "loss": round(outcome.loss, 6)})
        key = (score, -outcome.loss)
        idle = 0 if key > best_key or outcome.loss < lowest_loss else idle + 1
        lowest_loss = min(lowest_loss, outcome.loss)
        if key > best_key:
            best, best_key = fit, key
        if idle == 2:
            break
    return best


def refit_heads(
    fit: LinearFit, features: Features, *, device: torch.device, weights: Tensor | None = None, cells: int = _CELLS
) -> LinearFit:
    """Fit the heads again, with the penalty of `fit`, to other images: those for training and for validation together.

    Validation images have chosen the penalty by then; unreadable images are left out.
    """
    problem = _Regression(features.readable(), device, cells, weights)
    return replace(fit, weights=problem.solve(fit.weights, fit.penalty))


class _Regression:
    """Logistic regression of the labels on each head's inputs, which are standardised for it."""

    def __init__(self, features: Features, device: torch.device, cells: int, weights: Tensor | None) -> None:
        self.labels, self.cells = features.labels.to(device), cells
        self.weights = None if weights is None else weights.to(device)
        self.rows: dict[str, Tensor] = {}
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}
        for name, given in features.inputs.items():
            rows = given.to(device)
            mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp(min=1e-6)
            self.rows[name], self.scales[name] = (rows - mean) / std, (mean, std)

    def solve(self, start: Mapping[str, tuple[Tensor, Tensor]], penalty: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Weights and biases of the minimum, from a starting point; both for features that are not standardised."""
        found = {}
        for name, (weight, bias) in start.items():
            mean, std = self.scales[name]
            scaled, offset = self._minimum(self.rows[name], (weight * std, bias + weight @ mean), penalty)
            plain = scaled / std
            found[name] = (plain, offset - plain @ mean)
        return found

    def _minimum(self, rows: Tensor, start: tuple[Tensor, Tensor], penalty: float) -> tuple[Tensor, Tensor]:
        """Weight and bias of the minimum for standardised features, by L-BFGS."""
        weight, bias = (tensor.clone().requires_grad_() for tensor in start)
        step = max(self.cells // len(bias), 1)
        logits = len(rows) * len(bias)
        iterations = min(max(_LOGITS // logits, _FEWEST_ITERATIONS), _MOST_ITERATIONS)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=iterations,
            tolerance_grad=1e-5,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )
        pieces = list(zip(torch.split(rows, step), torch.split(self.labels, step), strict=True))

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = penalty / 2 * weight.square().sum()
            total.backward()  # type: ignore[no-untyped-call]
            value = total.detach()
            for chunk, wanted in pieces:
                loss = self._loss(F.linear(chunk, weight, bias), wanted) / len(rows)
                loss.backward()  # type: ignore[no-untyped-call]
                value = value + loss.detach()
            return value

        with _one_thread(logits * rows.shape[1] < _SMALL):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        return weight.detach(), bias.detach()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of all images together."""
        if labels.ndim == 1:
            return F.cross_entropy(logits, labels, weight=self.weights, reduction="sum")
        return several_labels(logits, labels, self.weights) * logits.numel()


@contextmanager
def _one_thread(small: bool) -> Iterator[None]:
    """One thread for small products, for which several wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    try:
        if small:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def judge(fit: LinearFit, features: Features, *, device: torch.device, cells: int = _CELLS) -> Outcomes:
    """Score the mean of the heads on images; unreadable ones are skipped."""
    tally, step = Tally(), max(cells // len(next(iter(fit.weights.values()))[1]), 1)
    for start in range(0, len(features.labels), step):
        logits = [
            F.linear(rows[start : start + step].to(device), *fit.weights[name])
            for name, rows in features.inputs.items()
        ]
        tally.add(logits, features.labels[start : start + step])
    return tally.outcomes()


@torch.no_grad()
def put_heads(model: ImageClassifier, fit: LinearFit) -> None:
    """Copy the weights into a model's heads, in place."""
    heads = linear_heads(model)
    for name, values in fit.weights.items():
        for parameter, value in zip((heads[name].weight, heads[name].bias), values, strict=True):
            parameter.copy_(value)
