"""What a frozen backbone makes of each image: computed once, in shards on disk, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError, TrainingError
from ..hub.fetch import atomic_write
from ..models.layers import ImageClassifier
from ..training.distributed import Process
from ..training.evaluation import preprocessing_of
from ..training.learner import autocast
from ..training.levels import EvalInput
from ..training.loading import DamageCount, Watch, explained_worker_failure, make_loader
from ..training.recipe import Precision
from ..training.records import ImageRecords
from ..training.samplers import EvalSamples
from ..training.state import digest_of_numbers
from ..transforms import EvalTransform

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
    names = [name for name in model.head_names if name not in model.training_head_names]
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
