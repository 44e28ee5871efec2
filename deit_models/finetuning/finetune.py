"""A whole fine-tuning: from a pretrained model and labelled images to a folder of models and figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batches.loading import Watch, plain_watch, workers_beside
from ..batches.memory import Cache
from ..checkpoint import Layout
from ..config import check_choice, is_finite
from ..data.datasets import has_validation, open_images
from ..data.records import ImageRecords
from ..data.split import Split, keep_split, labels_of, parts, stratified_split
from ..distributed import Process, join_processes
from ..errors import ConfigError, shown
from ..files import write_text
from ..formats.layouts import known_origin
from ..hub.load import from_pretrained
from ..models.layers import ImageClassifier
from ..recipes.recipe import Recipe, recipe_named, recipe_of
from ..scoring.evaluation import collect_outcomes, resolved_precision
from ..scoring.metrics import best_thresholds, check_kinds, count_classes
from ..show.charts import find_matplotlib
from ..show.pages import weights_in_words
from ..trackers import Trackers
from ..training.run import RECIPE_NAME, Computing, run_training
from ..training.teacher import Teacher, TeacherSpec
from .adapt import adapt_head, check_mode, only_trained, trained_names
from .probe import Features, extract_features, fit_heads, judge, put_heads, refit_heads
from .report import Learned, SetOutcomes, write_report

logger = logging.getLogger(__name__)

PRESET_OF = {
    "cifar10": "finetune_sgd",
    "cifar100": "finetune_sgd",
    "stanford_cars": "finetune_sgd",
    "flowers102": "finetune_sgd",
    "inaturalist-2018": "finetune_inaturalist",
    "inaturalist-2019": "finetune_inaturalist",
    "inaturalist-2021": "finetune_inaturalist",
    "imagenet": "deit_finetune_384",
}
"""Preset for the name of a data set."""
_DEFAULT, _STEPS, _MOST_EPOCHS, _SMALL_SIDE = "finetune", 1500, 150, 32
FEATURES_NAME = "features"


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """Result of a fine-tuning.

    Attributes:
        model: with the best weights, in eval mode.
        out: the folder; `from_pretrained` reads best/ and model/ (the last weights), timm and transformers theirs.
        metrics: contents of metrics.json: figures in percent under "val" and, with test images, "test". In mode "head"
            those under "val" are from before the last fit, if that took in the validation images: `fitted_images` of
            it, more than the `train_images`.
        address: of the Hub repository, if the model was pushed.
    """

    model: ImageClassifier
    out: Path
    metrics: dict[str, Any]
    address: str | None = None


def finetune(
    model: ImageClassifier | str | PathLike[str],
    *,
    train: Any,
    out: str | PathLike[str],
    val: Any = None,
    test: Any = None,
    mode: str = "full",
    recipe: Recipe | str | PathLike[str] | None = None,
    teacher: Teacher | TeacherSpec | None = None,
    warm_start: bool = False,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    plot: bool = False,
    push_to_hub: str | None = None,
    layout: Layout = "native",
    device: str | torch.device | None = None,
    workers: int | None = None,
    tensorboard: bool = False,
    report_to: str | Sequence[str] = (),
    cache: Cache = "auto",
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> FinetuneResult:
    """Train a pretrained model on other classes; a second call with the same `out` resumes the first one.

    Args:
        model: from `from_pretrained`, changed in place; or an argument of it: a name, a folder, a Hub repository.
        train: training images: a folder or the name of a data set (see `open_dataset`), or a Dataset (see `wrap`).
        out: folder for the results; docs/finetuning.md describes its contents.
        val: images to choose the best epoch or penalty by, in the same forms. Default: those of `train`, if it is a
            name or a folder with val/; else a share of the training images, by class, written to split.json.
        test: images without a part in any choice, to score the best model on at the end.
        mode: "full": everything learns. "last-N": the last N blocks and the heads. "attention": attention, positions
            and heads, see `adapt.trained_names`. "head": the heads alone, as logistic regression on features; each
            image is read and sent through the backbone exactly once. Images set aside choose the penalty, and then the
            heads are fitted to them, too; the figures are from before that.
        recipe: the settings, a preset's name or a TOML file; default: by the data set's name, or "finetune". Mode
            "head" uses its `img_size`, `precision`, `seed` and `class_weights` only.
        teacher: see `load_teacher`; it needs the new classes, in their order. Without a teacher, both heads of a
            distilled model learn from the labels.
        warm_start: see `adapt_head`.
        val_fraction: share to set aside where there are no validation images.
        split_seed: chooses the images that are set aside.
        plot: also draw curves, confusion matrix and worst mistakes; needs the extra `[plot]`.
        push_to_hub: a repository to push the best model to, "owner/name".
        layout: of the pushed model.
        device: where to compute; default: the GPU if there is one.
        workers: loading processes.
        tensorboard: the same as report_to="tensorboard".
        report_to: experiment trackers, see `train`; in mode "head" each penalty tried is a step.
        cache: whether decoded images stay in memory, see `train`; unused in mode "head".
        corrupt_limit: fraction of the images that may be unreadable before the run stops.
        watch: wraps batches, for a progress bar.
        on_epoch: called with each finished epoch's row of the log.

    Raises: ConfigError: settings that do not fit each other or the model. DataError: images or classes are missing, or
        too many images are damaged. TrainingError: as `train`, and a split or features of another run in `out`.
        SaveError: no space, no permission. FetchError: no Hub. MissingExtraError: `plot` without matplotlib, a tracker
        without its client.
    """
    begun = time.perf_counter()
    check_choice("layout", layout, Layout)
    if not is_finite(val_fraction) or not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction={shown(val_fraction)}; expected more than 0 and less than 1")
    recipe = None if recipe is None else recipe_of(recipe)
    computing = Computing(
        device=device,
        workers=workers,
        tensorboard=tensorboard,
        report_to=report_to,
        cache=cache,
        corrupt_limit=corrupt_limit,
        watch=watch,
        on_epoch=on_epoch,
    )
    check_mode(mode, ["teacher"] if teacher else [])
    if plot:
        find_matplotlib()  # before hours of training, not after
    with join_processes(device) as process:
        model = _open_model(model, mode)
        records = open_images(train, "train")
        val, test = (
            None if source is None else open_images(source, "val", records.classes)
            for source in (validation_source(train, val), test)
        )
        recipe = recipe_for(records.name, model, images=len(records), teacher=teacher is not None, recipe=recipe)
        check_kinds(records, val, test)
        recipe = recipe.for_several_labels() if records.multi_label else recipe
        check_mode(mode, ["sampling='balanced' (class_weights='balanced' it has)"] * (recipe.sampling != "all"))
        recipe = replace(recipe, precision=resolved_precision(recipe.precision, process))
        started_from = weights_in_words(model)
        torch.manual_seed(recipe.seed)
        adapt_head(model, class_names=records.classes, img_size=recipe.img_size or None, warm_start=warm_start)
        known_origin(model).check_labels(records.multi_label, "fine-tuning", begins=True)
        run = _Finetuning(
            model=model,
            mode=mode,
            recipe=recipe,
            train=records,
            val=val,
            test=test,
            out=Path(out),
            val_fraction=val_fraction,
            split_seed=split_seed,
            process=process,
            computing=computing,
        )
        facts: dict[str, Any] = {"started_from": started_from, "mode": mode, "recipe": recipe.preset}
        facts |= {"data": records.name, "classes": len(records.classes)}
        report: tuple[dict[str, Any], str | None] = {}, None
        with computing.trackers(process, run.out, asdict(recipe) | facts) as trackers:
            learned = run.by_features(trackers) if mode == "head" else run.by_training(teacher, trackers)
            if process.is_main:
                facts["train_images"] = learned.train_images
                seconds = time.perf_counter() - begun
                metrics = write_report(run.out, learned, recipe=recipe, facts=facts, seconds=seconds, plot=plot)
                trackers.end(
                    {f"{part}/{name}": figure for part in learned.scored for name, figure in metrics[part].items()}
                )
                pushed = None if push_to_hub is None else learned.best.push_to_hub(push_to_hub, layout=layout)
                report = metrics, pushed
        metrics, address = process.gather(report)[0]
    return FinetuneResult(learned.best.eval(), run.out, metrics, address)


def _open_model(model: ImageClassifier | str | PathLike[str], mode: str) -> ImageClassifier:
    """The model, after a check that it can learn in this mode."""
    if isinstance(model, (str, PathLike)):
        model = from_pretrained(model)
    if not isinstance(model, ImageClassifier):
        raise ConfigError(f"a {type(model).__name__} is no model of this package; deit_models.train takes any module")
    if mode != "head":
        trained_names(mode, model)
    return model


def validation_source(train: Any, val: Any) -> Any:
    """Source of the validation images: `val`, else `train` if that has a split for it, else None."""
    if val is None and has_validation(train):
        return train
    return val


def recipe_for(
    data: str,
    model: ImageClassifier,
    *,
    images: int,
    teacher: bool,
    recipe: Recipe | str | PathLike[str] | None = None,
    **changes: Any,
) -> Recipe:
    """The recipe of a run: the given one, or the default for a data set and a model.

    Args:
        data: name of the data set, perhaps with coarser classes ("inaturalist-2018:genus").
        model: inputs of up to 32 pixels are padded and cropped instead of magnified, as in the authors' loader.
        images: number of training images; the default preset gives few of them more epochs, for about 1500 steps.
        teacher: whether there is one, for the distillation head if the model has it. Without a teacher, both heads
            learn from the labels, even where a given recipe says otherwise.
        recipe: the given one, a preset's name or a TOML file.
        **changes: fields to replace.

    Raises: ConfigError: an unknown name or field, or a value that cannot work.
    """
    if recipe is None:
        preset, given = recipe_named(PRESET_OF.get(data.partition(":")[0], _DEFAULT)), changes
        recipe, changes = preset, {}
        if teacher:
            distilled = getattr(model.config, "distilled", False) is True
            changes = {"distillation": "hard", "distill_on": "token" if distilled else "class"}
        if max(model.config.image_hw) <= _SMALL_SIDE and not given.get("img_size", preset.img_size):
            changes["crop"] = "pad"
        if preset.preset == _DEFAULT:
            steps = max(images // given.get("batch_size", preset.batch_size), 1)
            changes["epochs"] = min(max(preset.epochs, -(-_STEPS // steps)), _MOST_EPOCHS)
        if "epochs" in given:  # a short run has a short warm-up
            changes["warmup_epochs"] = min(preset.warmup_epochs, max(given["epochs"] - 1, 0))
        changes |= given
    found = recipe_of(recipe, **changes)
    return found if found.distillation != "none" else replace(found, label_heads="both")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finetuning:
    """One fine-tuning: a model with heads for the new classes; `val` is None to set training images aside."""

    model: ImageClassifier
    mode: str
    recipe: Recipe
    train: ImageRecords
    val: ImageRecords | None
    test: ImageRecords | None
    val_fraction: float
    split_seed: int
    out: Path
    process: Process
    computing: Computing

    def by_training(self, teacher: Teacher | TeacherSpec | None, trackers: Trackers) -> Learned:
        """Train all of the model, or its last blocks, and score the weights of the best epoch."""
        model, recipe, computing, device = self.model, self.recipe, self.computing, self.process.device
        split, train, val = None, self.train, self.val
        if val is None:
            split = self._divide(labels_of(train))
            train, val = parts(train, split)
        with only_trained(model, trained_names(self.mode, model)):
            result = run_training(
                model,
                recipe=recipe,
                train=train,
                val=val,
                out=self.out,
                teacher=teacher,
                computing=computing,
                trackers=trackers,
            )
        best = from_pretrained(self.out / "best", device=device)
        score = partial(
            collect_outcomes,
            best,
            process=self.process,
            precision=recipe.precision,
            workers=workers_beside(device, computing.workers),
            batch_size=max(recipe.batch_size * 3 // 2, 1),
            corrupt_limit=computing.corrupt_limit,
        )
        details = {
            "epochs": len(result.log),
            "best_epoch": result.best_epoch,
            "last_val_top1": result.top1,
            "training_seconds": round(sum(row["seconds"] for row in result.log), 2),
        }
        scored: SetOutcomes = {"val": (val, score(val))}
        if self.test is not None:
            scored["test"] = (self.test, score(self.test))
        found = scored["val"][1]
        if best.origin is not None and found.scores is not None:
            best.origin = replace(best.origin, thresholds=best_thresholds(found.scores, found.label))
        return Learned(
            best, last=model, train_images=len(train), split=split, scored=scored, details=details, curve=result.log
        )

    def by_features(self, trackers: Trackers) -> Learned:
        """Send each image through the backbone once, and fit the heads to the features."""
        model, process, precision, computing = self.model, self.process, self.recipe.precision, self.computing
        folder, device = self.out / FEATURES_NAME, process.device
        features = partial(extract_features, model, process=process, precision=precision, computing=computing)
        split, train, val = None, features(self.train, folder / "train"), self.val
        every = train
        if val is None:
            split = self._divide(train.plain_labels())
            val = parts(self.train, split)[1]
            train, val_features = every.of(split.train), every.of(split.val)
        else:
            val_features = features(val, folder / "val")
        write_text(self.out / RECIPE_NAME, self.recipe.to_toml())
        weights = self._class_weights(train)
        fit = fit_heads(train, val_features, num_classes=model.num_classes, device=device, weights=weights)
        for number, tried in enumerate(fit.tried):
            trackers.add(tried, number)
        scored: SetOutcomes = {"val": (val, judge(fit, val_features, device=device))}
        if split is not None:
            logger.info("the heads are fitted again to all %d images, with penalty %g", len(every.labels), fit.penalty)
            fit = refit_heads(fit, every, device=device, weights=weights)
        put_heads(model, fit)
        found = scored["val"][1]
        if found.scores is not None:
            chosen = best_thresholds(found.scores, found.label)
            model.origin = replace(known_origin(model), problem_type="multi_label_classification", thresholds=chosen)
        if self.test is not None:
            scored["test"] = (self.test, judge(fit, features(self.test, folder / "test"), device=device))
        details = {"penalty": fit.penalty, "tried": fit.tried, "fitted_images": len(every.labels)}
        count = len(train.labels)
        return Learned(
            model.eval(), last=model, train_images=count, split=split, scored=scored, details=details, curve=fit.tried
        )

    def _class_weights(self, features: Features) -> Tensor | None:
        """The weights for the loss of a head, if the recipe wants some; a line counts the images."""
        balanced = self.recipe.class_weights == "balanced"
        counts = count_classes(self.train, features.plain_labels(), balanced=balanced)
        return counts.weights(binary=counts.multi_label) if balanced else None

    def _divide(self, labels: list[Any]) -> Split:
        """Set images aside for validation, and write their names into `out`."""
        split = stratified_split(labels, fraction=self.val_fraction, seed=self.split_seed)
        return keep_split(self.out, self.train, split, write=self.process.is_main)
