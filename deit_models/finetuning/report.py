"""The report of a finished fine-tuning: models with cards, figures, accuracies by class, pictures."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import Layout
from ..data.records import ImageRecords
from ..data.split import SPLIT_NAME, Split
from ..errors import ConfigError, ImageError
from ..files import atomic_write, csv_line, markdown, write_json, write_text
from ..formats.layouts import CARD_NAME
from ..models.layers import ImageClassifier
from ..scoring.evaluation import Evaluation, Outcomes
from ..scoring.metrics import FIGURES, UNSURE, average_precision, f1_scores, in_words
from ..training.recipe import Recipe
from ..training.state import find_matplotlib, plot_curves

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.json"
SetOutcomes = dict[Literal["val", "test"], tuple[ImageRecords, Outcomes]]
"""Sets of images that a model was scored on, with the outcomes."""
_PEERS: tuple[Layout, ...] = ("timm", "transformers")
_MOST_CLASSES = 30
_SHEET = (4, 6)
_LONGEST = 22


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
    """Write models, metrics.json, accuracies by class and, with `plot`, pictures; returns the contents of metrics.json.

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
    if plot:
        records, outcomes = learned.scored.get("test", learned.scored["val"])
        draw_curve(learned.curve, out / "curves.png")
        if outcomes.scores is not None:
            logger.warning("several labels an image have no confusion matrix; see per_class_*.csv in %s", out)
            return metrics
        draw_confusion(outcomes, classes, out / "confusion.png")
        draw_mistakes(outcomes, records, out / "mistakes.png")
    return metrics


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
    split, sets = metrics["split"], {part: metrics[part] for part in ("val", "test") if part in metrics}
    counts = {part: found["images"] + found["unreadable"] for part, found in sets.items()}
    aside = "" if split is None else f" (set aside by class with seed {split['seed']}, {SPLIT_NAME})"
    tested = f", {counts['test']} for testing" if "test" in counts else ""
    data = markdown(metrics["data"])
    rows = {
        "started from": markdown(metrics["started_from"]),
        "data": f"{data}, {metrics['classes']} classes: {metrics['train_images']} images for training, "
        f"{counts['val']} for validation{aside}{tested}",
        "what learned": metrics["mode"],
        "settings": _settings(metrics, recipe),
    }
    for part, found in sets.items():
        rows[f"on the {'validation' if part == 'val' else 'test'} images"] = (
            f"{in_words(found)}; {found['images']} images"
        )
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    chosen = "The validation images also chose these weights, which flatters their figure."
    if (fitted := metrics.get("fitted_images", 0)) > metrics["train_images"]:
        chosen = (
            "The validation images chose the penalty, for a head fitted to the training images: their figures are that "
            f"head's. The head was then fitted again, with that penalty, to all {fitted} images, and has those weights."
        )
    if "map" in metrics["val"]:
        chosen += " They chose the threshold of each label, too, by its F1; the thresholds are in config.json."
    return "\n".join(["## Fine-tuning", "", "| | |", "| --- | --- |", *lines, "", chosen])


def _settings(metrics: Mapping[str, Any], recipe: Recipe) -> str:
    balance = ", ".join(
        f"{name} balanced" for name in ("class_weights", "sampling") if getattr(recipe, name) == "balanced"
    )
    balance = f", {balance}" if balance else ""
    if metrics["mode"] == "head":
        return f"logistic regression on the backbone's features, L2 penalty {metrics['penalty']:g}{balance}"
    names = ("epochs", "batch_size", "optimizer", "weight_decay", "layer_decay", "augment", "mixup", "cutmix", "seed")
    parts = [f"{name} {getattr(recipe, name)}" for name in names]
    rest = f"{', '.join(parts)}{balance}; the rest in recipe.toml"
    return f"recipe {recipe.preset}: learning rate {recipe.peak_lr:g}, {rest}"


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss and accuracy by epoch from rows of a log, or by penalty from those of a head on features."""
    if not rows or "penalty" not in rows[0]:
        plot_curves({"fine-tuning": rows}, path)
        return
    figure = find_matplotlib()(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    name = next(name for name in FIGURES if name in rows[0])
    accuracy = (name, f"validation {FIGURES[name]} (%)")
    for axes, (key, label) in zip(panels, (("loss", "validation loss"), accuracy), strict=True):
        axes.plot([row["penalty"] for row in rows], [row[key] for row in rows], marker="o")
        axes.set_xscale("log")
        axes.set_xlabel("L2 penalty")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_confusion(outcomes: Outcomes, classes: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, each row in percent of its class; of many classes, those with the most mistakes."""
    chosen, counts = _confused(outcomes, len(classes))
    totals = torch.bincount(outcomes.label, minlength=len(classes))[chosen].clamp(min=1)
    percents = 100 * counts.double() / totals[:, None]
    names = [_short(classes[number]) for number in chosen.tolist()]
    side = max(4.0, 0.36 * len(names) + 2)
    figure = find_matplotlib()(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percents.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")
    of_many = f"\nthe {len(names)} of {len(classes)} classes with most mistakes" if len(names) < len(classes) else ""
    axes.set_title(f"{outcomes.evaluation().top1:.2f} % of {len(outcomes.index)} images{of_many}")
    for row, column in (percents >= 0.5).nonzero().tolist():
        value = float(percents[row, column])
        color = "white" if value > 50 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, size=7)
    figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    _save(figure, path)


def _confused(outcomes: Outcomes, num_classes: int) -> tuple[Tensor, Tensor]:
    """Classes to show, ascending, and the counts between them, without a table of all, which may have 10^8 cells."""
    wrong = outcomes.predicted != outcomes.label
    mistakes = torch.bincount(outcomes.label[wrong], minlength=num_classes)
    mistakes += torch.bincount(outcomes.predicted[wrong], minlength=num_classes)
    chosen = mistakes.argsort(descending=True, stable=True)[:_MOST_CLASSES].sort().values
    place = torch.full((num_classes,), -1)
    place[chosen] = torch.arange(len(chosen))
    rows, columns = place[outcomes.label], place[outcomes.predicted]
    both = (rows >= 0) & (columns >= 0)
    cells = torch.bincount(rows[both] * len(chosen) + columns[both], minlength=len(chosen) ** 2)
    return chosen, cells.reshape(len(chosen), len(chosen))


def draw_mistakes(outcomes: Outcomes, records: ImageRecords, path: Path) -> None:
    """Draw the mistakes with the highest loss, each with its class and the predicted one."""
    rows, columns = _SHEET
    worst = outcomes.worst(rows * columns)
    rows = max(-(-len(worst) // columns), 1)
    figure = find_matplotlib()(figsize=(2.1 * columns, 2.6 * rows), layout="constrained")
    figure.suptitle("The worst mistakes" if worst else "No mistakes")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, place in zip(panels, worst, strict=False):  # the last row may have room left
        try:
            image = records[int(outcomes.index[place])][0]
            axes.imshow(image[0] if isinstance(image, Tensor) else image)
        except (ImageError, OSError):  # it was there a moment ago; the others are still worth a look
            axes.text(0.5, 0.5, "cannot be read", ha="center")
        label, predicted = (_short(records.classes[int(of[place])]) for of in (outcomes.label, outcomes.predicted))
        probability = 100 * float(outcomes.probability[place])
        axes.set_title(f"{label}\ntaken for {predicted}\n{probability:.0f} %", size=8, parse_math=False)
    _save(figure, path)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png", dpi=100)
