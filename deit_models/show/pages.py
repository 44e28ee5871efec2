"""The report of a run as one page of HTML; it needs no network, no script and no other file."""

from __future__ import annotations

import base64
import io
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import PIL.Image
import torch
from PIL.Image import Resampling
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from ..data.records import ImageRecords
from ..errors import ConfigError, first_line
from ..files import printable, read_text, write_text
from ..images.transforms import EvalTransform, preprocessing_of
from ..models.layers import ImageClassifier
from ..scoring.metrics import FIGURES, UNSURE, average_precision, calibration, f1_scores, wilson_interval
from ..scoring.outcomes import Evaluation, Outcomes
from .charts import confusion_matrix, counts_among, line_chart, reliability_diagram
from .heat_maps import heat_maps
from .pictures import overlay, view

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
SET_NAMES = {"val": "validation images", "test": "test images"}
_RESAMPLES, _MOST_CELLS = 200, 100_000  # sets of a bootstrap; with more labels to draw it would take minutes
_WHOLE_MATRIX, _PART_OF_MATRIX, _PAIRS = 30, 20, 20
_MISTAKES, _SIDE, _AT_ONCE = 24, 192, 8
_PRINTED = 200  # rows of a table on paper: a thousand classes would be 25 sheets

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Contents of a page.

    Attributes:
        title: stands above it.
        facts: what was trained or measured on what, by name.
        scored: outcomes by the set's short name, see `SET_NAMES`; the last one is shown class by class.
        costs: time and hardware, see `costs_of`.
        notes: sentences below the facts.
        thresholds: of several labels an image.
        curve: rows of a log, by epoch or by penalty.
        model: draws the heat maps of the mistakes; None: no heat maps.
        transform: its input; None: the pictures are whole images, and there are no heat maps.
    """

    title: str
    facts: Mapping[str, str]
    scored: Mapping[str, tuple[ImageRecords, Outcomes]]
    costs: Mapping[str, str]
    notes: Sequence[str] = ()
    thresholds: Sequence[float] | None = None
    curve: Sequence[Mapping[str, Any]] = ()
    model: nn.Module | None = None
    transform: EvalTransform | None = None


def add_page(folder: Path, report: Callable[[], Report]) -> None:
    """Write report.html into the folder of a finished run, which must not fail for it: a problem is a log line."""
    _tried(f"{folder / REPORT_NAME} was not written", lambda: write_page(folder / REPORT_NAME, report()))


def _tried(problem: str, make: Callable[[], _T]) -> _T | None:
    try:
        return make()
    except Exception as error:  # noqa: BLE001 a user's Dataset may raise anything, and the long work is done
        logger.warning("%s: %s", problem, first_line(error))
        return None


def weights_in_words(model: nn.Module) -> str:
    """Name and data of a model's weights, without paths of this machine."""
    origin = getattr(model, "origin", None)
    if origin is None:
        return type(model).__name__
    place = f"{origin.source}, " if origin.revision is not None else ""
    return f"{place}{origin.name}" + (f" trained on {origin.dataset}" if origin.dataset else "")


def evaluation_page(
    path: str | PathLike[str], model: nn.Module, *, title: str = "Evaluation", transform: EvalTransform | None = None
) -> Callable[[ImageRecords, Outcomes], None]:
    """A function for `evaluate(..., on_outcomes=...)` that writes a report to the file `path`.

    `title` stands above it; `transform` is the one of the evaluation, by default that of the model's weights. The
    seconds in the report begin now.
    """
    begun = time.perf_counter()

    def write(records: ImageRecords, outcomes: Outcomes) -> None:
        origin, seconds = getattr(model, "origin", None), time.perf_counter() - begun
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        report = Report(
            title=title,
            facts={"model": weights_in_words(model), "data": f"{records.name}, {len(records.classes)} classes"},
            scored={"images": (records, outcomes)},
            costs=costs_of(device, seconds, speed=len(records) / max(seconds, 1e-9)),
            thresholds=None if origin is None else origin.thresholds,
            model=model,
            transform=transform or EvalTransform(preprocessing_of(model)),
        )
        write_page(Path(path), report)

    return write


