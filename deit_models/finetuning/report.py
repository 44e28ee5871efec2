"""What a finished fine-tuning leaves besides weights: figures, accuracies by class, the card's section."""
# MERGED """Pictures of a fine-tuning: how it came about, which classes are taken for which, the worst mistakes."""

from __future__ import annotations

import csv
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import Layout
from ..data.classes import SPLIT_NAME, Split
from ..data.records import ImageRecords
from ..errors import ConfigError, ImageError
from ..evaluation import Outcomes
from ..files import atomic_write
from ..formats.configs import write_config
from ..models.layers import ImageClassifier
from ..training.recipe import Recipe
from ..training.state import CARD_NAME, find_matplotlib, plot_curves

_MOST_CLASSES = 30
_SHEET = (4, 6)
_LONGEST = 22


class Curve(NamedTuple):
    """Either the rows of a log, or the validation figures of each penalty tried."""

    log: Sequence[dict[str, Any]] = ()
    penalties: Sequence[dict[str, float]] = ()


def draw_curve(curve: Curve, path: Path) -> None:
    """Loss and accuracy by epoch; for a head on features, loss and accuracy by penalty."""
    if curve.log:
        plot_curves({"fine-tuning": curve.log}, path)
        return
    figure = find_matplotlib()(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("loss", "top1"), ("validation loss", "validation top-1 (%)"), strict=True):
        axes.plot([row["penalty"] for row in curve.penalties], [row[key] for row in curve.penalties], marker="o")
        axes.set_xscale("log")
        axes.set_xlabel("L2 penalty")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_confusion(outcomes: Outcomes, classes: Sequence[str], path: Path) -> None:
    """Which class was taken for which, each row in percent of its class; of many classes those with most mistakes."""
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
    axes.set_title(
        f"{outcomes.evaluation().top1:.2f} % of {len(outcomes.index)} images" + _of_many(len(names), len(classes))
    )
    for row, column in ((percents >= 0.5).nonzero()).tolist():
        value = float(percents[row, column])
        color = "white" if value > 50 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, size=7)
    figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    _save(figure, path)


def _of_many(shown: int, classes: int) -> str:
    return "" if shown == classes else f"\nthe {shown} of {classes} classes with most mistakes"


def _confused(outcomes: Outcomes, num_classes: int) -> tuple[Tensor, Tensor]:
    """The classes to show, ascending, and the counts between them; never a table of all, which may have 10^8 cells."""
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
    """The wrong answers that were furthest from the label, each with what it is and what it was taken for."""
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
            axes.imshow(records[int(outcomes.index[place])][0])
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
        # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png", dpi=100)


logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.json"
Part = Literal["val", "test"]
_PEERS: tuple[Layout, ...] = ("timm", "transformers")


