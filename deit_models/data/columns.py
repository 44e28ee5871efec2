"""Columns of images and of labels: CSV, TSV, JSONL and Parquet files, DataFrames, data sets of Hugging Face."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..config import nearest
from ..errors import ConfigError, DataError, first_line, shown
from .classes import (
    HUB,
    SAVED,
    ArrowRecords,
    is_set,
    joined_sets,
    kind_of_feature,
    names_of_feature,
    read_set,
    rows_of_set,
)
from .records import (
    SPLIT_FOLDER,
    SPLIT_FOLDERS,
    FileRecords,
    ImageRecords,
    Label,
    is_image,
    list_images,
    some,
    split_of,
    subfolders,
)

logger = logging.getLogger(__name__)

_TEXTS, _PARQUET = (".csv", ".tsv", ".jsonl", ".ndjson"), ".parquet"
_METADATA = ("metadata.csv", "metadata.jsonl")
_OPTION = re.compile(r",(\w+)=([^,]*)$")
_IMAGES = "image imagepath path file filename filepath img imgpath imagefile imagename imageid photo picture id".split()
_LABELS = "label labels class classes classname target targets category categories tag tags species breed cls".split()
_SPLITS = ("split", "subset", "partition")
"""Names of columns, in lower case and without other signs, in the order they are looked for."""
_FLAGS = dict.fromkeys(("0", "0.0", "False", "false"), False) | dict.fromkeys(("1", "1.0", "True", "true"), True)
_NOTHING = ("None", "nan", "NaT", "<NA>")
_PROBES = 8


class Columns(NamedTuple):
    """Columns of a table to read; what is not given is known by its name.

    Attributes:
        images: the folder that files are relative to; default: the table's.
        image: the column of files or images.
        label: the column of labels, or a column of 0 and 1 for each class.
        separator: between the names of several classes in one cell.
    """

    images: str | PathLike[str] | None = None
    image: str | None = None
    label: Sequence[str] = []  # never changed
    separator: str | None = None

    @classmethod
    def of(cls, images: Any, image_column: str | None, label_column: Any, label_separator: str | None) -> Columns:
        """From the keywords of `open_dataset`. Raises: ConfigError: an empty separator."""
        if label_separator == "":
            raise ConfigError("label_separator=''; expected the text between two names, such as '|'")
        label = [label_column] if isinstance(label_column, str) else [*(label_column or ())]
        return cls(images, image_column, label, label_separator)


class _Place(NamedTuple):
    """A source without its options, such as split=test behind a comma, and its form; None: no table."""

    source: Any
    form: str | None
    options: Mapping[str, str]

    @property
    def name(self) -> str:
        """In messages."""
        if not isinstance(self.source, str):
            return type(self.source).__name__
        return self.source if self.form == "hub" else Path(self.source).resolve().name


class _Table(NamedTuple):
    """Names of columns, and a function that gives the values of some of them row by row; `data`: as Hugging Face's."""

    name: str
    root: Path
    columns: Sequence[str]
    rows: Callable[[Sequence[str]], Iterable[Sequence[Any]]]
    data: Any = None


class _Chosen(NamedTuple):
    image: str
    labels: Sequence[str]
    split: str | None


def is_table(source: Any) -> bool:
    """Whether `open_table` reads a source: a table, a data set of Hugging Face, or the place of one."""
    return _placed(source).form is not None


def _placed(source: Any) -> _Place:
    if not isinstance(source, (str, PathLike)):
        frame = all(hasattr(source, name) for name in ("columns", "__getitem__", "to_dict"))
        return _Place(source, "set" if is_set(source) else "frame" if frame else None, {})
    options: dict[str, str] = {}
    base = os.path.expanduser(source)
    while not os.path.exists(base) and (match := _OPTION.search(base)):
        options[match[1]], base = match[2], base[: match.start()]
    form = _form_of(base)
    if options and form is None and os.path.exists(base):
        raise ConfigError(f"{source}: options behind a comma belong to tables and data sets; name a folder by its path")
    known = ("name", "revision", "split") if form == "hub" else ("split",)
    if form and (unknown := [option for option in options if option not in known]):
        raise ConfigError(f"{source}: no option {unknown[0]!r}; expected {' or '.join(known)}")
    return _Place(base if form else source, form, options)


