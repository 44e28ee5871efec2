"""What classification gives, and how it is written down: text, JSON lines or CSV. Needs no torch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TextIO

from ..errors import ConfigError
from ..predict import ImageResult

_COLUMNS = ["file", "rank", "label", "index", "probability", "error"]


class Summary(NamedTuple):
    """How a run over files went."""

    classified: int
    failed: tuple[ImageResult, ...]


def write_results(
    results: Iterable[ImageResult],
    stream: TextIO,
    *,
    format: Literal["text", "jsonl", "csv"],  # noqa: A002
    header: bool = True,
) -> Summary:
    """Write results as they come, and count them.

    "text" gives a file's name and then a line a prediction, and leaves out files that failed; "jsonl" a line {"file",
    "predictions": [{"label", "probability", "index"}]} or {"file", "error"} an image; "csv" a line a prediction, with
    the columns file, rank (from 1), label, index, probability, error, after a line with their names
    unless `header` is off.
    Raises: ConfigError: another format.
    """
    if format not in ("text", "jsonl", "csv"):
        raise ConfigError(f"format={format!r}; expected 'text', 'jsonl' or 'csv'")
    table = csv.writer(stream, lineterminator="\n") if format == "csv" else None
    if table is not None and header:
        table.writerow(_COLUMNS)
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


class Written(NamedTuple):
    """What an earlier run wrote: the names of its files, as `written_name` gives them, and how it went so far."""

    names: frozenset[str]
    summary: Summary


def resume_results(path: Path, *, format: Literal["text", "jsonl", "csv"]) -> Written:  # noqa: A002
    """Read the results of an interrupted run, and cut off in place what it did not finish writing.

    Of a CSV file the last image is always cut off, since nothing says how many lines it was to have.
    Raises: ConfigError: "text", which cannot be read back; a file that holds something else. OSError: no such file.
    """
    if format not in ("jsonl", "csv"):
        raise ConfigError(f"format={format!r} cannot be resumed; use 'jsonl' or 'csv' from the start")
    names: set[str] = set()
    failed: list[ImageResult] = []
    end = 0
    begins = b'{"file": ' if format == "jsonl" else f"{','.join(_COLUMNS)}\n".encode()
    with path.open("rb") as stream:
        found = stream.read(len(begins))
        if not begins.startswith(found):  # a torn beginning is a beginning; anything else is not ours to cut
            raise ConfigError(f"{path} holds other things than results as {format}; choose another file")
        stream.seek(0)
        for name, error, end in _records(stream, path) if format == "jsonl" else _groups(stream):  # noqa: B007
            names.add(written_name(name))
            failed += [ImageResult(name, (), error)] if error else []
    os.truncate(path, end)
    return Written(frozenset(names), Summary(len(names) - len(failed), tuple(failed)))


def _records(stream: BinaryIO, path: Path) -> Iterator[tuple[str, str, int]]:
    """File, error and where its line ends, of each complete line of JSON."""
    end = 0
    for line in stream:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        try:
            row = json.loads(line)
            yield row["file"], row.get("error", ""), end
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} holds other things than results as jsonl; choose another file") from error


def _groups(stream: BinaryIO) -> Iterator[tuple[str, str, int]]:
    """File, error and where its rows end, of each image but the last."""
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for line in stream:
            if line.endswith(b"\n"):  # a torn name would pass for that of another image
                read += len(line)
                yield line.decode("utf-8", "replace")

    rows = csv.reader(lines())
    next(rows, None)  # the header, which was checked
    last: tuple[str, str] | None = None
    end = read  # of all rows up to the present one
    for row in rows:
        if len(row) != len(_COLUMNS):  # torn within quotes
            return
        name, error = row[0], row[-1]
        if last is not None and name != last[0]:
            yield *last, end
        last, end = (name, error), read


def _text(result: ImageResult) -> str:
    if result.error is not None:
        return ""
    predictions = (f"  {100 * p.probability:6.2f} %  {p.label}\n" for p in result.predictions)
    return f"{written_name(result.source)}\n{''.join(predictions)}"


def _record(result: ImageResult) -> dict[str, object]:
    if result.error is not None:
        return {"file": result.source, "error": result.error}
    return {"file": result.source, "predictions": [prediction._asdict() for prediction in result.predictions]}


def _rows(result: ImageResult) -> list[list[object]]:
    file, error = written_name(result.source), written_name(result.error or "")
    if result.error is not None:
        return [[file, "", "", "", "", error]]
    return [[file, rank, p.label, p.index, p.probability, ""] for rank, p in enumerate(result.predictions, start=1)]


def written_name(name: str) -> str:
    """A name as files hold it. A name that is not valid Unicode must not stop the run; JSON escapes it by itself."""
    return name.encode("utf-8", "backslashreplace").decode()
