"""A whole fine-tuning: from a pretrained model and labelled images to a folder that can be shown and shared."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..hub.load import from_pretrained
from ..models.layers import ImageClassifier, Layout
from ..training.cache import Cache
from ..training.datasets import has_validation
from ..training.distributed import join_processes
from ..training.loading import Watch, default_workers, open_images, plain_watch
from ..training.plots import find_matplotlib
from ..training.recipe import Recipe, recipe_named
from ..training.records import ImageRecords
from ..training.teacher import Teacher, TeacherSpec
from .freezing import first_trained_layer
from .head import adapt_head
from .presets import recipe_for
from .report import Story, write_models, write_report
from .ways import End, Setting, by_features, by_training


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
