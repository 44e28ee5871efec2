"""The results of a finished fine-tuning: models with cards, figures, accuracies by class, a report, pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..checkpoint import Layout
from ..data.records import ImageRecords
from ..data.split import SPLIT_NAME, Split
from ..errors import ConfigError
from ..files import csv_line, markdown, write_json, write_text
from ..formats.layouts import CARD_NAME
from ..images.transforms import EvalTransform, preprocessing_of
from ..models.layers import ImageClassifier
from ..recipes.recipe import Recipe
from ..scoring.metrics import FIGURES, UNSURE, average_precision, f1_scores, in_words
from ..scoring.outcomes import Evaluation, Outcomes
from ..show.charts import draw_confusion, draw_mistakes, plot_curves
from ..show.pages import SET_NAMES, Report, add_page, costs_of

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.json"
SetOutcomes = dict[Literal["val", "test"], tuple[ImageRecords, Outcomes]]
"""Sets of images that a model was scored on, with the outcomes."""
_PEERS: tuple[Layout, ...] = ("timm", "transformers")


class Learned(NamedTuple):
    """Result of the training, or of the fit of a head on features.

    Attributes:
        best: model with the best weights.
        last: model with the last weights; perhaps the same object.
        train_images: number of images for training.
        split: how the validation images were set aside; None if they were given.
        scored: outcomes of the best model.
        details: figures of one mode only, for metrics.json.
        curve: rows of the log; in mode "head", validation figures of each penalty tried.
    """

    best: ImageClassifier
    last: ImageClassifier
    train_images: int
    split: Split | None
    scored: SetOutcomes
    details: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]


def write_report(
    out: Path, learned: Learned, *, recipe: Recipe, facts: Mapping[str, Any], seconds: float, plot: bool
) -> dict[str, Any]:
    """Write models, metrics.json, accuracies by class, report.html and, with `plot`, pictures; gives metrics.json.

    The best model goes to best/, timm/best/ and transformers/best/ in `out`, the last one to model/ and so on, with
    cards; the origins of both change in place. `facts` are the first entries of metrics.json: started_from, mode,
    recipe, data, classes and train_images.

    Raises: MissingExtraError: matplotlib is not installed. SaveError: no space or no permission.
    """
    split, classes = learned.split, learned.scored["val"][0].classes
    thresholds = None if learned.best.origin is None else learned.best.origin.thresholds
    metrics: dict[str, Any] = {
        **facts,
        "split": None if split is None else {"seed": split.seed, "fraction": split.fraction},
        **{part: _figures(outcomes.evaluation(thresholds)) for part, (_, outcomes) in learned.scored.items()},
        **learned.details,
        "seconds": round(seconds, 2),
    }
    _write_models(out, learned, metrics, _card_section(metrics, recipe))
    write_json(out / METRICS_NAME, metrics)
    for part, (_, outcomes) in learned.scored.items():
        _write_classes(out / f"per_class_{part}.csv", classes, outcomes, thresholds)
    add_page(out, partial(_report, learned, metrics, recipe, seconds))
    if plot:
        records, outcomes = learned.scored.get("test", learned.scored["val"])
        plot_curves({"fine-tuning": learned.curve}, out / "curves.png")
        if outcomes.scores is not None:
            logger.warning("several labels an image have no confusion matrix; see per_class_*.csv in %s", out)
            return metrics
        draw_confusion(outcomes, classes, out / "confusion.png")
        draw_mistakes(outcomes, records, out / "mistakes.png")
    return metrics


def _report(learned: Learned, metrics: Mapping[str, Any], recipe: Recipe, seconds: float) -> Report:
    best = learned.best
    read = learned.train_images + sum(len(records) for records, _ in learned.scored.values())
    speed = ([*learned.curve] or [{}])[-1].get("images_per_second", read / max(seconds, 1e-9))
    return Report(
        title=f"Fine-tuning on {metrics['data']}",
        facts=_facts(metrics, recipe),
        notes=[_caution(metrics)],
        scored={part: found for part, found in learned.scored.items()},
        costs=costs_of(next(best.parameters()).device, seconds, speed=speed),
        thresholds=None if best.origin is None else best.origin.thresholds,
        curve=learned.curve,
        model=best,
        transform=EvalTransform(preprocessing_of(best)),
    )


def _figures(found: Evaluation) -> dict[str, Any]:
    """Figures of a set, in percent but for the loss."""
    known = ((name, getattr(found, name)) for name in FIGURES)
    figures: dict[str, Any] = {name: round(value, 4) for name, value in known if value is not None}
    return figures | {"loss": round(found.loss, 6), "images": found.images, "unreadable": found.skipped}


def _write_classes(path: Path, classes: Sequence[str], outcomes: Outcomes, thresholds: Sequence[float] | None) -> None:
    """A row for each class; its accuracy is the share of its images that are recognised, which is its recall, too."""
    images, right, predicted = outcomes.by_class(len(classes), thresholds)
    columns: dict[str, list[Any]] = {"class": [*classes], "images": images.tolist(), "correct": right.tolist()}
    columns |= {"accuracy": _percents(right / images), "predicted": predicted.tolist()}
    columns |= {"precision": _percents(right / predicted), "f1": _percents(f1_scores(right, images, predicted))}
    if outcomes.scores is not None:
        columns["average_precision"] = _percents(average_precision(outcomes.scores, outcomes.label))
        columns["threshold"] = [f"{value:.6g}" for value in thresholds or [UNSURE] * len(classes)]
    write_text(path, "".join(map(csv_line, [columns, *zip(*columns.values(), strict=True)])))


def _percents(values: Tensor) -> list[str]:
    """Shares in percent, nothing for those that are no numbers."""
    return ["" if value.isnan() else f"{100 * value:.2f}" for value in values]


def _write_models(out: Path, learned: Learned, metrics: Mapping[str, Any], notes: str) -> None:
    best, last, data = learned.best, learned.last, metrics["data"]
    if last is not best:
        late = f"{notes}\n\nThese are the last weights; the figures are those of the best epoch's."
        _write_layouts(last, out, "model", data=data, notes=late)
    figures = metrics.get("test", metrics["val"])
    known = {"notes": notes} | {name: round(figures[name], 2) for name in ("top1", "top5") if "map" not in figures}
    for name in ("best",) if last is not best else ("best", "model"):
        _write_layouts(best, out, name, data=data, **known)


def _write_layouts(model: ImageClassifier, out: Path, name: str, *, data: str, **known: Any) -> None:
    """Write a model in each layout that its family has, trained on `data`, with what is known of its weights."""
    if model.origin is not None:
        kept = {name: getattr(model.origin, name) for name in ("class_names", "multi_label", "thresholds")}
        model.origin = model.origin.trained(data, **kept, **known)
    folders: list[tuple[Layout, Path]] = [("native", out / name), *((peer, out / peer / name) for peer in _PEERS)]
    for layout, folder in folders:
        # save_pretrained would keep the card of an earlier epoch or call, with its figures
        (folder / CARD_NAME).unlink(missing_ok=True)
        try:
            model.save_pretrained(folder, layout=layout)
        except ConfigError as error:
            if layout == "native":
                raise
            logger.info("not written for %s: %s", layout, error)


def _card_section(metrics: Mapping[str, Any], recipe: Recipe) -> str:
    """Section of the model card, in Markdown."""
    names = {key: markdown(metrics[key]) for key in ("started_from", "data")}
    rows = _facts({**metrics, **names}, recipe)
    for part in SET_NAMES:
        if found := metrics.get(part):
            rows[f"on the {SET_NAMES[part]}"] = f"{in_words(found)}; {found['images']} images"
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["## Fine-tuning", "", "| | |", "| --- | --- |", *lines, "", _caution(metrics)])


def _facts(metrics: Mapping[str, Any], recipe: Recipe) -> dict[str, str]:
    """Weights, data, mode and settings of the run, by name."""
    split = metrics["split"]
    counts = {part: metrics[part]["images"] + metrics[part]["unreadable"] for part in SET_NAMES if part in metrics}
    aside = "" if split is None else f" (set aside by class with seed {split['seed']}, {SPLIT_NAME})"
    tested = f", {counts['test']} for testing" if "test" in counts else ""
    settings = recipe.in_words()
    if metrics["mode"] == "head":
        balance = ", class_weights balanced" * (recipe.class_weights == "balanced")
        settings = f"logistic regression on the backbone's features, L2 penalty {metrics['penalty']:g}{balance}"
    return {
        "started from": metrics["started_from"],
        "data": f"{metrics['data']}, {metrics['classes']} classes: {metrics['train_images']} images for training, "
        f"{counts['val']} for validation{aside}{tested}",
        "what learned": metrics["mode"],
        "settings": settings,
    }


def _caution(metrics: Mapping[str, Any]) -> str:
    """The part that the validation images had in a choice."""
    chosen = "The validation images also chose these weights, which flatters their figure."
    if (fitted := metrics.get("fitted_images", 0)) > metrics["train_images"]:
        chosen = (
            "The validation images chose the penalty, for a head fitted to the training images: their figures are that "
            f"head's. The head was then fitted again, with that penalty, to all {fitted} images, and has those weights."
        )
    if "map" in metrics["val"]:
        chosen += " They chose the threshold of each label, too, by its F1; the thresholds are in config.json."
    return chosen
