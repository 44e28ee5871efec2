"""A whole run of training: from a model, a recipe and images to a folder with checkpoints, log and recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..augmentation.augment import TrainTransform
from ..augmentation.label_maps import LabelMaps
from ..augmentation.samples import TrainSampler, sample_seed, training_batches
from ..batches.inputs import InputBatches, eval_batches
from ..batches.loading import DamageCount, Watch, check_workers, explained_worker_failure, plain_watch, workers_beside
from ..batches.memory import Cache, keep_in_memory, keeps_pixels
from ..checkpoint import Preprocessing
from ..config import check_choice, is_finite
from ..data.datasets import open_images
from ..data.records import ImageRecords
from ..data.split import labels_of, one_class
from ..distributed import Process, Shard, join_processes
from ..errors import ConfigError, DataError, TrainingError, shown
from ..files import write_text
from ..images.transforms import EvalTransform, preprocessing_of
from ..recipes.recipe import Recipe, recipe_of
from ..scoring.evaluation import Heads, score_each
from ..scoring.metrics import FIGURES, best_thresholds, check_kinds, choosing_figure, count_classes, in_words
from ..scoring.outcomes import Outcomes
from ..show.pages import Report, add_page, costs_of, weights_in_words
from ..trackers import Trackers, chosen_trackers
from .engine import train_epoch
from .learner import Learner, make_learner
from .state import STATE_NAME, Progress, RunLog, export_model, identity_of, load_state, remove_leftovers, save_state
from .teacher import Teacher, TeacherSpec

RECIPE_NAME = "recipe.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """Where and with what help a run computes; none of it changes the result. The fields are explained at `train`."""

    device: str | torch.device | None = None
    workers: int | None = None
    shard: Shard = "ddp"
    tensorboard: bool = False
    report_to: str | Sequence[str] = ()
    cache: Cache = "auto"
    corrupt_limit: float = 0.01
    watch: Watch = plain_watch
    on_epoch: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        """Check types, choices and ranges, before long work begins."""
        check_choice("shard", self.shard, Shard)
        check_choice("cache", self.cache, Cache)
        check_choice("tensorboard", self.tensorboard, Literal[True, False])
        object.__setattr__(self, "report_to", chosen_trackers(self.report_to, tensorboard=self.tensorboard))
        check_workers(self.workers)
        if not is_finite(self.corrupt_limit) or not 0 <= self.corrupt_limit <= 1:
            raise ConfigError(f"corrupt_limit={shown(self.corrupt_limit)}; expected a fraction from 0 to 1")
        for name, value in (("watch", self.watch), ("on_epoch", self.on_epoch or self.watch)):
            if not callable(value):
                raise ConfigError(f"{name}={shown(value)}; expected a function")

    def trackers(self, process: Process, out: Path, config: Mapping[str, Any]) -> Trackers:
        """The trackers of a run in the folder `out`; the first process alone reports."""
        return Trackers(self.report_to if process.is_main else (), out, config=config)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Outcome of a run.

    Attributes:
        out: the folder; `model/` holds the last weights, `best/` those of the best epoch, `ema/` the averaged ones.
        top1: accuracy of the last weights on the validation images in percent; None without such images.
        best_top1: the best epoch's; None likewise. It is optimistic, because these images selected the epoch: to report
            a figure, take `top1`, or evaluate `best/` on other images.
        best_epoch: from 0; the best one by `choosing_figure`.
        log: the rows of log.jsonl, one an epoch.
        map: mean average precision of the last weights, for several labels an image; None for one.
        best_map: the best epoch's.
    """

    out: Path
    top1: float | None
    best_top1: float | None
    best_epoch: int | None
    log: list[dict[str, Any]]
    map: float | None = None
    best_map: float | None = None