def _form_of(place: str) -> str | None:
    if place.startswith(HUB):
        return "hub"
    if not os.path.isdir(place):
        suffix = os.path.splitext(place)[1].lower()
        return "parquet" if suffix == _PARQUET else "text" if suffix in _TEXTS else None
    if any(os.path.isfile(os.path.join(place, name)) for name in SAVED):
        return "saved"
    if _metadata(place) is not None:
        return "text"
    return "parquet" if any(_has_parquet(os.path.join(place, inner)) for inner in ("", "data", "train")) else None


def _metadata(folder: str) -> Path | None:
    """The table of an image folder as Hugging Face's; tables of the same name without its column are others'."""
    for path in (Path(folder, name) for name in _METADATA):
        with suppress(OSError), path.open(errors="replace") as file:
            if "file_name" in file.readline():
                return path
    return None


def _has_parquet(folder: str) -> bool:
    """Whether a folder has Parquet files and no folders, which may be of classes."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return False
    return any(entry.name.endswith(_PARQUET) for entry in found) and not any(entry.is_dir() for entry in found)


def has_split(source: Any, split: str) -> bool:
    """Whether a source for `open_table` has images for a split, and is not named as one split of several."""
    place = _placed(source)
    if "split" in place.options:
        return False
    found = _read(place)
    if isinstance(found, _Table):
        column = _known(found.columns, _SPLITS)
        found = _values(found, column) if column else ()
    return bool(_alike(found, split))


def open_table(
    source: Any, split: str | None, columns: Columns, *, first: bool = True, own: bool = False, labelled: bool = True
) -> ImageRecords:
    """Images of a table or a data set of Hugging Face.

    Args:
        source: see `is_table`.
        split: "train" or "val", where the source has splits; None: all of them.
        columns: to read.
        first: tell which columns were chosen by their names.
        own: the source was named for this split, so that one without splits is accepted for "val" too.
        labelled: labels are needed.

    Raises: DataError: no such source, split or column, values of other kinds. ConfigError: unknown options.
        MissingExtraError: datasets is not installed, and the source needs it.
    """
    place = _placed(source)
    table, wanted = _read(place), place.options.get("split")
    divided = not isinstance(table, _Table) or (wanted is not None and place.form == "hub")
    if not isinstance(table, _Table):
        parts = _parts(table, split, wanted, place.name)
        table = _table_of(place, joined_sets([table[part] for part in parts], place.name))
    chosen, keep = _choose(table, columns, labelled=labelled, tell=first), None
    if chosen.split is not None and not divided:
        keep = _parts(_values(table, chosen.split), split, wanted, table.name)
    elif not divided and (wanted is not None or (split == "val" and not own)):
        expected = "name another for validation, or add a column 'split'" if wanted is None else "leave out split="
        raise DataError(f"{table.name}: no splits, so it is a training set; {expected}")
    coder = _Coder(table, chosen.labels, columns.separator, required=labelled)
    if kind_of_feature(table.data, chosen.image) != "Image":
        return _file_records(table, columns, _walk(table, chosen, keep, coder, files=True), coder)
    if columns.images is not None:
        raise ConfigError(f"{table.name}: its images are in it; leave out images={columns.images} (--images)")
    rows = array("q", (number for number, _ in _walk(table, chosen, keep, coder, files=False)))
    return ArrowRecords(table.name, table.data, chosen.image, rows, coder.labels(), coder.classes())


def _values(table: _Table, column: str) -> list[str]:
    """The different values of a column."""
    return [*dict.fromkeys(_text(value) for (value,) in table.rows([column]))]


def _parts(names: Collection[str], split: str | None, wanted: str | None, name: str) -> list[str]:
    """The splits of a source to read: the one that is wanted, or stands for `split`, or all of them."""
    if wanted == "all" or (split is None and wanted is None):
        return [*names]
    found = [name for name in names if name == wanted] if wanted else _alike(names, split or "")
    if len(found) != 1:
        asked = f"split={wanted}" if wanted else {"train": "training", "val": "validation"}[split or ""]
        raise DataError(
            f"{name}: {'two splits' if found else 'no split'} for {asked} among {some([*names])}; choose one, as in "
            f"{name},split={next(iter(names), 'train')}"
        )
    return found


def _alike(names: Iterable[str], split: str) -> list[str]:
    """Names that stand for a split, by the first word that any has: a test split is the last choice for "val"."""
    words = {
        name: match["word"].lower() for name in names if (match := SPLIT_FOLDER.fullmatch(name)) and split_of(name)
    }
    return next((found for word in SPLIT_FOLDERS[split] if (found := [n for n in words if words[n] == word])), [])


# Columns


def _choose(table: _Table, given: Columns, *, labelled: bool, tell: bool) -> _Chosen:
    """The columns to read; a log line tells those that were chosen by their names."""
    for column in [*filter(None, [given.image]), *given.label]:
        if (count := table.columns.count(column)) != 1:
            raise DataError(f"{table.name}: {count} columns {column!r}, expected one{nearest(column, table.columns)}")
    if no_header := [column for column in table.columns if is_image(column)]:
        raise DataError(f"{table.name}: its first line has {no_header[0]}; expected names of columns, as path,label")
    pictures = [column for column in table.columns if kind_of_feature(table.data, column) == "Image"]
    image = given.image or _known(pictures or table.columns, _IMAGES) or (pictures[0] if len(pictures) == 1 else None)
    if image is None:
        raise DataError(
            f"{table.name}: which column has the images? Name it with image_column (--image-column), of "
            f"{', '.join(table.columns)}"
        )
    split = _known([column for column in table.columns if column != image and column not in given.label], _SPLITS)
    labels, sure = (given.label, True) if given.label else _label_column(table, {image, split})
    if labelled and not labels:
        raise DataError(
            f"{table.name}: which column has the labels? Name it with label_column (--label-column), or one of 0 and 1 "
            f"for each class, of {', '.join(table.columns)}"
        )
    guesses = [f"images from {image!r}"] if not given.image and pictures != [image] else []
    guesses += [f"labels from {labels[0]!r}"] if labels and not sure else []
    guesses += [f"splits from {split!r}"] if split else []
    if tell and guesses:
        logger.warning("%s: %s (--image-column, --label-column choose others)", table.name, ", ".join(guesses))
    return _Chosen(image, labels, split)


def _label_column(table: _Table, others: Collection[str | None]) -> tuple[list[str], bool]:
    """The column of labels in a list, empty where none can be told; and whether its type says so."""
    rest = [column for column in table.columns if column not in others]
    typed = [column for column in rest if kind_of_feature(table.data, column) == "ClassLabel"]
    if typed:
        return (typed, True) if len(typed) == 1 else ([], False)
    known = _known(rest, _LABELS) or (rest[0] if len(rest) == 1 else None)
    return ([known] if known else []), False


def _known(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column with the first of some names."""
    plain = {re.sub(r"[\W_]+", "", column.lower()): column for column in [*columns][::-1]}
    return next((plain[name] for name in names if name in plain), None)