def costs_of(device: torch.device, seconds: float, *, speed: float) -> dict[str, str]:
    """Time and hardware for a report; `speed` in images a second."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} ({name}), {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "software": f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        "time": f"{seconds:,.1f} s",
        "speed": f"{speed:,.1f} images a second",
    }


def write_page(path: Path, report: Report) -> None:
    """Write a report. Raises: SaveError: no space or no permission."""
    from jinja2 import Environment, StrictUndefined  # torch needs it, too

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["name"] = printable
    template = environment.from_string(read_text(Path(__file__).with_name(REPORT_NAME)))
    scored = {key: (records, outcomes) for key, (records, outcomes) in report.scored.items() if len(outcomes.index)}
    context: dict[str, Any] = {"title": report.title, "facts": report.facts, "notes": report.notes}
    context |= {"cards": [], "written": time.strftime("Written by deit-models on %Y-%m-%d at %H:%M UTC", time.gmtime())}
    context |= {"costs": report.costs, "curves": _curves(report.curve), "printed": _PRINTED, "resamples": _RESAMPLES}
    context["sets"] = [
        {"key": key, "name": SET_NAMES.get(key, key), "figures": _figures(outcomes, report.thresholds)}
        for key, (_, outcomes) in scored.items()
    ]
    context["names"] = FIGURES | {"loss": "loss", "images": "images", "skipped": "unreadable images"}
    if scored:
        last, (records, outcomes) = context["sets"][-1], [*scored.values()][-1]
        context |= _details(records, outcomes, report)
        main = [name for name in ("map", "top1", "balanced_accuracy", "macro_f1") if name in last["figures"]][:2]
        context["cards"] = [{"name": f"{FIGURES[name]}, {last['name']}", **last["figures"][name]} for name in main]
        error, told = context["calibration"]["error"], "mean distance of a probability from the share that is right"
        context["cards"].append({"name": "calibration error", "value": error, "told": told, "ends": ""})
    write_text(path, template.render(context))


def _figures(outcomes: Outcomes, thresholds: Sequence[float] | None) -> dict[str, dict[str, str]]:
    """Each figure as text, with its 95 % interval."""
    found, draws = outcomes.evaluation(thresholds), _resampled(outcomes, thresholds)
    shares = {"top1": outcomes.right(), "top5": outcomes.in_top5}
    figures = {}
    for name in FIGURES:
        value, ends, method = getattr(found, name), "", ""
        if value is None:
            continue
        if name in shares and found.images:
            low, high = wilson_interval(shares[name].sum(), torch.tensor(found.images))
            ends, method = f"{100 * float(low):.2f} to {100 * float(high):.2f}", "Wilson"
        elif draws:
            every = torch.tensor([getattr(draw, name) for draw in draws], dtype=torch.double)
            low, high = every.quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
            ends, method = f"{float(low):.2f} to {float(high):.2f}", "bootstrap"
        figures[name] = {"value": f"{value:.2f} %", "ends": ends, "method": method}
    counts = {"loss": f"{found.loss:.4f}", "images": f"{found.images:,}", "skipped": f"{found.skipped:,}"}
    return figures | {name: {"value": text, "ends": "", "method": ""} for name, text in counts.items()}


def _resampled(outcomes: Outcomes, thresholds: Sequence[float] | None) -> list[Evaluation]:
    """Evaluations of as many images, drawn with replacement; none where that would take long."""
    count, generator = len(outcomes.index), torch.Generator().manual_seed(0)
    if not count or outcomes.label.numel() > _MOST_CELLS:
        return []
    names = ["index", "label", "predicted", "probability", "in_top5", *["scores"] * (outcomes.scores is not None)]
    return [
        replace(outcomes, heads={}, **{name: getattr(outcomes, name)[drawn] for name in names}).evaluation(thresholds)
        for drawn in torch.randint(count, (_RESAMPLES, count), generator=generator)
    ]


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss and accuracy by epoch, or by the penalty of a head on features."""
    if not rows:
        return []
    by_penalty = "penalty" in rows[0]
    x = "L2 penalty" if by_penalty else "epoch"
    accuracy = next((name for name in FIGURES if any(name in row for row in rows)), "top1")
    loss = {"validation": "loss"} if by_penalty else {"training": "loss", "validation": "val_loss"}
    charts = []
    for title, unit, keys in (
        ("loss", "", loss),
        (FIGURES[accuracy], " (%)", {"validation": accuracy, "validation, averaged weights": f"ema_{accuracy}"}),
    ):
        lines = {
            name: [(row["penalty"] if by_penalty else row["epoch"] + 1, row[key]) for row in rows if key in row]
            for name, key in keys.items()
        }
        charts.append(line_chart(lines, title=title, x=x, y=title + unit, log_x=by_penalty))
    return charts


