"""Predictions as text, bars, JSON lines or CSV: written as they come, read back to resume a run. Needs no torch."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple, TextIO

from tqdm.std import Bar
from tqdm.utils import disp_len, disp_trim

from ..errors import ConfigError
from ..files import csv_cell, csv_line, printable
from .arguments import in_colour

if TYPE_CHECKING:
    from ..predict import ImageResult

Format = Literal["text", "jsonl", "csv"]
COLUMNS = ("file", "rank", "label", "index", "probability", "above_threshold", "error")
_OLD_COLUMNS = tuple(name for name in COLUMNS if name != "above_threshold")
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"
_BAR = 24
"""Longest bar, in columns of the terminal."""


def write_results(
    results: Iterable[ImageResult],
    stream: TextIO,
    *,
    format: Format,  # noqa: A002
    header: bool = True,
) -> list[str]:
    """Write results as they come; returns an error for each image that was not classified.

    "text": the name of a file, then a line for each prediction, with escapes for control characters; failed files are
    left out. Labels above their thresholds, see `ImageResult`, are marked by a star. On a terminal each line has a bar.
    "jsonl": a line for each image, {"file", "predictions": [{"label", "probability", "index"}]} or {"file", "error"};
    with "labels" of a model for several labels an image.
    "csv": a line for each prediction, with the columns file, rank (from 1), label, index, probability, above_threshold
    (1 or 0; empty of a model for one class an image), error, after a line with their names unless `header` is off; an
    apostrophe stands before text that a spreadsheet would compute.
    Raises: ConfigError: another format.
    """
    if format not in ("text", "jsonl", "csv"):
        raise ConfigError(f"format={format!r}; expected 'text', 'jsonl' or 'csv'")
    if format == "csv" and header:
        stream.write(csv_line(COLUMNS))
    look = look_of(stream)
    errors: list[str] = []
    for result in results:
        if format == "csv":
            stream.writelines(map(csv_line, _rows(result)))
        else:
            stream.write(_text(result, stream, look) if format == "text" else json.dumps(_record(result)) + "\n")
        stream.flush()
        errors += [] if result.error is None else [result.error]
    return errors


def join_results(path: Path, kept: Path, parts: Sequence[Path], *, format: Format) -> None:  # noqa: A002
    """Write one file of results from those in `kept`, if there are any, and from parts without header."""
    files = [kept] if kept.exists() and kept.stat().st_size else []
    with path.open("wb") as whole:
        if format == "csv" and not files:
            whole.write(csv_line(COLUMNS).encode())
        for part in (*files, *parts):
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, whole)


def resume_results(path: Path, *, format: Format, whole: bool = False) -> tuple[set[str], list[str]]:  # noqa: A002
    """Read the results of an interrupted run, and cut off its last, incomplete image in place.

    Returns the names of its files, as `written_name` gives them, and its errors. The last image of a CSV file is always
    cut off, since the number of its lines is unknown. Of a `whole` file nothing is.
    Raises: ConfigError: "text", which cannot be read back; a file with other contents, or of an older version with
        fewer columns. OSError: no such file.
    """
    if format not in ("jsonl", "csv"):
        raise ConfigError(f"format={format!r} cannot be resumed; use 'jsonl' or 'csv' from the start")
    names: set[str] = set()
    errors: list[str] = []
    end = 0
    begins = b'{"file": ' if format == "jsonl" else csv_line(COLUMNS).encode()
    with path.open("rb") as stream:
        found = stream.read(len(begins))
        if found.startswith(csv_line(_OLD_COLUMNS).encode()):
            text = "was begun by an older version, without the column above_threshold"
            raise ConfigError(f"{path} {text}; choose another file, or replace it (--overwrite)")
        if not begins.startswith(found):  # a torn beginning is fine; any other content is not ours to cut
            raise ConfigError(f"{path} holds other things than results as {format}; choose another file")
        stream.seek(0)
        try:
            for name, error, end in _records(stream) if format == "jsonl" else _groups(stream, whole=whole):  # noqa: B007
                names.add(written_name(name))
                errors += [error] if error else []
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise ConfigError(f"{path} holds other things than results as {format}; choose another file") from error
    if not whole:
        os.truncate(path, end)
    return names, errors


def _records(stream: BinaryIO) -> Iterator[tuple[str, str, int]]:
    """File, error and end of the line, for each complete line of JSON."""
    end = 0
    for line in stream:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        row = json.loads(line)
        yield row["file"], row.get("error", ""), end


def _groups(stream: BinaryIO, *, whole: bool) -> Iterator[tuple[str, str, int]]:
    """File, error and end of the rows, for each image, unless `whole` but the last."""
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for line in stream:
            if line.endswith(b"\n"):  # a torn name could be the name of another image
                read += len(line)
                yield line.decode("utf-8", "replace")

    rows = csv.reader(lines())
    next(rows, None)  # the header, which was checked
    # a row of another length was torn within quotes
    complete = takewhile(lambda row: len(row) == len(COLUMNS), rows)
    images = ((csv_cell(row[0]), csv_cell(row[-1]), read) for row in complete)
    for record, (following, *_) in pairwise(chain(images, [("", "", 0)] if whole else [])):
        if following != record[0]:
            yield record


class Look(NamedTuple):
    """Properties of the terminal that predictions are drawn on."""

    columns: int
    colour: bool
    blocks: bool


def look_of(stream: TextIO) -> Look | None:
    """Properties of a terminal to draw on; None: plain text, for a file or a pipe.

    NO_COLOR and TERM=dumb leave out colours. FORCE_COLOR draws into a pipe too, unless NO_COLOR is set.
    """
    forced = os.environ.get("FORCE_COLOR") and in_colour() and stream is sys.stdout
    if not stream.isatty() and not forced:
        return None
    blocks = _written(f"{Bar.UTF}…", stream) == f"{Bar.UTF}…"  # a code page of Windows may lack them
    return Look(shutil.get_terminal_size().columns, in_colour(), blocks)


def _written(text: str, stream: TextIO) -> str:
    """Text with escapes for characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _text(result: ImageResult, stream: TextIO, look: Look | None) -> str:
    if result.error is not None:
        return ""
    plain = any(not 0 <= p.probability <= 1 for p in result.predictions)  # values of a regression
    lines = [_written(printable(result.source), stream)]
    for rank, p in enumerate(result.predictions):
        number = f"{p.probability:8.6g}" if plain else f"{100 * p.probability:6.2f} %"
        label, star = _written(printable(p.label), stream), " *" * (p.label in (result.labels or ()))
        if look is None or plain:
            lines.append(f"  {number}  {label}{star}")
        else:
            chosen = bool(star) if result.labels is not None else rank == 0
            lines.append(_drawn(f"  {number}", p.probability, label, star, look, chosen=chosen))
    return "\n".join(lines) + "\n"


