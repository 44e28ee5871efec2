"""Charts of figures: as inline SVG, which needs no other package and follows a page's colours, and as PNG files.

The SVG charts use the classes and colours that `report.html` defines. Each has a text for those who do not see it.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.records import ImageRecords
from ..errors import ImageError, MissingExtraError
from ..files import atomic_write, printable
from ..scoring.metrics import FIGURES, Calibration
from ..scoring.outcomes import Outcomes

_WIDTH, _HEIGHT = 440, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 34, 46  # margins, for the labels of the axes and the names of the lines
_FEW = 30  # up to so many points of a line are marked
_MOST_CLASSES = 30
_SHEET = (4, 6)
_LONGEST = 22

Points = Sequence[tuple[float, float]]


def line_chart(lines: Mapping[str, Points], *, title: str, x: str, y: str, log_x: bool = False) -> str:
    """An SVG of up to three lines; points that are no numbers are left out.

    Args:
        lines: points by the name of the line.
        title: the text for those who do not see the chart begins with it.
        x: label of the axis, with its unit.
        y: likewise.
        log_x: whether the x axis is logarithmic; it needs numbers above 0.
    """
    known = {name: [at for at in points if all(map(math.isfinite, at))] for name, points in lines.items()}
    known = {name: points for name, points in known.items() if points}
    if not known:
        return f"<p>{html.escape(title)}: no figures.</p>"
    every = [at for points in known.values() for at in points]
    place = math.log10 if log_x else float
    low, high = _span([place(at) for at, _ in every])
    rows = _ticks(min(at for _, at in every), max(at for _, at in every))

    def across(value: float) -> float:
        return _LEFT + (place(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - rows[0]) / (rows[-1] - rows[0]) * (_HEIGHT - _TOP - _BOTTOM)

    whole = not log_x and all(float(at).is_integer() for at, _ in every)
    columns = sorted({at for at, _ in every}) if log_x else [at for at in _ticks(low, high) if low <= at <= high]
    columns = [at for at in columns if not whole or float(at).is_integer()]
    parts = _grid({across(at): f"{at:g}" for at in columns}, {down(at): f"{at:g}" for at in rows}, x, y)
    for number, (name, points) in enumerate(known.items()):
        path = " ".join(f"{across(at):.1f},{down(value):.1f}" for at, value in points)
        marks = [
            f'<circle cx="{across(at):.1f}" cy="{down(value):.1f}" r="3.5"><title>{at:g}: {value:g}</title></circle>'
            for at, value in (points if len(points) <= _FEW else [])
        ]
        left = _LEFT + number * (_WIDTH - _LEFT - _RIGHT) / max(len(known), 2)
        parts.append(f'<g class="line{number}"><polyline points="{path}"/>{"".join(marks)}')
        parts.append(f'<line x1="{left:.0f}" x2="{left + 22:.0f}" y1="14" y2="14"/></g>')
        parts.append(f'<text x="{left + 28:.0f}" y="18">{html.escape(name)}</text>')
    ends = (f"{name} from {points[0][1]:g} to {points[-1][1]:g}" for name, points in known.items())
    return _svg(_WIDTH, _HEIGHT, f"{title}, by {x}: {'; '.join(ends)}.", parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about five."""
    low, high = _span([low, high])
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if (high - low) / step <= 5)
    return [float(f"{step * n:.6g}") for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _grid(columns: Mapping[float, str], rows: Mapping[float, str], x: str, y: str) -> list[str]:
    """Grid lines with their numbers, by place, and the labels of both axes."""
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>' for at in rows]
    parts += [f'<text class="end" x="{_LEFT - 6}" y="{at + 4:.1f}">{text}</text>' for at, text in rows.items()]
    parts += [f'<text class="mid" x="{at:.1f}" y="{bottom + 18}">{text}</text>' for at, text in columns.items()]
    parts += [f'<text class="mid" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}">{html.escape(x)}</text>']
    turned = f'transform="translate(13 {(_TOP + bottom) / 2}) rotate(-90)"'
    return [*parts, f'<text class="mid" {turned}>{html.escape(y)}</text>']


def _svg(width: float, height: float, text: str, parts: Sequence[str]) -> str:
    box, told = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"', html.escape(text)
    return f'<svg {box} role="img" aria-label="{told}"><title>{told}</title>{"".join(parts)}</svg>'


def reliability_diagram(found: Calibration, *, unit: str = "images") -> str:
    """An SVG of the share of right predictions by their probability; the lower strip has the numbers of `unit`."""
    right, floor, strip = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, 44
    width, bottom = (right - _LEFT) / len(found.images), floor - strip - 6
    fifths = [part / 5 for part in range(6)]
    rows = {bottom - at * (bottom - 10): f"{100 * at:.0f}" for at in fifths}
    columns = {_LEFT + at * (right - _LEFT): f"{100 * at:.0f}" for at in fifths}
    parts = _grid(columns, rows, "probability of the prediction (%)", "right (%)")
    most = max(int(found.images.max()), 1)
    for number, (count, share) in enumerate(zip(found.images.tolist(), found.right.tolist(), strict=True)):
        if count:
            tall, small, left = share * (bottom - 10), count / most * strip, _LEFT + number * width + 1
            ends = f"{100 * number / len(found.images):.0f} to {100 * (number + 1) / len(found.images):.0f} %"
            bar = f'x="{left:.1f}" width="{width - 2:.1f}"'
            parts.append(f"<g><title>probability {ends}: {count} {unit}, {100 * share:.1f} % right</title>")
            parts.append(f'<rect class="bar" {bar} y="{bottom - tall:.1f}" height="{tall:.1f}"/>')
            parts.append(f'<rect class="count" {bar} y="{floor - small:.1f}" height="{small:.1f}"/></g>')
    parts.append(f'<line class="ideal" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="10"/>')
    text = f"Share of right predictions by their probability; expected calibration error {found.error:.2f} %."
    return _svg(_WIDTH, _HEIGHT, text, parts)


def confusion_matrix(names: Sequence[str], counts: Tensor, totals: Tensor) -> str:
    """An SVG table of classes and predictions, each row in percent of its class.

    Shape: counts (K, K), rows are true classes; totals (K,): images of each class, also those taken for others.
    """
    short, side = [html.escape(shortened(name)) for name in names], min(max(560 // max(len(names), 1), 30), 64)
    whole = [html.escape(printable(name)) for name in names]
    left = 30 + 7.2 * max((len(shortened(name)) for name in names), default=0)
    end = left + side * len(names)
    parts = [f'<text class="mid" transform="translate(13 {(left + end) / 2}) rotate(-90)">true class</text>']
    parts.append(f'<text class="mid" x="{(left + end) / 2}" y="14">predicted</text>')
    for row, name in enumerate(short):
        at = left + side * (row + 0.5)
        told = f"<title>{whole[row]}</title>{name}"
        parts.append(f'<text class="end" x="{left - 6:.1f}" y="{at + 4:.1f}">{told}</text>')
        parts.append(f'<text transform="translate({at + 4:.1f} {left - 6:.1f}) rotate(-90)">{told}</text>')
    parts.append(f'<rect class="frame" x="{left}" y="{left}" width="{end - left}" height="{end - left}"/>')
    for row, column in counts.nonzero().tolist():
        count = int(counts[row, column])
        share = count / max(int(totals[row]), 1)
        # no half tones between 0.55 and 0.8, on which neither dark nor light numbers can be read
        dark = share > 0.55
        tone = 0.8 + (share - 0.55) * 0.4 if dark else share
        box = f'x="{left + side * column:.1f}" y="{left + side * row:.1f}" width="{side}" height="{side}"'
        parts.append(f"<g><title>{whole[row]}, predicted {whole[column]}: {count} images, {100 * share:.1f} %</title>")
        parts.append(f'<rect class="cell" {box} opacity="{tone:.2f}"/>')
        if share >= 0.005:
            x, y, kind = left + side * (column + 0.5), left + side * (row + 0.5) + 4, " dark" if dark else ""
            parts.append(f'<text class="mid{kind}" x="{x:.1f}" y="{y:.1f}">{100 * share:.0f}</text>')
        parts.append("</g>")
    text = f"Confusion matrix of {len(names)} classes in percent of the true class; the tables have the same figures."
    return _svg(end + 4, end + 4, text, parts)


def _confused(outcomes: Outcomes, num_classes: int) -> tuple[Tensor, Tensor]:
    """Classes to show, ascending, and the counts between them, without a table of all, which may have 10^8 cells."""
    wrong = outcomes.predicted != outcomes.label
    mistakes = torch.bincount(outcomes.label[wrong], minlength=num_classes)
    mistakes += torch.bincount(outcomes.predicted[wrong], minlength=num_classes)
    chosen = mistakes.argsort(descending=True, stable=True)[:_MOST_CLASSES].sort().values
    return chosen, counts_among(outcomes, chosen, num_classes)


def counts_among(outcomes: Outcomes, chosen: Tensor, num_classes: int) -> Tensor:
    """Images of some classes that were taken for one of them: (K,) class numbers -> (K, K), rows are true classes."""
    place = torch.full((num_classes,), -1)
    place[chosen] = torch.arange(len(chosen))
    rows, columns = place[outcomes.label], place[outcomes.predicted]
    both = (rows >= 0) & (columns >= 0)
    cells = torch.bincount(rows[both] * len(chosen) + columns[both], minlength=len(chosen) ** 2)
    return cells.reshape(len(chosen), len(chosen))


def shortened(name: str) -> str:
    """A name of at most 22 characters, without control characters."""
    name = printable(name)
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


# PNG files


def find_matplotlib() -> Any:
    """Matplotlib's Figure class. Raises: MissingExtraError: it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib; pip install 'deit-models[plot]'") from error
    return Figure


def plot_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | PathLike[str], *, title: str = "") -> None:
    """Draw loss and validation accuracy by epoch, or by the penalty of a head on features, a line for each run, as PNG.

    Args:
        runs: name to the rows of its log.jsonl, see `read_log`, or to the validation figures of each penalty.
        path: the file to write; its folder is made.
        title: stands above the picture.

    Raises: MissingExtraError: matplotlib is not installed. SaveError: no space or no permission.
    """
    figure = find_matplotlib()(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    keys = {key for rows in runs.values() for row in rows for key in row}
    by_penalty, accuracy = "penalty" in keys, next((name for name in FIGURES if name in keys), "top1")
    labels = {"loss": "validation loss" if by_penalty else "training loss"}
    labels[accuracy] = f"validation {FIGURES[accuracy]} (%)"
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for name, rows in runs.items():
            points = [(row["penalty"] if by_penalty else row["epoch"] + 1, row[key]) for row in rows if key in row]
            if points:  # a lone point has no line, so few points get markers
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if by_penalty or len(points) < 3 else None)
        if by_penalty:
            axes.set_xscale("log")
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("L2 penalty" if by_penalty else "epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    _save(figure, Path(path), dpi=120)


def draw_confusion(outcomes: Outcomes, classes: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, each row in percent of its class; of many classes, those with the most mistakes."""
    chosen, counts = _confused(outcomes, len(classes))
    totals = torch.bincount(outcomes.label, minlength=len(classes))[chosen].clamp(min=1)
    percents = 100 * counts.double() / totals[:, None]
    names = [shortened(classes[number]) for number in chosen.tolist()]
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
        label, predicted = (shortened(records.classes[int(of[place])]) for of in (outcomes.label, outcomes.predicted))
        probability = 100 * float(outcomes.probability[place])
        axes.set_title(f"{label}\ntaken for {predicted}\n{probability:.0f} %", size=8, parse_math=False)
    _save(figure, path)


def _save(figure: Any, path: Path, *, dpi: int = 100) -> None:
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png", dpi=dpi)
