"""A whole search: from a space and labelled images to a folder with the super-network, the scores and the winner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..batches.inputs import eval_batches
from ..batches.loading import DamageCount, explained_worker_failure, workers_beside
from ..checkpoint import Origin, Preprocessing
from ..data.datasets import open_images
from ..data.records import ImageRecords
from ..data.split import keep_split, labels_of, parts, stratified_split
from ..distributed import Process, join_processes
from ..errors import ConfigError, DataError, TrainingError
from ..files import digest_of_numbers, read_text, toml_lines, write_text
from ..formats.architecture import Architecture
from ..hub.load import from_pretrained
from ..images.transforms import EvalTransform
from ..models.vit_resnas import ViTResNAS
from ..recipes.recipe import Precision, Recipe
from ..registry import default_preprocessing
from ..scoring.evaluation import Heads, resolved_precision, score
from ..training.run import Computing, TrainResult, run_training
from ..training.state import export_model
from .costs import CostKind, Ledger, make_cost
from .evolution import ScoredCandidate, evolve
from .settings import Evolution, Sampling
from .space import Candidate, SearchSpace
from .supernet import SuperNetwork, extract
from .tables import SETTINGS_NAME, write_tables

SUPERNET_FOLDER, WINNER_FOLDER = "supernet", "winner"
SPACE_NAME, SCORES_NAME, WINNER_NAME = "space.toml", "scores.jsonl", "winner.toml"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Result of a search.

    Attributes:
        out: the folder; `winner.toml` is the best network's architecture, `winner/` the same with inherited weights.
        scored: every candidate that was scored, the best first.
    """

    out: Path
    scored: list[ScoredCandidate]


def split_images(
    data: Any, out: str | PathLike[str], *, fraction: float, seed: int
) -> tuple[ImageRecords, ImageRecords]:
    """Images for the super-network to learn from, and images to score candidates on; noted in `out/split.json`.

    Both come from the training set: a search must not use the test set. Source: the paper's sub-train and sub-val.

    Raises: DataError: see `open_dataset`. TrainingError: `out` holds another split.
    """
    records = open_images(data, "train")
    if records.multi_label:
        raise DataError(f"images of {records.name} have several labels; a search needs one class for each image")
    split = stratified_split(labels_of(records), fraction=fraction, seed=seed)
    split = keep_split(Path(out), records, split)
    return parts(records, split)