def _details(records: ImageRecords, outcomes: Outcomes, report: Report) -> dict[str, Any]:
    """Confusion, classes, mistakes and calibration of one set."""
    classes = records.classes
    found: dict[str, Any] = {"several": outcomes.scores is not None, "pairs": [], "matrix": None}
    found |= {"wrong": f"{int((~outcomes.right()).sum()):,}", "calibration": _calibration(outcomes)}
    pairs = _pairs(outcomes) if outcomes.scores is None else []
    if outcomes.scores is None:
        chosen = list(range(len(classes)))
        if len(classes) > _WHOLE_MATRIX:  # those that are most often confused with each other
            chosen = sorted([*dict.fromkeys(number for pair in pairs for number in pair[:2])][:_PART_OF_MATRIX])
        totals = torch.bincount(outcomes.label, minlength=len(classes))
        numbers = torch.tensor(chosen, dtype=torch.int64)
        counts = counts_among(outcomes, numbers, len(classes))
        found["matrix"] = confusion_matrix([classes[number] for number in chosen], counts, totals[numbers])
        found |= {"in_matrix": len(chosen), "of": len(classes)}
        found["pairs"] = [
            {"label": classes[label], "predicted": classes[predicted], "images": count}
            | {"share": f"{100 * count / int(totals[label]):.1f}"}
            for label, predicted, count in pairs[: _PAIRS if len(classes) > _WHOLE_MATRIX else _PAIRS // 2]
        ]
    return found | _classes(classes, outcomes, report.thresholds, pairs) | _mistakes(records, outcomes, report)


def _pairs(outcomes: Outcomes) -> list[tuple[int, int, int]]:
    """Class, other class and the number of images for which it was taken, the most frequent first."""
    wrong = outcomes.predicted != outcomes.label
    counts = Counter(zip(outcomes.label[wrong].tolist(), outcomes.predicted[wrong].tolist(), strict=True))
    return [(label, predicted, count) for (label, predicted), count in counts.most_common()]


def _calibration(outcomes: Outcomes) -> dict[str, str]:
    probability, right, unit = outcomes.probability, outcomes.right(), "images"
    told = "The probability of the predicted class is {:.2f} % on average; {:.2f} % of the predictions are right."
    if outcomes.scores is not None:
        probability, right, unit = outcomes.scores.flatten(), outcomes.label.flatten(), "pairs of an image and a label"
        told = "Every label of every image counts. Its probability is {:.2f} % on average; {:.2f} % of them are true."
    found = calibration(probability, right)
    told = told.format(100 * float(probability.double().mean()), 100 * float(right.double().mean()))
    chart = reliability_diagram(found, unit=unit)
    return {"told": told, "chart": chart, "error": f"{found.error:.2f} %", "unit": unit}


def _classes(
    classes: Sequence[str],
    outcomes: Outcomes,
    thresholds: Sequence[float] | None,
    pairs: Sequence[tuple[int, int, int]],
) -> dict[str, Any]:
    """Rows of the table of classes, the weakest first, without those that neither occur nor are predicted.

    `pairs` are those of `_pairs`, none of several labels an image.
    """
    images, right, predicted = outcomes.by_class(len(classes), thresholds)
    recall, (low, high), several = right / images, wilson_interval(right, images), outcomes.scores is not None
    columns = {"images": images, "recall" if several else "accuracy": recall, "precision": right / predicted}
    columns |= {"F1": f1_scores(right, images, predicted), "predicted": predicted}
    if outcomes.scores is not None:
        columns |= {"average precision": average_precision(outcomes.scores, outcomes.label)}
        columns |= {"threshold": torch.tensor(thresholds or [UNSURE] * len(classes), dtype=torch.double)}
    # the last of a label stays: the most frequent
    others = {label: f"{classes[other]} ({count})" for label, other, count in reversed(pairs)}
    rows = []
    for number in recall.nan_to_num(nan=2).argsort(stable=True).tolist():
        if images[number] or predicted[number]:
            cells = [_cell(column[number]) for column in columns.values()]
            if images[number]:
                cells[1]["told"] = f"{100 * float(low[number]):.0f} to {100 * float(high[number]):.0f}"
            rows.append({"name": classes[number], "cells": cells, "other": others.get(number, "")})
    heads = ["class", *columns, *([] if several else ["most often taken for"])]
    return {"classes": rows, "columns": heads, "absent": len(classes) - len(rows)}


def _cell(value: Tensor) -> dict[str, str]:
    """A number or a share, to read and, exactly, to sort by; empty if it is no number."""
    text = f"{100 * float(value):.1f} %" if value.is_floating_point() else f"{value:,}"
    known = not value.isnan()
    return {"value": f"{value.item():.6g}" if known else "", "text": text if known else "", "told": ""}


def _mistakes(records: ImageRecords, outcomes: Outcomes, report: Report) -> dict[str, Any]:
    """The mistakes with the highest loss, with pictures of what the model got, and its heat maps for its answers."""
    worst, classes, found = outcomes.worst(_MISTAKES), records.classes, []
    index, predicted = outcomes.index[worst].tolist(), outcomes.predicted[worst].tolist()
    seen = [
        _tried(f"no picture of {records.describe(number)}", partial(_seen, records, number, report.transform))
        for number in index
    ]
    maps, told = _tried("no heat maps", partial(_heat_maps, report.model, seen, predicted)) or ({}, "")
    for place, at in enumerate(worst):
        label, pictured, heat = outcomes.label[at], seen[place], maps.get(place)
        numbers = [int(label)] if outcomes.scores is None else label.nonzero()[:, 0].tolist()
        labels = ", ".join(classes[number] for number in numbers[:4]) or "no label"
        one = {"label": labels, "predicted": classes[predicted[place]], "key": records.key(index[place])}
        one |= {"probability": f"{100 * float(outcomes.probability[at]):.1f} %"}
        one |= {"picture": pictured and _data_uri(pictured[0]), "heat": heat and _data_uri(heat)}
        found.append(one | {"alt": f"Image of {printable(labels)}"})
    return {"mistakes": found, "maps": maps, "maps_note": told}


def _seen(records: ImageRecords, index: int, transform: EvalTransform | None) -> tuple[PIL.Image.Image, Tensor | None]:
    """An image as a small picture and as the model's input; without `transform` the whole image alone."""
    image = records[index][0]
    if transform is not None and len(transform.preprocessing.mean) in (1, 3):
        picture = view(transform, image)
    else:
        picture = (TF.to_pil_image(image[:1]) if isinstance(image, Tensor) else image).convert("RGB")
    width, height = (max(round(side * _SIDE / max(picture.size)), 1) for side in picture.size)
    picture = picture.resize((width, height), Resampling.BICUBIC)
    return picture, None if transform is None else transform(image)


def _heat_maps(
    model: nn.Module | None, seen: Sequence[tuple[PIL.Image.Image, Tensor | None] | None], predicted: Sequence[int]
) -> tuple[dict[int, PIL.Image.Image], str]:
    """Overlays by place in the list, of those images that could be read; and a sentence."""
    known = [(place, *one) for place, one in enumerate(seen) if one is not None and one[1] is not None]
    maps: dict[int, PIL.Image.Image] = {}
    if model is None or not known:
        return maps, ""
    for start in range(0, len(known), _AT_ONCE):
        places, pictures, images = zip(*known[start : start + _AT_ONCE], strict=True)
        target = [predicted[place] for place in places]
        try:
            heats = heat_maps(cast(ImageClassifier, model), torch.stack(images), method="gradient", target=target)
        except ConfigError as error:
            return {}, f"There are no heat maps: {first_line(error)}."
        maps |= {place: overlay(*pair) for place, *pair in zip(places, pictures, heats, strict=True)}
    return maps, "Beside each image: the parts that speak for the prediction, from dark (cold) to yellow (hot)."


def _data_uri(picture: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