def _walk(
    table: _Table, chosen: _Chosen, keep: Collection[str] | None, coder: _Coder, *, files: bool
) -> Iterator[tuple[int, str]]:
    """Number and file of each row of the splits to keep; its label is noted."""
    columns = [chosen.image] * files + [*chosen.labels] + ([chosen.split] if chosen.split and keep is not None else [])
    start, end = int(files), int(files) + len(chosen.labels)
    found = False
    for number, row in enumerate(table.rows(columns)):
        if keep is None or _text(row[-1]) in keep:
            coder.add(row[start:end], number)
            file = _text(row[0]) if files else ""
            if files and not file:
                raise DataError(f"{table.name}: row {number + 1} has nothing in column {chosen.image!r}")
            found = True
            yield number, file
    if not found:
        raise DataError(f"{table.name}: no images")


def _text(value: Any) -> str:
    """A value of any kind as text without space around it; "" where there is none."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, PathLike):
        return fspath(value)
    value = value.item() if hasattr(value, "item") else value
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    return "" if text in _NOTHING else text


class _Coder:
    """Labels as they come, and in the end their classes in order: numbers by size, names by the alphabet."""

    def __init__(self, table: _Table, columns: Sequence[str], separator: str | None, *, required: bool) -> None:
        self._table, self._columns, self._separator, self._required = table.name, columns, separator, required
        self._names = names_of_feature(table.data, columns[0]) if len(columns) == 1 else None
        self._numbers: dict[str, int] = {}
        self._codes: list[Any] = []
        self._same: dict[Any, Any] = {}
        self._several: bool | None = None
        self._without: list[int] = []

    def add(self, values: Sequence[Any], row: int) -> None:
        """Note the label of a row. Raises: DataError: a value of another kind than those before."""
        code: Any = -1
        if len(self._columns) == 1:
            code = self._code(values[0], row)
        elif self._columns:
            code = tuple(number for number, value in enumerate(values) if self._flag(value, number, row))
        self._codes.append(self._same.setdefault(code, code))  # equal tuples share their memory

    def _code(self, value: Any, row: int) -> int | tuple[int, ...]:
        if self._separator is not None:
            value = [name for part in _text(value).split(self._separator) if (name := part.strip())]
        elif hasattr(value, "tolist"):
            value = value.tolist()
        several = isinstance(value, (list, tuple, set))
        self._several = several if self._several is None else self._several
        if several != self._several:
            raise DataError(
                f"{self._table}: row {row + 1} has label {shown(value)}; expected lists in all rows or none"
            )
        return tuple(self._number(one, row) for one in value) if several else self._number(value, row)

    def _number(self, value: Any, row: int) -> int:
        if self._names is not None:
            if value is not None and 0 <= value < len(self._names):
                return int(value)
        elif text := _text(value):
            return self._numbers.setdefault(text, len(self._numbers))
        self._without.append(row)
        return -1

    def _flag(self, value: Any, number: int, row: int) -> bool:
        flag = _FLAGS.get(_text(value))
        if flag is None:
            raise DataError(
                f"{self._table}: row {row + 1} has {shown(value)} in column {self._columns[number]!r}; expected 0 or 1"
            )
        return flag

    def labels(self) -> Iterator[Label]:
        """The label of each row. Raises: DataError: rows without one, where they are needed."""
        if self._required and self._without:
            raise DataError(
                f"{self._table}: {len(self._without)} of {len(self._codes)} rows have no label (empty or -1), the "
                f"first is row {self._without[0] + 1}; leave them out, or choose another split"
            )
        order = {self._numbers.get(name, number): number for number, name in enumerate(self.classes())} | {-1: -1}
        for code in self._codes:
            yield tuple(sorted({order[number] for number in code} - {-1})) if isinstance(code, tuple) else order[code]

    def classes(self) -> Iterator[str]:
        """Names of the classes."""
        whole = all(re.fullmatch(r"-?\d+", name) for name in self._numbers)
        found = sorted(self._numbers, key=lambda name: (int(name) if whole else 0, name))
        yield from self._columns if len(self._columns) > 1 else self._names or found


# Files


def _file_records(table: _Table, columns: Columns, rows: Iterator[tuple[int, str]], coder: _Coder) -> FileRecords:
    folder = table.root if columns.images is None else Path(columns.images).expanduser()
    files = _completed((file for _, file in rows), folder, table.name)
    records = FileRecords(table.name, folder, files, coder.labels(), coder.classes())
    probes = {len(records) * number // _PROBES for number in range(_PROBES)}
    if not any(os.path.exists(records.describe(index)) for index in probes):
        file = records.key(0)
        inner = [one for one in (subfolders(folder) if folder.is_dir() else ()) if (folder / one / file).exists()]
        found = f" (it is in {inner[0]})" if inner else ""
        raise DataError(
            f"{table.name}: no file {folder / file}{found}, nor others of the table; name the folder its files are "
            "relative to with images (--images)"
        )
    return records


def _completed(files: Iterator[str], folder: Path, name: str) -> Iterator[str]:
    """Files as they are; or with their suffixes in the folder, where the first has none of an image.

    Raises: DataError: two files in the folder differ in their suffix alone.
    """
    first = next(files, "")
    files = chain([first] * bool(first), files)
    if not first or is_image(first) or (folder / first).exists():
        yield from files
        return
    whole: dict[str, str] = {}
    twice: dict[str, str] = {}
    for file in list_images(folder)[0]:
        stem = os.path.splitext(file)[0]
        (twice if stem in whole else whole)[stem] = file
    for file in files:
        if file in twice:
            raise DataError(f"{name}: {file!r} is {whole[file]} and {twice[file]} in {folder}; add the suffixes")
        yield whole.get(file, file)


def _read(place: _Place) -> Any:
    """A table, or data sets of Hugging Face by the names of their splits."""
    if place.form == "frame":
        frame = place.source
        names = {str(name): name for name in frame.columns}
        return _Table(place.name, Path(), [*names], lambda some: zip(*(frame[names[n]] for n in some), strict=True))
    if place.form != "text":
        found = read_set(place.source, place.form or "", place.options)
        return found if isinstance(found, Mapping) else _table_of(place, found)
    path = _metadata(place.source) or Path(place.source)
    rows = partial(_json_rows if path.suffix.lower() in _TEXTS[2:] else _csv_rows, path)
    header = next(iter(rows(None)), None)
    if not header:
        raise DataError(f"{path}: empty; expected a line of column names, then one for each image")
    return _Table(place.name, path.parent, header, rows)


def _table_of(place: _Place, data: Any) -> _Table:
    path = Path(place.source) if place.form in ("saved", "parquet") else Path()
    return _Table(
        place.name, path if path.is_dir() else path.parent, data.column_names, partial(rows_of_set, data), data
    )


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """A text file with its own ends of lines. Raises: DataError: no such file, no text, no table."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            yield text
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table in UTF-8 ({first_line(error)})") from error


def _csv_rows(path: Path, wanted: Sequence[str] | None) -> Iterator[Sequence[str]]:
    """Values of the wanted columns row by row; None: the names of all columns."""
    with _opened(path) as file:
        line = file.readline()
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=line.count)
        reader = csv.reader(chain([line], file), delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        if wanted is None:
            yield header
            return
        places = [header.index(name) for name in wanted]
        for row in reader:
            if len(row) == len(header):
                yield [row[place] for place in places]
            elif row:
                raise DataError(f"{path}: line {reader.line_num} has {len(row)} values; expected {len(header)}")


def _json_rows(path: Path, wanted: Sequence[str] | None) -> Iterator[Sequence[Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.strip() or "{}")
                values = [*row] if wanted is None else [row.get(name) for name in wanted]
            except (ValueError, TypeError, AttributeError) as error:
                expected = '{"path": "a.jpg", "label": "cat"}'
                raise DataError(f"{path}: line {number} is no JSON object; expected one a line: {expected}") from error
            if row:
                yield values
            if row and wanted is None:
                return