@dataclass(frozen=True, slots=True)
class Scored:
    """A set of images, and what the best model said of them."""

    records: ImageRecords
    outcomes: Outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What there is to tell of a run.

    Attributes:
        started_from: the weights it began with.
        mode: which part learned.
        recipe: the settings.
        data: the data set's name.
        train_images: how many.
        split: how the validation images were set aside, if they were.
        scored: the sets the best model was scored on.
        seconds: how long this call took up to here.
        details: figures that belong to a mode, for metrics.json.
        curve: how it came about, for a picture.
    """

    started_from: str
    mode: str
    recipe: Recipe
    data: str
    train_images: int
    split: Split | None
    scored: Mapping[Part, Scored]
    seconds: float
    details: Mapping[str, Any]
    curve: Curve


def write_report(out: Path, story: Story, *, plot: bool) -> dict[str, Any]:
    """Write metrics.json, a table of accuracies by class for each set of images, and with `plot` the pictures.

    Gives what is in metrics.json. Raises: MissingExtraError: matplotlib is not installed. FetchError: no space or no
    permission.
    """
    classes = story.scored["val"].records.classes
    metrics: dict[str, Any] = {
        **{"started_from": story.started_from, "mode": story.mode, "recipe": story.recipe.preset},
        **{"data": story.data, "classes": len(classes), "train_images": story.train_images},
        "split": None if story.split is None else {"seed": story.split.seed, "fraction": story.split.fraction},
        **{part: _figures(scored) for part, scored in story.scored.items()},
        **story.details,
        "seconds": round(story.seconds, 2),
    }
    with atomic_write(out / METRICS_NAME) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for part, scored in story.scored.items():
        _write_classes(out / f"per_class_{part}.csv", scored)
    if plot:
        shown = story.scored.get("test", story.scored["val"])
        draw_curve(story.curve, out / "curves.png")
        draw_confusion(shown.outcomes, classes, out / "confusion.png")
        draw_mistakes(shown.outcomes, shown.records, out / "mistakes.png")
    return metrics


def _figures(scored: Scored) -> dict[str, Any]:
    found = scored.outcomes.evaluation()
    there, right = scored.outcomes.by_class(len(scored.records.classes))
    met = there > 0
    return {
        **{"top1": round(found.top1, 4), "top5": round(found.top5, 4), "loss": round(found.loss, 6)},
        "mean_class_accuracy": round(100 * float((right[met] / there[met]).double().mean()), 4) if met.any() else 0.0,
        **{"images": found.images, "unreadable": found.skipped},
    }


def _write_classes(path: Path, scored: Scored) -> None:
    there, right = scored.outcomes.by_class(len(scored.records.classes))
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("class", "images", "correct", "accuracy"))
        for name, images, correct in zip(scored.records.classes, there.tolist(), right.tolist(), strict=True):
            table.writerow((name, images, correct, f"{100 * correct / images:.2f}" if images else ""))


def write_models(out: Path, story: Story, *, best: ImageClassifier, last: ImageClassifier) -> None:
    """Write each in every layout its family has, with a card that tells the story; their origins change in place.

    The best one goes to out/best, out/timm/best and out/transformers/best, the last one to out/model and so on.
    Raises: FetchError: no space or no permission.
    """
    scored = story.scored.get("test", story.scored["val"]).outcomes.evaluation()
    notes = _notes(story)
    if last is not best:
        _describe(last, story, f"{notes}\n\nThese are the last weights; the figures are those of the best epoch's.")
        _write_layouts(last, out, "model")
    _describe(best, story, notes, top1=round(scored.top1, 2), top5=round(scored.top5, 2))
    _write_layouts(best, out, "best")
    if last is best:
        _write_layouts(best, out, "model")


def _describe(
    model: ImageClassifier, story: Story, notes: str, *, top1: float | None = None, top5: float | None = None
) -> None:
    if model.origin is not None:
        model.origin = model.origin.trained(story.data, notes=notes, top1=top1, top5=top5)


def _write_layouts(model: ImageClassifier, out: Path, name: str) -> None:
    layouts: list[tuple[Layout, Path]] = [("native", out / name), *((peer, out / peer / name) for peer in _PEERS)]
    for layout, folder in layouts:
        try:
            write_config(model, layout)
        except ConfigError as error:
            if layout == "native":
                raise
            logger.info("not written for %s: %s", layout, error)
            continue
        # the card of an earlier epoch or call, which save_pretrained would keep, tells that one's figures
        (folder / CARD_NAME).unlink(missing_ok=True)
        model.save_pretrained(folder, layout=layout)


def _notes(story: Story) -> str:
    """The section of the card, in Markdown."""
    recipe, counts = story.recipe, {part: len(scored.records) for part, scored in story.scored.items()}
    aside = "" if story.split is None else f" (set aside by class with seed {story.split.seed}, {SPLIT_NAME})"
    tested = f", {counts['test']} for testing" if "test" in counts else ""
    rows = {
        "started from": story.started_from,
        "data": f"{story.data}, {len(story.scored['val'].records.classes)} classes: {story.train_images} images for "
        f"training, {counts['val']} for validation{aside}{tested}",
        "what learned": story.mode,
        "settings": _settings(story.mode, recipe, story.details),
    }
    for part, scored in story.scored.items():
        figures = _figures(scored)
        rows[f"on the {'validation' if part == 'val' else 'test'} images"] = (
            f"{figures['top1']:.2f} % top-1, {figures['top5']:.2f} % top-5, {figures['mean_class_accuracy']:.2f} % "
            f"as the mean over classes; {figures['images']} images"
        )
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    chosen = "The validation images also chose these weights, which flatters their figure."
    return "\n".join(["## Fine-tuning", "", "| | |", "| --- | --- |", *lines, "", chosen])


def _settings(mode: str, recipe: Recipe, details: Mapping[str, Any]) -> str:
    if mode == "head":
        return f"logistic regression on the backbone's features, L2 penalty {details['penalty']:g}"
    names = ("epochs", "batch_size", "optimizer", "weight_decay", "layer_decay", "augment", "mixup", "cutmix", "seed")
    parts = [f"{name} {getattr(recipe, name)}" for name in names]
    return f"recipe {recipe.preset}: learning rate {recipe.peak_lr:g}, {', '.join(parts)}; the rest in recipe.toml"
