"""A whole fine-tuning: from a pretrained model and labelled images to a folder that can be shown and shared."""
# MERGED """Which settings to fine-tune with: the facts for data sets known by name, a sound default for all others."""
# MERGED """The two ways to fine-tune: on the training engine, and as a head on cached features."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Layout
from ..data.classes import Split, keep_split, labels_of, parts, stratified_split
from ..data.datasets import has_validation, open_images
from ..data.loading import Watch, default_workers, plain_watch
from ..data.memory import Cache
from ..data.records import ImageRecords
from ..distributed import Process, join_processes
from ..errors import ConfigError
from ..evaluation import collect_outcomes
from ..files import atomic_write
from ..hub.load import from_pretrained
from ..models.layers import ImageClassifier
from ..training.recipe import Recipe, recipe_named
from ..training.run import RECIPE_NAME, train
from ..training.state import find_matplotlib
from ..training.teacher import Teacher, TeacherSpec
from .adapt import adapt_head, first_trained_layer, only_from_layer
from .probe import Features, extract_features, fit_heads, judge, linear_heads, put_heads
from .report import Curve, Part, Scored, Story, write_models, write_report

DEFAULT = "finetune"
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
"""A data set's name to the preset that is chosen for it."""
_STEPS, _MOST_EPOCHS = 1500, 150
_SMALL_SIDE = 32


def preset_for(data: str) -> str:
    """The preset for a data set's name, which may ask for coarser classes ("inaturalist-2018:genus")."""
    return PRESET_OF.get(data.partition(":")[0], DEFAULT)