def train(
    model: nn.Module,
    *,
    recipe: Recipe | str | PathLike[str],
    train: Any,
    val: Any = None,
    out: str | PathLike[str],
    teacher: Teacher | TeacherSpec | None = None,
    label_maps: str | PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    shard: Shard = "ddp",
    tensorboard: bool = False,
    report_to: str | Sequence[str] = (),
    cache: Cache = "auto",
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model in place; a second call with the same `out` goes on after the last saved epoch.

    Under torchrun every process calls this with the same arguments.

    Args:
        model: from `create_model` or `from_pretrained`, or any module that turns (B, 3, H, W) into (B, K) logits.
        recipe: the settings, a preset's name or a TOML file.
        train: training images: a folder or the name of a data set (see `open_dataset`), or a Dataset (see `wrap`).
        val: images to evaluate on, with the same classes, in the same forms; None: no evaluation.
        out: folder for the results: recipe.toml, log.jsonl, last.pt (the state to resume from), and model folders.
        teacher: see `load_teacher`; goes with a recipe that distils, which by default takes the papers', regnety_160.
        label_maps: folder that `make_label_maps` wrote for these images; goes with a recipe with `token_labels`.
        preprocessing: normalisation and size of the input, for modules without a `model.origin`.
        device: where to compute; default: the GPU if there is one.
        workers: loading processes; the result does not depend on them.
        shard: under torchrun, "ddp" (a copy in each process) or "fsdp" (parameters divided).
        tensorboard: the same as report_to="tensorboard".
        report_to: experiment trackers, any of "tensorboard", "wandb", "mlflow" and "trackio", see `Trackers`.
        cache: "auto" keeps small images decoded in memory if they fit in a quarter of what is free; "ram" always,
            "none" never. The result is the same.
        corrupt_limit: fraction of the images that may be unreadable before the run stops.
        watch: wraps each epoch's batches, for a progress bar.
        on_epoch: called with each finished epoch's row of the log.

    Raises:
        ConfigError: settings that do not fit each other, the model or the processes.
        DataError: images or classes are missing, or too many images are damaged.
        TrainingError: the loss is no number, the teacher does not fit, `out` holds another run, a worker died.
        SaveError: no space or no permission in `out`; the last complete state stays.
        MissingExtraError: a tracker without its client.
    """
    computing = Computing(
        device=device,
        workers=workers,
        shard=shard,
        tensorboard=tensorboard,
        report_to=report_to,
        cache=cache,
        corrupt_limit=corrupt_limit,
        watch=watch,
        on_epoch=on_epoch,
    )
    return run_training(
        model,
        recipe=recipe_of(recipe),
        train=train,
        val=val,
        out=Path(out),
        teacher=teacher,
        label_maps=label_maps,
        preprocessing=preprocessing,
        computing=computing,
    )


def run_training(
    model: nn.Module,
    *,
    recipe: Recipe,
    train: Any,
    val: Any,
    out: Path,
    computing: Computing,
    teacher: Teacher | TeacherSpec | None = None,
    label_maps: str | PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    before_epoch: Callable[[int], None] | None = None,
    trackers: Trackers | None = None,
) -> TrainResult:
    """As `train`, with the options of computing in one record; fine-tuning and the search call it too.

    `before_epoch` is called with the number of each epoch, from 0, before it begins, in every process. `trackers` are
    used instead of those of `computing`; they stay open, and get no final figures.
    """
    with join_processes(computing.device) as process:
        records = open_images(train, "train")
        val_records = None if val is None else open_images(val, "val", records.classes)
        if recipe.patience and val_records is None:
            raise ConfigError(f"patience={recipe.patience} needs images to evaluate on; pass val=..., or patience=0")
        check_kinds(records, val_records)
        recipe = recipe.for_several_labels() if records.multi_label else recipe
        balanced = recipe.balanced
        # to read images for a log line would take too long
        labels = labels_of(records) if balanced or records.knows_labels else []
        counts = count_classes(records, labels, balanced=balanced) if labels else None
        preprocessing = preprocessing or preprocessing_of(model)
        if computing.shard == "fsdp" and val_records is not None and len(val_records) < process.world:
            raise DataError(f"{len(val_records)} images to evaluate on, fewer than the {process.world} processes")
        # no variable holds the learner: after a failure its connections must close, see `join_processes`
        return Run(
            learner=make_learner(
                model,
                recipe,
                num_classes=len(records.classes),
                process=process,
                preprocessing=preprocessing,
                teacher=teacher,
                shard=computing.shard,
                weights=counts.weights(binary=recipe.loss == "bce")
                if counts and recipe.class_weights == "balanced"
                else None,
                multi_label=records.multi_label,
                label_maps=None if label_maps is None else LabelMaps(label_maps, records),
            ),
            records=records,
            classes=one_class(labels) if recipe.sampling == "balanced" else None,
            val=val_records,
            out=out,
            preprocessing=preprocessing,
            computing=computing,
            workers=workers_beside(process.device, computing.workers),
            before_epoch=before_epoch,
            trackers=trackers,
            started_from=weights_in_words(model),
        ).to_the_end()


@dataclass(slots=True, kw_only=True)
class Run:
    """One call of `run_training`: everything that stays the same from epoch to epoch."""

    learner: Learner
    records: ImageRecords
    classes: list[int] | None
    val: ImageRecords | None
    out: Path
    preprocessing: Preprocessing
    computing: Computing
    workers: int
    before_epoch: Callable[[int], None] | None = None
    trackers: Trackers | None = None
    started_from: str = ""
    val_batches: InputBatches | None = None
    thresholds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    found: dict[str, Outcomes] = field(default_factory=dict)

    def to_the_end(self) -> TrainResult:
        """Run the epochs after the last saved one, then export the models."""
        with explained_worker_failure(self.workers):
            return self._to_the_end()

    def _to_the_end(self) -> TrainResult:
        learner, recipe, process = self.learner, self.learner.recipe, self.learner.process
        identity = identity_of(learner, self.records)
        settings = process.gather((recipe.to_toml(), identity))
        if any(given != settings[0] for given in settings):
            raise TrainingError("the processes were started with different settings, models or images")
        progress = load_state(self.out, learner, run=identity) or Progress()
        self.thresholds = progress.thresholds
        if len(set(process.gather(progress.epoch))) > 1:
            raise TrainingError(f"the processes find different states in {self.out}; all of them must share one folder")
        ended = progress.epoch >= recipe.total_epochs or self._gives_up(progress)
        loading = None if ended else self._loading()  # before anything is written: it may refuse the images
        own = self.computing.trackers(process, self.out, asdict(recipe) | identity) if self.trackers is None else None
        with own or nullcontext(self.trackers) as trackers:
            log = RunLog(self.out, first_epoch=progress.epoch, writes=process.is_main, trackers=trackers)
            if process.is_main:
                remove_leftovers(self.out)
                if loading is not None:
                    write_text(self.out / RECIPE_NAME, recipe.to_toml())
            if loading is not None:
                self._epochs(progress, log, identity, *loading)
            last = log.rows[-1] if log.rows else {}
            for prefix, heads in learner.versions().items():
                self._export("ema" if prefix else "model", heads, last, prefix)
            learner.bare.eval()
            result = self._result(progress, log.rows)
            if own is not None:
                names = ("top1", "best_top1", "map", "best_map", "best_epoch")
                own.end({name: getattr(result, name) for name in names})
        if own is not None and process.is_main and loading is not None:
            add_page(self.out, partial(self._report, result, identity))
        return result

    def _report(self, result: TrainResult, identity: Mapping[str, str]) -> Report:
        """The report, with the figures of the averaged weights if there are some, else of the last ones."""
        prefix, rows = "ema_" if "ema_" in self.found else "", result.log
        data = f"{self.records.name}, {len(self.records.classes)} classes: {len(self.records)} images for training"
        facts = {"started from": self.started_from, "data": f"{data}, {len(self.val or ())} for validation"}
        facts |= {name: identity[name] for name in ("teacher", "label_maps", "trained") if name in identity}
        notes = [f"The figures are those of {'ema/' if prefix else 'model/'}, after the last epoch."]
        if result.best_epoch is not None:
            best = in_words({"top1": result.best_top1, "map": result.best_map})
            notes.append(f"best/ is of epoch {result.best_epoch + 1}: {best}, optimistic, as it chose the epoch.")
        seconds, speed = sum(row["seconds"] for row in rows), rows[-1]["images_per_second"]
        return Report(
            title=f"Training on {self.records.name}",
            facts=facts | {"settings": self.learner.recipe.in_words()},
            notes=notes,
            scored={} if self.val is None else {"val": (self.val, self.found[prefix])},
            costs=costs_of(self.learner.process.device, seconds, speed=speed)
            | {"processes": str(self.learner.process.world)},
            thresholds=self.thresholds.get(prefix),
            curve=rows,
            model=None if self.learner.divided else self.learner.versions()[prefix].model,
            transform=EvalTransform(self.preprocessing),
        )

    @property
    def _best(self) -> str:
        """Prefix of the figures of the weights that best/ holds."""
        return "ema_" if self.learner.recipe.best_of == "ema" else ""

    @property
    def _chooser(self) -> str:
        """Figure of the log by which the best epoch is chosen."""
        return self._best + choosing_figure(several=self.records.multi_label, balanced=self.learner.recipe.balanced)

    def _result(self, progress: Progress, rows: list[dict[str, Any]]) -> TrainResult:
        epoch = progress.best_epoch if progress.best_epoch >= 0 else None
        last, best = rows[-1] if rows else {}, {} if epoch is None else {self._chooser: progress.best_top1}
        best |= next((row for row in rows if row["epoch"] == epoch), {})
        figures = {f"best_{name}": best.get(self._best + name) for name in ("top1", "map")}
        return TrainResult(
            out=self.out, top1=last.get("top1"), best_epoch=epoch, log=rows, map=last.get("map"), **figures
        )

    def _loading(self) -> tuple[TrainSampler, InputBatches]:
        """The order of the training images, and their batches."""
        learner, recipe, process = self.learner, self.learner.recipe, self.learner.process
        sampler = TrainSampler(
            len(self.records),
            batch_size=recipe.batch_size,
            repeats=recipe.repeats,
            seed=recipe.seed,
            rank=process.rank,
            world=process.world,
            classes=self.classes,
        )
        batches = training_batches(
            keep_in_memory(self.records, self.computing.cache, workers=self.workers, processes=process.world),
            TrainTransform(recipe, self.preprocessing, self.preprocessing.crop),
            sampler,
            batch_size=learner.batch_size,
            workers=self.workers,
            device=process.device,
            located=learner.mixing.tokens is not None,
        )
        return sampler, batches

    def _epochs(
        self, progress: Progress, log: RunLog, identity: dict[str, str], sampler: TrainSampler, batches: InputBatches
    ) -> None:
        """The epochs that are left; after each its log row, exports and state are written as the recipe asks for."""
        learner, recipe, process = self.learner, self.learner.recipe, self.learner.process
        damage = DamageCount(self.records, self.computing.corrupt_limit, failed=progress.unreadable)
        for epoch in range(progress.epoch, recipe.total_epochs):
            row = self._one_epoch(epoch, sampler, batches, damage)
            score = row.get(self._chooser, -1.0)
            if score > progress.best_top1:
                progress.best_top1, progress.best_epoch = score, epoch
                self._export("best", learner.versions()[self._best], row, self._best)
            progress.epoch, progress.unreadable = epoch + 1, sorted(damage.failed)
            log.add(row)  # before the state: if the process dies between, the epoch is run again, its row dropped
            ends = self._gives_up(progress)
            if ends or self._is_saved(epoch):
                save_state(self.out, learner, progress, run=identity)
            if self.computing.on_epoch is not None and process.is_main:
                self.computing.on_epoch(row)
            if ends:
                break

    def _one_epoch(
        self, epoch: int, sampler: TrainSampler, batches: InputBatches, damage: DamageCount
    ) -> dict[str, Any]:
        """Train, and evaluate if the recipe asks for it after this epoch; gives the epoch's row of the log."""
        recipe, process = self.learner.recipe, self.learner.process
        sampler.set_epoch(epoch)
        # for mixing and stochastic depth; no epoch has 2**40 samples, so none shares its seed with these
        torch.manual_seed(sample_seed(recipe.seed, epoch, (1 << 40) + process.rank))
        if self.before_epoch is not None:
            self.before_epoch(epoch)
        saved = next((before for before in reversed(range(epoch)) if self._is_saved(before)), None)
        kept = "" if saved is None else f"; the last good weights, of epoch {saved}, are in {self.out / STATE_NAME}"
        done = train_epoch(
            self.learner,
            batches,
            steps=sampler.steps,
            epoch=epoch,
            damage=damage,
            watch=self.computing.watch,
            kept=kept,
        )
        row: dict[str, Any] = {
            "epoch": epoch,
            "precision": recipe.precision,
            "lr": done.lr,
            "loss": round(done.loss, 6),
            "seconds": round(done.seconds, 2),
            "images_per_second": round(done.images / done.seconds, 1),
            "unreadable": damage.meet(process),
        }
        if (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.total_epochs:
            row |= self._evaluate()
        return row

    def _is_saved(self, epoch: int) -> bool:
        """Whether the recipe has the state saved after this epoch (from 0)."""
        recipe = self.learner.recipe
        return (epoch + 1) % recipe.save_every == 0 or epoch + 1 == recipe.total_epochs

    def _gives_up(self, progress: Progress) -> bool:
        """Whether the recipe's patience is over, after an evaluation; a resumed run checks it too."""
        recipe = self.learner.recipe
        evaluated = progress.epoch % recipe.eval_every == 0 and progress.best_epoch >= 0
        return bool(recipe.patience) and evaluated and progress.epoch - 1 - progress.best_epoch >= recipe.patience

    def _evaluate(self) -> dict[str, Any]:
        """Validation figures of the weights and, under names that begin with ema_, of their average."""
        if self.val is None:
            return {}
        learner, process = self.learner, self.learner.process
        size = max(learner.batch_size * 3 // (2 * learner.parts), 1)
        # where parameters are divided, every process must take part in every forward pass
        most = -(-len(self.val) // process.world)
        rounds = -(-most // size) if learner.divided else None
        if self.val_batches is None:
            keep = keeps_pixels(self.val, self.preprocessing, self.computing.cache)
            transform = EvalTransform(self.preprocessing)
            self.val_batches = eval_batches(
                self.val, transform, process, batch_size=size, workers=self.workers, keep=keep
            )
        damage, precision = DamageCount(self.val, self.computing.corrupt_limit), learner.recipe.precision
        found = score_each(
            learner.versions(), self.val_batches, process, precision=precision, damage=damage, rounds=rounds
        )
        self.found, figures = found, {prefix: outcomes.evaluation() for prefix, outcomes in found.items()}
        row: dict[str, Any] = {}
        for prefix, result in figures.items():
            if (scores := found[prefix].scores) is not None:
                self.thresholds[prefix] = best_thresholds(scores, found[prefix].label)
            known = ((name, getattr(result, name)) for name in FIGURES)
            row |= {f"{prefix}{name}": round(value, 4) for name, value in known if value is not None}
            row |= {f"{prefix}{name}_top1": round(top1, 4) for name, top1 in result.heads.items()}
        plain = figures[""]
        counts = {"val_images": plain.images, "val_unreadable": plain.skipped}
        return row | {"val_loss": round(plain.loss, 6), **counts}

    def _export(self, name: str, heads: Heads, row: dict[str, Any], prefix: str = "") -> None:
        export_model(
            heads.model,
            self.out / name,
            self.learner.process,
            divided=self.learner.divided,
            records=self.records,
            accuracy={figure: row.get(prefix + figure) for figure in FIGURES},
            thresholds=self.thresholds.get(prefix),
        )
