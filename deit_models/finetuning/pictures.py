"""Pictures of a fine-tuning: how it came about, which classes are taken for which, the worst mistakes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ImageError
from ..hub.fetch import atomic_write
from ..training.plots import find_matplotlib, plot_curves
from ..training.records import ImageRecords
from .outcomes import Outcomes

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
    axes.set_title(f"{outcomes.top1:.2f} % of {outcomes.images} images" + _of_many(len(names), len(classes)))
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