def recipe_for(data: str, model: ImageClassifier, *, images: int, teacher: bool, **overrides: Any) -> Recipe:
    """The recipe for a data set and a model, where none is chosen; `overrides` go before everything.

    Args:
        data: the data set's name.
        model: at an input of 32 pixels or less images are padded and cut out rather than magnified, as the authors'
            loader does.
        images: for training; the default preset gives few of them more epochs, for about 1500 steps.
        teacher: whether there is one, which speaks to the distillation head if the model has it.
        **overrides: fields of the recipe.

    Raises: ConfigError: an unknown field, or a value that cannot work.
    """
    preset = recipe_named(preset_for(data))
    changes: dict[str, Any] = {}
    if teacher:
        distilled = getattr(model.config, "distilled", False)
        changes = {"distillation": "hard", "distill_on": "token" if distilled else "class"}
    if max(model.config.image_hw) <= _SMALL_SIDE and not overrides.get("img_size", preset.img_size):
        changes["crop"] = "pad"
    if preset.preset == DEFAULT:
        steps = max(images // overrides.get("batch_size", preset.batch_size), 1)
        changes["epochs"] = min(max(preset.epochs, -(-_STEPS // steps)), _MOST_EPOCHS)
    if "epochs" in overrides:  # a short run has a short warm-up
        changes["warmup_epochs"] = min(preset.warmup_epochs, max(overrides["epochs"] - 1, 0))
    return recipe_named(preset.preset, **{**changes, **overrides})


FEATURES_NAME = "features"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both ways begin with.

    Attributes:
        model: with its new heads.
        records: the training images, of which some are set aside if `val` is None.
        fraction: how many.
        split_seed: which.
    """

    model: ImageClassifier
    records: ImageRecords
    val: ImageRecords | None
    test: ImageRecords | None
    out: Path
    recipe: Recipe
    process: Process
    workers: int
    cache: Cache
    corrupt_limit: float
    watch: Watch
    fraction: float
    split_seed: int

    def divide(self, labels: list[int]) -> Split:
        """Set images aside, and note which in `out`."""
        split = stratified_split(labels, fraction=self.fraction, seed=self.split_seed)
        if self.process.is_main:
            keep_split(self.out, self.records, split)
        return split


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What both ways end with: the best model, the last one (perhaps the same), and what there is to tell."""

    best: ImageClassifier
    last: ImageClassifier
    train_images: int
    split: Split | None
    scored: dict[Part, Scored]
    details: dict[str, Any]
    curve: Curve


def by_training(
    setting: Setting,
    mode: str,
    teacher: Teacher | TeacherSpec | None,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> End:
    """Train all of the model, or its last blocks, and score the best epoch's weights."""
    recipe, process = setting.recipe, setting.process
    split, chosen, val = None, setting.records, setting.val
    if val is None:
        split = setting.divide(labels_of(setting.records))
        chosen, val = parts(setting.records, split)
    with only_from_layer(setting.model, first_trained_layer(mode, setting.model)):
        result = train(
            setting.model,
            recipe=recipe,
            train=chosen,
            val=val,
            out=setting.out,
            teacher=teacher,
            device=process.device,
            workers=setting.workers,
            cache=setting.cache,
            corrupt_limit=setting.corrupt_limit,
            watch=setting.watch,
            on_epoch=on_epoch,
        )
    best = from_pretrained(setting.out / "best", device=process.device)
    scored: dict[Part, Scored] = {}
    sets: dict[Part, ImageRecords | None] = {"val": val, "test": setting.test}
    for part, records in sets.items():
        if records is not None:
            outcomes = collect_outcomes(
                best,
                records,
                process,
                precision=recipe.precision,
                workers=setting.workers,
                batch_size=max(recipe.batch_size * 3 // 2, 1),
                corrupt_limit=setting.corrupt_limit,
            )
            scored[part] = Scored(records, outcomes)
    return End(
        best=best,
        last=setting.model,
        train_images=len(chosen),
        split=split,
        scored=scored,
        details={
            "epochs": len(result.log),
            "best_epoch": result.best_epoch,
            "last_val_top1": result.top1,
            "training_seconds": round(sum(row["seconds"] for row in result.log), 2),
        },
        curve=Curve(log=result.log),
    )


def by_features(setting: Setting) -> End:
    """Send each image through the backbone once, and fit the heads to what comes out.

    Raises: ConfigError: several processes, for which there is nothing to do here.
    """
    process, model = setting.process, setting.model
    if process.world > 1:
        raise ConfigError("mode='head' takes one process, which is done in seconds once the features are there")
    heads = linear_heads(model)
    found, split = _features(setting, setting.records, "train"), None
    val_records = setting.val
    if val_records is None:
        split = setting.divide(found.labels.tolist())
        val_records = parts(setting.records, split)[1]
        chosen, val = found.of(split.train), found.of(split.val)
    else:
        chosen, val = found, _features(setting, val_records, "val")
    with atomic_write(setting.out / RECIPE_NAME) as temporary:
        temporary.write_text(setting.recipe.to_toml(), encoding="utf-8")
    fit = fit_heads(chosen.readable(), val.readable(), num_classes=model.num_classes, device=process.device)
    put_heads(heads, fit)
    model.eval()
    scored: dict[Part, Scored] = {"val": Scored(val_records, judge(fit, val, device=process.device))}
    if setting.test is not None:
        outcomes = judge(fit, _features(setting, setting.test, "test"), device=process.device)
        scored["test"] = Scored(setting.test, outcomes)
    return End(
        best=model,
        last=model,
        train_images=len(chosen.labels),
        split=split,
        scored=scored,
        details={"penalty": fit.penalty, "tried": fit.tried},
        curve=Curve(penalties=fit.tried),
    )


def _features(setting: Setting, records: ImageRecords, part: str) -> Features:
    return extract_features(
        setting.model,
        records,
        setting.out / FEATURES_NAME / part,
        setting.process,
        precision=setting.recipe.precision,
        workers=setting.workers,
        corrupt_limit=setting.corrupt_limit,
        watch=setting.watch,
    )


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """How a fine-tuning ended.

    Attributes:
        model: the best one, in eval mode.
        out: the folder; `best/` and `model/` (the last weights) are what `from_pretrained` loads, `timm/best` and
            `transformers/best` the same for those libraries.
        metrics: what is in metrics.json: figures in percent under "val" and, with test images, "test".
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
    recipe: Recipe | str | None = None,
    teacher: Teacher | TeacherSpec | None = None,
    warm_start: bool = False,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    plot: bool = False,
    push_to_hub: str | None = None,
    layout: Layout = "native",
    device: str | torch.device | None = None,
    workers: int | None = None,
    cache: Cache = "auto",
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> FinetuneResult:
    """Teach a pretrained model other classes; a second call with the same `out` goes on where the first one stopped.

    Args:
        model: from `from_pretrained`, changed in place; or what that takes: a name, a folder, a Hub repository.
        train: training images: a folder or the name of a data set (see `open_dataset`), or a Dataset (see `wrap`).
        out: folder for the results; see docs/finetuning.md for what is in it.
        val: images to choose the best epoch or penalty by, in the same forms. Default: those that belong to `train`, if
            it is a name or a folder with val/; else a share of the training images, by class, noted in split.json.
        test: images that have no part in any choice, to score the best model on at the end.
        mode: "full": everything learns. "last-N": the last N blocks and the heads. "head": the heads alone, as logistic
            regression on features for which each image is read and sent through the backbone exactly once.
        recipe: the settings, or a preset's name; default: by the data set's name, or "finetune". In mode "head" its
            `img_size`, `precision` and `seed` count, nothing else.
        teacher: see `load_teacher`; it must know the new classes, in their order. Without one, both heads of a
            distilled model learn from the labels.
        warm_start: see `adapt_head`.
        val_fraction: share to set aside where there are no validation images.
        split_seed: which ones.
        plot: also draw curves, confusion matrix and worst mistakes; needs the extra `[plot]`.
        push_to_hub: a repository to push the best model to, "owner/name".
        layout: of what is pushed.
        device: where to compute; default: the GPU if there is one.
        workers: loading processes.
        cache: whether to keep the images decoded in memory, see `train`; mode "head" reads each but once.
        corrupt_limit: fraction of the images that may be unreadable before the run stops.
        watch: wraps batches, for a progress bar.
        on_epoch: called with each finished epoch's row of the log.

    Raises: ConfigError: settings that do not fit each other or the model. DataError: images or classes are missing, or
        too many images are damaged. TrainingError: as `train`, and a split or features of another run in `out`.
        FetchError: no space, no permission, no Hub. MissingExtraError: `plot` without matplotlib.
    """
    begun = time.perf_counter()
    if plot:
        find_matplotlib()  # before hours of training, not after
    model = _opened(model, mode, has_teacher=teacher is not None)
    records = open_images(train, "train")
    if val is None and isinstance(train, (str, PathLike)) and has_validation(train):
        val = train
    recipe = _settled(recipe, model, records, has_teacher=teacher is not None)
    started_from = _description_of(model)
    torch.manual_seed(recipe.seed)
    adapt_head(model, class_names=records.classes, img_size=recipe.img_size or None, warm_start=warm_start)
    with join_processes(device) as process:
        setting = Setting(
            model=model,
            records=records,
            val=None if val is None else open_images(val, "val", records.classes),
            test=None if test is None else open_images(test, "val", records.classes),
            out=Path(out),
            recipe=recipe,
            process=process,
            workers=default_workers(process.device) if workers is None else workers,
            cache=cache,
            corrupt_limit=corrupt_limit,
            watch=watch,
            fraction=val_fraction,
            split_seed=split_seed,
        )
        end = by_features(setting) if mode == "head" else by_training(setting, mode, teacher, on_epoch)
        story = _story(setting, end, mode=mode, started_from=started_from, seconds=time.perf_counter() - begun)
        metrics, address = {}, None
        if process.is_main:
            write_models(setting.out, story, best=end.best, last=end.last)
            metrics = write_report(setting.out, story, plot=plot)
            if push_to_hub is not None:
                address = end.best.push_to_hub(push_to_hub, layout=layout)
        process.wait_for_all()
    return FinetuneResult(end.best.eval(), setting.out, metrics, address)


def _opened(model: ImageClassifier | str | PathLike[str], mode: str, *, has_teacher: bool) -> ImageClassifier:
    """The model, for which the mode makes sense."""
    if isinstance(model, (str, PathLike)):
        model = from_pretrained(model)
    if not isinstance(model, ImageClassifier):
        raise ConfigError(f"a {type(model).__name__} is no model of this package; deit_models.train takes any module")
    first_trained_layer(mode, model)
    if mode == "head" and has_teacher:
        raise ConfigError("mode='head' learns from the labels alone; with a teacher use 'last-0', 'last-N' or 'full'")
    return model


def _settled(
    recipe: Recipe | str | None, model: ImageClassifier, records: ImageRecords, *, has_teacher: bool
) -> Recipe:
    """The recipe, chosen if none is given; without a teacher, both heads of a distilled model learn."""
    if recipe is None:
        return recipe_for(records.name, model, images=len(records), teacher=has_teacher)
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    return recipe if recipe.distillation != "none" else replace(recipe, label_heads="both")


def _description_of(model: ImageClassifier) -> str:
    """What a model is, for readers elsewhere: not where it lay on this machine."""
    origin = model.origin
    if origin is None:
        return type(model).__name__
    place = f"{origin.source}, " if origin.revision is not None else ""
    return f"{place}{origin.name}" + (f" trained on {origin.dataset}" if origin.dataset else "")


def _story(setting: Setting, end: End, *, mode: str, started_from: str, seconds: float) -> Story:
    return Story(
        started_from=started_from,
        mode=mode,
        recipe=setting.recipe,
        data=setting.records.name,
        train_images=end.train_images,
        split=end.split,
        scored=end.scored,
        seconds=seconds,
        details=end.details,
        curve=end.curve,
    )
