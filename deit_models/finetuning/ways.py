"""The two ways to fine-tune: on the training engine, and as a head on cached features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hub.fetch import atomic_write
from ..hub.load import from_pretrained
from ..models.layers import ImageClassifier
from ..training.cache import Cache
from ..training.distributed import Process
from ..training.loading import Watch
from ..training.recipe import Recipe
from ..training.records import ImageRecords
from ..training.run import RECIPE_NAME, train
from ..training.teacher import Teacher, TeacherSpec
from .features import Features, extract_features, linear_heads
from .freezing import first_trained_layer, only_from_layer
from .linear import fit_heads, judge, put_heads
from .outcomes import collect_outcomes
from .pictures import Curve
from .report import Part, Scored
from .split import Split, keep_split, labels_of, parts, stratified_split

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
