"""A whole search: from a space and labelled images to a folder with the super-network, the scores and the winner."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, TrainingError
from ..finetuning.split import keep_split, labels_of, parts, stratified_split
from ..hub.fetch import atomic_write
from ..hub.manifest import Preprocessing
from ..models.vit_resnas import ViTResNAS
from ..registry import Origin
from ..training.loading import Watch, open_images, plain_watch
from ..training.recipe import Recipe
from ..training.records import ImageRecords
from ..training.run import TrainResult, train
from .space import SearchSpace
from .supernet import Sampling, SuperNetwork

SPACE_NAME = "space.toml"
SUPERNET_FOLDER = "supernet"


def split_images(data: Any, out: Path, *, val_fraction: float, seed: int) -> tuple[ImageRecords, ImageRecords]:
    """The images the super-network learns from, and those that candidates are scored on; written into `out`.

    Both come from the training set: the test set must have no part in a search. Source: the paper's sub-train and
    sub-val.

    Raises: DataError: see `open_dataset`. TrainingError: `out` holds the split of other images or with another seed.
    """
    records = open_images(data, "train")
    split = stratified_split(labels_of(records), fraction=val_fraction, seed=seed)
    keep_split(out, records, split)
    return parts(records, split)


def train_supernet(
    space: SearchSpace,
    *,
    recipe: Recipe,
    train_images: ImageRecords,
    val_images: ImageRecords | None,
    out: str | PathLike[str],
    preprocessing: Preprocessing,
    sampling: Sampling | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    watch: Watch = plain_watch,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train the super-network of a space; a second call with the same `out` goes on after the last finished epoch.

    What is evaluated after each epoch is the largest network. `out/model` is it, as `from_pretrained` reads it.

    Args:
        space: what may be chosen; its number of classes is the data's.
        recipe: without a moving average, which sorting the channels would spoil.
        train_images: see `split_images`.
        val_images: likewise; None: no evaluation while training.
        out: the folder, see `training.run.train`.
        preprocessing: of the images.
        sampling: how candidates are drawn; default: the paper's numbers.
        device: where to compute; default: the GPU if there is one.
        workers: loading processes.
        watch: wraps each epoch's batches, for a progress bar.
        on_epoch: called with each finished epoch's row of the log.

    Raises: ConfigError: a recipe with `ema_decay`. And what `train` raises.
    """
    if recipe.ema_decay:
        raise ConfigError(f"ema_decay={recipe.ema_decay}: channels are sorted while training; a super-network needs 0")
    sampling = sampling or Sampling()
    _keep(Path(out) / SPACE_NAME, f"{space.to_toml()}\n[sampling]\n{_lines(sampling)}")
    torch.manual_seed(recipe.seed)
    net = ViTResNAS(space.config_of(space.largest(), num_classes=len(train_images.classes)))
    net.origin = Origin(name="supernet", preprocessing=preprocessing)
    return train(
        SuperNetwork(net, space, sampling),
        recipe=recipe,
        train=train_images,
        val=val_images,
        out=out,
        device=device,
        workers=workers,
        watch=watch,
        on_epoch=on_epoch,
    )


def _lines(sampling: Sampling) -> str:
    return f"images = {sampling.images}\nwarmup_epochs = {sampling.warmup_epochs}\n"


def _keep(path: Path, text: str) -> None:
    """Write a file of settings; one that is there already must be the same. Raises: TrainingError: it is not."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise TrainingError(f"{path} holds other settings than this search; use those, or a new folder")
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