def _drawn(number: str, share: float, label: str, star: str, look: Look, *, chosen: bool) -> str:
    """A line with a bar, no wider than the terminal; a label that is too long ends in dots."""
    longest = min((look.columns - len(number)) // 3, _BAR)
    bar = ""
    if longest >= 4:
        colour = ("green" if chosen else "cyan") if look.colour else None
        bar = f"  {Bar(share, longest, Bar.UTF if look.blocks else ' #', colour)}"
    room = max(look.columns - disp_len(f"{number}{bar}  {star}") - 1, 4)  # the last column may wrap
    if disp_len(label) > room:
        dots = "…" if look.blocks else "..."
        label = disp_trim(label, room - len(dots)) + dots
    label = f"{_BOLD}{label}{_PLAIN}" if look.colour and chosen else label
    return f"{number}{bar}  {label}{star}"


def _record(result: ImageResult) -> dict[str, object]:
    if result.error is not None:
        return {"file": result.source, "error": result.error}
    labels = {} if result.labels is None else {"labels": result.labels}
    return {"file": result.source, "predictions": [one._asdict() for one in result.predictions], **labels}


def _rows(result: ImageResult) -> list[list[object]]:
    file, error = written_name(result.source), written_name(result.error or "")
    if result.error is not None:
        return [[file, "", "", "", "", "", error]]
    rows: list[list[object]] = []
    for rank, p in enumerate(result.predictions, start=1):
        above = "" if result.labels is None else int(p.label in result.labels)
        rows.append([file, rank, p.label, p.index, p.probability, above, ""])
    return rows


def written_name(name: str) -> str:
    """A file name as results hold it, with escapes for bytes that are no Unicode; JSON escapes them by itself."""
    return name.encode("utf-8", "backslashreplace").decode()
