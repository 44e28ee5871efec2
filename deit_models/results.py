"""What classification gives, and how it is written down: text, JSON lines or CSV. Needs no torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TextIO

from .errors import ConfigError


class Prediction(NamedTuple):
    """One class an image may belong to; `index` is its place among the logits."""

    label: str
    probability: float
    index: int  # type: ignore[assignment]  # hides tuple.index


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What was found in one image.

    Attributes:
        source: the path, or a description such as "image 3", counted from 0 in the list that was given.
        predictions: the likeliest classes, likeliest first; empty if the image could not be decoded.
        error: why it could not be decoded, in one line.
    """

    source: str
    predictions: tuple[Prediction, ...]
    error: str | None = None


class Summary(NamedTuple):
    """How a run over files went."""

    classified: int
    failed: tuple[ImageResult, ...]


def write_results(
    results: Iterable[ImageResult],
    stream: TextIO,
    *,
    format: Literal["text", "jsonl", "csv"],  # noqa: A002
) -> Summary:
    """Write results as they come, and count them.

    "text" gives a file's name and then a line a prediction, and leaves out files that failed; "jsonl" a line {"file",
    "predictions": [{"label", "probability", "index"}]} or {"file", "error"} an image; "csv" a line a prediction, with
    the columns file, rank (from 1), label, index, probability, error.
    Raises: ConfigError: another format.
    """
    if format not in ("text", "jsonl", "csv"):
        raise ConfigError(f"format={format!r}; expected 'text', 'jsonl' or 'csv'")
    table = csv.writer(stream, lineterminator="\n") if format == "csv" else None
    if table is not None:
        table.writerow(["file", "rank", "label", "index", "probability", "error"])
    classified, failed = 0, []
    for result in results:
        if table is not None:
            table.writerows(_rows(result))
        else:
            stream.write(_text(result) if format == "text" else json.dumps(_record(result)) + "\n")
        stream.flush()
        classified += result.error is None
        failed += [result] if result.error is not None else []
    return Summary(classified, tuple(failed))


def _text(result: ImageResult) -> str:
    if result.error is not None:
        return ""
    predictions = (f"  {100 * p.probability:6.2f} %  {p.label}\n" for p in result.predictions)
    return f"{_writable(result.source)}\n{''.join(predictions)}"


def _record(result: ImageResult) -> dict[str, object]:
    if result.error is not None:
        return {"file": result.source, "error": result.error}
    return {"file": result.source, "predictions": [prediction._asdict() for prediction in result.predictions]}


def _rows(result: ImageResult) -> list[list[object]]:
    file, error = _writable(result.source), _writable(result.error or "")
    if result.error is not None:
        return [[file, "", "", "", "", error]]
    return [[file, rank, p.label, p.index, p.probability, ""] for rank, p in enumerate(result.predictions, start=1)]


def _writable(name: str) -> str:
    """A name that is not valid Unicode must not stop the run; JSON escapes it by itself."""
    return name.encode("utf-8", "backslashreplace").decode()
