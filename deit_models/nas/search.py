"""A whole search: from a space and labelled images to a folder with the super-network, the scores and the winner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Origin, Preprocessing
from ..data.datasets import open_images
from ..data.loading import Watch, default_workers, plain_watch
from ..data.memory import Cache
from ..data.records import ImageRecords
from ..data.split import keep_split, labels_of, parts, stratified_split
from ..distributed import join_processes
from ..errors import ConfigError, TrainingError
from ..files import atomic_write, toml_lines
from ..formats.architecture import Architecture
from ..hub.load import from_pretrained
from ..models.vit_resnas import ViTResNAS
from ..registry import default_preprocessing
from ..training.recipe import Precision, Recipe
from ..training.run import Computing, TrainResult, run_training
from ..training.state import digest_of_numbers, export_model
from .costs import CostKind, make_cost
from .evolution import Scored, evolve
from .report import SETTINGS_NAME, write_report
from .scoring import HeldOut, Scorer
from .space import Evolution, Sampling, SearchSpace
from .supernet import SuperNetwork, extract

SUPERNET_FOLDER, WINNER_FOLDER = "supernet", "winner"
SPACE_NAME, WINNER_NAME = "space.toml", "winner.toml"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """How a search ended.

    Attributes:
        out: the folder; `winner.toml` is the best network's architecture, `winner/` the same with inherited weights.
        scored: every candidate that was scored, the best first.
    """

    out: Path
    scored: list[Scored]


def split_images(
    data: Any, out: str | PathLike[str], *, fraction: float, seed: int
) -> tuple[ImageRecords, ImageRecords]:
    """The images the super-network learns from, and those that candidates are scored on; noted in `out/split.json`.

    Both come from the training set: the test set must have no part in a search. Source: the paper's sub-train and
    sub-val.

    Raises: DataError: see `open_dataset`. TrainingError: `out` holds another split.
    """
    records = open_images(data, "train")
    split = stratified_split(labels_of(records), fraction=fraction, seed=seed)
    keep_split(Path(out), records, split)
    return parts(records, split)


def train_supernet(
    space: SearchSpace,
    *,
    recipe: Recipe,
    images: ImageRecords,
    val: ImageRecords | None = None,
    out: str | PathLike[str],
    sampling: Sampling | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    cache: Cache = "auto",
    watch: Watch = plain_watch,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train the super-network of a space; a second call with the same `out` goes on after the last finished epoch.

    Args:
        space: what may be chosen.
        recipe: without a moving average, which sorting the channels would spoil.
        images: to learn from, see `split_images`.
        val: to evaluate the largest network on after each epoch.
        out: the folder, see `training.run.train`; `model/` is the largest network, which contains all others.
        sampling: how candidates are drawn; default: the paper's numbers.
        device: where to compute; default: the GPU if there is one.
        workers: loading processes.
        cache: whether to keep the images decoded in memory, see `training.run.train`.
        watch: wraps each epoch's batches, for a progress bar.
        on_epoch: called with each finished epoch's row of the log.

    Raises: ConfigError: a recipe with `ema_decay`. TrainingError: `out` holds another search. And what `train` raises.
    """
    if recipe.ema_decay:
        raise ConfigError(f"ema_decay={recipe.ema_decay}: channels are sorted while training; a super-network needs 0")
    sampling = sampling or Sampling()
    _keep(Path(out) / SPACE_NAME, space.to_toml())
    _keep(Path(out) / "sampling.toml", toml_lines(asdict(sampling)))
    torch.manual_seed(recipe.seed)
    network = ViTResNAS(space.config_of(space.largest(), num_classes=len(images.classes)))
    network.origin = Origin(name="supernet", preprocessing=_preprocessing(space))
    whole = SuperNetwork(network, space, sampling)
    return run_training(
        whole,
        recipe=recipe,
        train=images,
        val=val,
        out=Path(out),
        computing=Computing(device=device, workers=workers, cache=cache, watch=watch, on_epoch=on_epoch),
        before_epoch=whole.begin_epoch,
    )