def train_supernet(
    space: SearchSpace,
    *,
    recipe: Recipe,
    images: ImageRecords,
    val: ImageRecords | None = None,
    out: str | PathLike[str],
    sampling: Sampling | None = None,
    computing: Computing | None = None,
) -> TrainResult:
    """Train the super-network of a space; a second call with the same `out` goes on after the last finished epoch.

    Args:
        space: the choices.
        recipe: without a moving average, because channels are sorted during training.
        images: to learn from, see `split_images`.
        val: to evaluate the largest network on after each epoch.
        out: the folder, see `training.run.train`; `model/` is the largest network, which contains all others.
        sampling: how candidates are drawn; default: the paper's numbers.
        computing: device, workers and so on.

    Raises: ConfigError: a recipe with `ema_decay`. TrainingError: `out` holds another search. Those of `train`.
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
        computing=computing or Computing(),
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
    precision: Precision = "auto",
    computing: Computing | None = None,
    on_generation: Callable[[list[ScoredCandidate]], None] | None = None,
) -> SearchResult:
    """Find the best network of a space within a limit; a second call with the same `out` goes on where it stopped.

    Under torchrun the candidates of a generation are shared by the processes.

    Args:
        space: the choices.
        supernet: the trained super-network, as `from_pretrained` takes it.
        images: held out from its training, see `split_images`.
        limit: largest cost of a network, in multiply-accumulates or in milliseconds a batch.
        out: folder for the scores, the tables and the winner.
        cost: "macs", or "latency", measured on the device.
        evolution: numbers of the evolution; default: the paper's.
        batch_size: images at once; also the batch whose latency is measured.
        precision: of the forward pass.
        computing: device, workers, and the progress bar while images are decoded.
        on_generation: called with all candidates so far after each generation.

    Raises: ConfigError: no network is within the limit, or the super-network is not this space's. DataError: too many
        images cannot be read. TrainingError: `out` holds a search with other settings.
    """
    evolution, computing, folder = evolution or Evolution(), computing or Computing(), Path(out)
    largest = from_pretrained(supernet)
    if not isinstance(largest, ViTResNAS) or largest.config.stages != space.config_of(space.largest()).stages:
        raise ConfigError(f"{supernet} is not the super-network of this space")
    with join_processes(computing.device) as process:
        precision = resolved_precision(precision, process)
        _keep(
            folder / SETTINGS_NAME,
            toml_lines({"limit": limit, "cost": cost, **asdict(evolution), "precision": precision})
            + toml_lines({"supernet": digest_of_numbers(largest), "images": f"{len(images)} of {images.name}"}),
        )
        _keep(folder / SPACE_NAME, space.to_toml())
        price = make_cost(cost, space, largest.num_classes, folder, process=process, batch=batch_size)
        scores = CandidateScores(
            largest, space, images, folder, process, computing=computing, precision=precision, batch_size=batch_size
        )
        found = evolve(space, evolution, cost=price, limit=limit, score=scores, on_generation=on_generation)
        winner, preprocessing = extract(largest, space, found[0].candidate), _preprocessing(space)
        winner.origin = Origin(name=WINNER_FOLDER, preprocessing=preprocessing)
        if process.is_main:
            write_tables(folder, found, unit=price.unit, limit=limit)
            config = winner.config
            settings = {name: getattr(config, name) for name in config.__dataclass_fields__ if "drop" not in name}
            architecture = Architecture(
                name=WINNER_FOLDER, family=winner.family, settings=settings, preprocessing=preprocessing
            )
            write_text(folder / WINNER_NAME, architecture.to_toml())
        export_model(
            winner,
            folder / WINNER_FOLDER,
            process,
            divided=False,
            records=images,
            accuracy={"top1": found[0].top1},
        )
    return SearchResult(folder, found)


class CandidateScores:
    """Accuracies of candidates with shared weights, each computed once; the processes of a search share the work.

    The images are decoded once and kept in memory as bytes, in every process: a search scores on them hundreds of
    times. Images that cannot be read are left out.

    Args:
        largest: the trained super-network.
        space: its space.
        images: to score on.
        folder: for scores.jsonl, which belongs to these weights and images.
        process: this one.
        computing: loading processes, limit of unreadable images, progress bar.
        precision: of the forward pass.
        batch_size: images at once.

    Raises: DataError: too many images cannot be read, or none can.
    """

    def __init__(
        self,
        largest: ViTResNAS,
        space: SearchSpace,
        images: ImageRecords,
        folder: Path,
        process: Process,
        *,
        computing: Computing,
        precision: Precision,
        batch_size: int,
    ) -> None:
        self.largest, self.space, self.process = largest, space, process
        self.precision: Precision = precision
        self.known = Ledger(folder / SCORES_NAME, "top1", writes=process.is_main)
        self._alone = Process(0, 1, process.device)  # each process scores candidates of its own, on all images
        workers = workers_beside(process.device, computing.workers)
        self._damage = DamageCount(images, computing.corrupt_limit)
        transform = EvalTransform(_preprocessing(space))
        self._batches = eval_batches(images, transform, self._alone, batch_size=batch_size, workers=workers, keep=True)
        with explained_worker_failure(workers):
            for _, _, failures in computing.watch(self._batches, len(self._batches)):
                self._damage.add(failures)
        if len(self._damage.failed) == len(images):
            raise DataError(f"no image of {images.name} is left to score candidates on")

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """The accuracy of each candidate in percent; every process passes the same candidates and gets all results."""
        process = self.process
        new = list({c.key(): c for c in candidates if c.key() not in self.known}.values())
        # in rounds of one candidate a process, so that little is lost if the search is killed
        for start in range(0, len(new), process.world):
            mine = new[start + process.rank : start + process.world][:1]
            for found in process.gather([(c.key(), self._top1(c)) for c in mine]):
                for key, top1 in found:
                    self.known.add(key, top1)
        return [self.known[candidate.key()] for candidate in candidates]

    def _top1(self, candidate: Candidate) -> float:
        heads = Heads(extract(self.largest, self.space, candidate).to(self.process.device))
        outcomes = score(heads, self._batches, self._alone, precision=self.precision, damage=self._damage)
        return round(outcomes.evaluation().top1, 4)


def _preprocessing(space: SearchSpace) -> Preprocessing:
    """The transform from images to the input of the networks of a space."""
    return space.preprocessing or default_preprocessing("", space.config_of(space.largest()).image_hw)


def _keep(path: Path, text: str) -> None:
    """Write a file of settings; one that is there already must be the same. Raises: TrainingError: it is not."""
    if not path.exists():
        write_text(path, text)
    elif (before := read_text(path, error=TrainingError)) != text:
        changed = [line for line in before.splitlines() if line not in text.splitlines()]
        raise TrainingError(f"{path} says {'; '.join(changed[:3]) or 'otherwise'}; use those settings, or a new folder")