def search(
    space: SearchSpace,
    *,
    supernet: str | PathLike[str],
    images: ImageRecords,
    limit: float,
    out: str | PathLike[str],
    cost: CostKind = "macs",
    evolution: Evolution | None = None,
    batch_size: int = 250,
    precision: Precision = "bf16",
    device: str | torch.device | None = None,
    workers: int | None = None,
    watch: Watch = plain_watch,
    on_generation: Callable[[list[Scored]], None] | None = None,
) -> SearchResult:
    """Find the best network of a space within a limit; a second call with the same `out` goes on where it stopped.

    Under torchrun the candidates of a generation are shared by the processes.

    Args:
        space: what may be chosen.
        supernet: the trained super-network, as `from_pretrained` takes it.
        images: held out from its training, see `split_images`.
        limit: the most a network may cost, in multiply-accumulates or in milliseconds a batch.
        out: folder for the scores, the report and the winner.
        cost: "macs", or "latency", measured on `device`.
        evolution: how to search; default: the paper's numbers.
        batch_size: images at once; also the batch whose latency is measured.
        precision: of the forward pass.
        device: where to compute; default: the GPU if there is one.
        workers: loading processes.
        watch: wraps the batches of images while they are decoded, for a progress bar.
        on_generation: called with all candidates so far after each generation.

    Raises: ConfigError: no network is within the limit, or the super-network is not this space's. DataError: too many
        images cannot be read. TrainingError: `out` holds a search with other settings.
    """
    evolution, folder = evolution or Evolution(), Path(out)
    largest = from_pretrained(supernet)
    if not isinstance(largest, ViTResNAS) or largest.config.stages != space.config_of(space.largest()).stages:
        raise ConfigError(f"{supernet} is not the super-network of this space")
    with join_processes(device) as process:
        _keep(
            folder / SETTINGS_NAME,
            toml_lines({"limit": limit, "cost": cost, **asdict(evolution), "precision": precision})
            + toml_lines({"supernet": digest_of_numbers(largest), "images": f"{len(images)} of {images.name}"}),
        )
        _keep(folder / SPACE_NAME, space.to_toml())
        price = make_cost(cost, space, largest.num_classes, folder, process=process, batch=batch_size)
        workers = default_workers(process.device) if workers is None else workers
        held_out = HeldOut(images, _preprocessing(space), process, workers=workers, watch=watch)
        scorer = Scorer(largest, space, held_out, folder, precision=precision, batch_size=batch_size)
        found = evolve(space, evolution, cost=price, limit=limit, score=scorer, on_generation=on_generation)
        winner = extract(largest, space, found[0].candidate)
        winner.origin = Origin(name=WINNER_FOLDER, preprocessing=_preprocessing(space))
        if process.is_main:
            write_report(folder, found, unit=price.unit, limit=limit)
            _write_architecture(folder / WINNER_NAME, winner)
        export_model(
            winner,
            folder / WINNER_FOLDER,
            process,
            divided=False,
            records=images,
            accuracy={"top1": found[0].top1},
        )
    return SearchResult(folder, found)


def _write_architecture(path: Path, network: ViTResNAS) -> None:
    settings = {name: getattr(network.config, name) for name in network.config.__slots__ if "drop" not in name}
    origin = network.origin
    record = Architecture(
        name=path.stem,
        family=network.family,
        settings=settings,
        preprocessing=None if origin is None else origin.preprocessing,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(record.to_toml(), encoding="utf-8")


def _preprocessing(space: SearchSpace) -> Preprocessing:
    return space.preprocessing or default_preprocessing("", space.config_of(space.largest()).image_hw)


def _keep(path: Path, text: str) -> None:
    """Write a file of settings; one that is there already must be the same. Raises: TrainingError: it is not."""
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if before != text:
            changed = [line for line in before.splitlines() if line not in text.splitlines()]
            raise TrainingError(
                f"{path} says {'; '.join(changed[:3]) or 'otherwise'}; use those settings, or a new folder"
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
