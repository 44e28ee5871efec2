"""Data sets of others as ours: class names and labels in every form, items that are pairs or dicts, Arrow files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate, chain, repeat
from operator import index as whole_number
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from ..config import nearest
from ..errors import DataError, ImageError, MissingExtraError, shown
from ..images.decoding import load_image, load_item
from .records import FileRecords, ImageRecords, Label, LabelledRecords, some

_IMAGE_KEYS = ("image", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels", "target", "cls")


def wrap(
    dataset: Any,
    classes: Sequence[str] | int | None = None,
    *,
    multi_label: bool | None = None,
    otherwise: Sequence[str] | None = None,
) -> ImageRecords:
    """Any Dataset of labelled images as `ImageRecords`.

    Args:
        dataset: has a length, and items by index: pairs of image and label, or dicts such as Hugging Face's with image
            (img, pixel_values) and label (labels, target, cls), or one column of images and one of classes. An image
            has a form that `load_image` accepts (a PIL image, a path, an array or tensor of uint8 or of floats 0..1,
            not yet normalised, with as many channels as the model takes). A label is a whole number from 0, the name
            of a class, or a one-hot vector.
        classes: class names in the order of the labels, or their number, for the names "0", "1", ...; by default the
            data set's own `classes`, `class_to_idx` or `features`, those of the data set that a Subset or ConcatDataset
            is made from, or its labels, if those are names.
        multi_label: whether a label stands for several classes or none: a list of their numbers or names, or a tensor
            or array with a 0 or 1 for each class. Default: as the data set says (`multi_label`), or by pairs whose
            labels are lists of names.
        otherwise: class names of a data set that says none.

    An error that the data set raises keeps its type; an OSError stands for an image that cannot be read.

    Raises: DataError: no length, as of streams; no images, no class names, a DataLoader.
    """
    dataset = _undecoded(dataset) if is_set(dataset) else dataset
    several = _has_several(dataset) if multi_label is None else multi_label
    same = isinstance(dataset, ImageRecords) and several == dataset.multi_label
    if same and (classes is None or _plain_names(classes) == dataset.classes):
        return dataset
    # ImageNet is known by name, for some of its classes share theirs
    own = "imagenet" if hasattr(dataset, "wnids") else getattr(dataset, "name", None)
    name = own if isinstance(own, str) else type(dataset).__name__
    _check_form(dataset, name)
    found = (_names_in(dataset) or otherwise) if classes is None else _plain_names(classes)
    if found is None:
        raise DataError(
            f"{name} does not say its classes; pass wrap(dataset, classes=[...]), or their number for '0', '1', ..."
        )
    rows = pairs_of(dataset)
    if rows is None or not all(isinstance(image, (str, PathLike)) for image, _ in rows):
        return _WrappedRecords(name, dataset, found, several)
    numbers = {label: number for number, label in enumerate(found)}
    labels = (as_label(label, numbers, fspath(path), several) for path, label in rows)
    return FileRecords(name, "", (fspath(path) for path, _ in rows), labels, found)


def _check_form(dataset: Any, name: str) -> None:
    """Raise DataError for objects of other kinds, with the way out."""
    if isinstance(dataset, DataLoader):
        raise DataError(f"{name} gives batches; pass its data set (loader.dataset), without a Normalize transform")
    if isinstance(dataset, Mapping):
        raise DataError(f"a dict of {some([*map(str, dataset)])}; pass one of its data sets, such as data['train']")
    if hasattr(dataset, "iloc"):
        raise DataError(f"a {name} is no data set of items; pass it to open_dataset, train, finetune or evaluate")
    length = None
    if hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset):
        with suppress(TypeError, NotImplementedError):
            length = len(dataset)
    if length is None:
        raise DataError(
            f"{name} has no length and items by index; pass list(dataset) if it fits into memory, or write its images "
            "into a folder for each class"
        )
    if not length:
        raise DataError(f"{name}: no images")


def _names_in(dataset: Any) -> tuple[str, ...] | None:
    """Class names that a data set says, or the one that it is made from; None if it says none.

    Raises: DataError: parts with different classes, or a class_to_idx without the numbers from 0.
    """
    names, numbers = getattr(dataset, "classes", None), getattr(dataset, "class_to_idx", None)
    if isinstance(numbers, Mapping) and (names is None or {*numbers} == {*map(_plain_name, names)}):
        return _plain_names(numbers)
    if (label := _label_column(dataset)) and names is None:
        names = getattr(dataset.features[label], "names", None)
    if names is not None and not callable(names):
        return _plain_names(names)
    parts = [getattr(dataset, name, None) for name in ("dataset", "reader")]
    parts += dataset.datasets if isinstance(dataset, ConcatDataset) else []
    found = {_names_in(part) for part in parts if part is not None and part is not dataset} - {None}
    if len(found) > 1:
        raise DataError(f"{type(dataset).__name__} is made from data sets with different classes; give them the same")
    labels = None if found else _known_labels(dataset)
    if labels is not None and all(map(_is_names, labels)):
        return tuple(sorted({*chain.from_iterable(labels)}))
    if labels is not None and all(isinstance(label, str) for label in labels):
        first = dataset[0]  # which may have a number of the user's own for the name
        first = [first.get(_label_column(dataset))] if isinstance(first, Mapping) else first
        if isinstance(first, (list, tuple)) and first and isinstance(first[-1], str):
            found = {tuple(sorted({*labels}))}
    return next(iter(found), None)


def _is_names(label: Any) -> bool:
    return isinstance(label, (list, tuple, set)) and all(isinstance(name, str) for name in label)


def _has_several(dataset: Any) -> bool:
    """Whether a data set says that an image has several labels, or the one that it is made from."""
    if isinstance(known := getattr(dataset, "multi_label", None), bool):
        return known
    if isinstance(dataset, (Subset, ConcatDataset)):
        return any(map(_has_several, getattr(dataset, "datasets", [getattr(dataset, "dataset", None)])))
    pairs = pairs_of(dataset)
    return bool(pairs) and all(_is_names(label) for _, label in pairs or ()) and any(label for _, label in pairs or ())


def _plain_names(names: Any) -> tuple[str, ...]:
    """Class names of any form in the order of their numbers, each different."""
    if isinstance(names, Mapping):
        by_number = {**names} if all(isinstance(key, int) for key in names) else {n: key for key, n in names.items()}
        if sorted(by_number) != [*range(len(names))]:
            raise DataError(f"classes numbered {some([*map(str, by_number)])}; expected 0 to {len(names) - 1}")
        names = [by_number[number] for number in range(len(names))]
    names = range(names) if isinstance(names, int) else names
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise DataError(f"classes={shown(names)}; expected a list of names")
    plain = [*map(_plain_name, names)]
    count = Counter(plain)  # "crane" is a bird and a machine
    return tuple(f"{name} ({number})" if count[name] > 1 else name for number, name in enumerate(plain))


def _plain_name(name: Any) -> str:
    return ", ".join(name) if isinstance(name, (list, tuple)) else str(name)


def _label_column(dataset: Any) -> str | None:
    """Column of the labels in a data set of Hugging Face; None of others."""
    features = getattr(dataset, "features", None)
    return _key(features, features, _LABEL_KEYS, "ClassLabel") if isinstance(features, Mapping) else None


def _key(row: Mapping[str, Any], features: Mapping[str, Any], known: Sequence[str], kind: str) -> str | None:
    """The first known key of a row, else its only column of a kind."""
    alike = [key for key in row if type(features.get(key)).__name__ == kind]
    return next((key for key in known if key in row), alike[0] if len(alike) == 1 else None)


def pairs_of(dataset: Any) -> Sequence[Any] | None:
    """A list of pairs as it is; None: another data set."""
    listed = isinstance(dataset, (list, tuple))
    return dataset if listed and all(isinstance(row, (list, tuple)) and len(row) == 2 for row in dataset) else None


def _known_labels(dataset: Any) -> Sequence[Any] | None:
    """Labels that are there without the images, in any form; None if there are none."""
    if (pairs := pairs_of(dataset)) is not None:
        return [label for _, label in pairs]
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [labels for part in dataset.datasets if (labels := _known_labels(part)) is not None]
        return [*chain.from_iterable(parts)] if len(parts) == len(dataset.datasets) else None
    known: Any = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else None
    if (column := _label_column(dataset)) and hasattr(dataset, "with_format"):
        known = dataset.with_format(None)[column][:]  # in a list at once
    elif getattr(dataset, "target_transform", None) is None:
        known = getattr(dataset, "targets", getattr(dataset, "labels", known))
    listed = hasattr(known, "__getitem__") and hasattr(known, "__len__") and len(known) == len(dataset)
    return known if listed else None


def as_label(label: Any, numbers: Mapping[str, int], where: str, several: bool = False) -> Label:
    """Number of the class that a label of any form stands for; with `several`, the numbers of all its classes.

    Raises: DataError: a class that is not in `numbers`; none, or more than one, unless there may be several.
    """
    if not several:
        return _number(label, numbers, where)
    if hasattr(label, "ndim") or hasattr(label, "tolist"):
        label = label.tolist()
        if not isinstance(label, list) or len(label) != len(numbers) or any(value not in (0, 1) for value in label):
            raise DataError(f"{where}: label {shown(label)}, expected a 0 or 1 for each of {len(numbers)} classes")
        return tuple(number for number, value in enumerate(label) if value)
    if isinstance(label, str) or not isinstance(label, Iterable):
        raise DataError(f"{where}: label {shown(label)}, expected a list of classes, as an image has several labels")
    found = sorted(_number(one, numbers, where) for one in label)
    if len({*found}) < len(found):
        raise DataError(
            f"{where}: label {shown(label)}, expected different classes; a 0 or 1 for each class is a tensor or array"
        )
    return tuple(found)


def _number(label: Any, numbers: Mapping[str, int], where: str) -> int:
    """Number of the class that a label of any form stands for. Raises: DataError: none, or several."""
    if isinstance(label, str):
        if label in numbers:
            return numbers[label]
        raise DataError(f"{where}: label {shown(label)}, expected a class{nearest(label, numbers)}")
    number, expected = label, f"expected a whole number from 0 to {len(numbers) - 1}"
    if hasattr(label, "ndim") or isinstance(label, (list, tuple)):
        with suppress(TypeError, ValueError, RuntimeError):
            values = torch.as_tensor(label).flatten().tolist()
            one_hot = len(values) == len(numbers) > 1 and sorted(values) == [0] * (len(values) - 1) + [1]
            number = values[0] if len(values) == 1 else values.index(1) if one_hot else label
            expected += ", or a one-hot vector; several at once with wrap(..., multi_label=True), soft labels never"
    with suppress(TypeError):
        number = whole_number(int(number) if isinstance(number, float) and number.is_integer() else number)
        if 0 <= number < len(numbers):
            return number
    raise DataError(f"{where}: label {shown(label)}, {expected}")


class _WrappedRecords(ImageRecords):
    def __init__(self, name: str, dataset: Any, classes: Sequence[str], multi_label: bool) -> None:
        self.name, self.classes, self.multi_label = name, tuple(classes), multi_label
        self._dataset, self._length = dataset, len(dataset)
        self._numbers = {label: number for number, label in enumerate(classes)}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        try:
            item = self._dataset[index]
        except StopIteration as error:  # which would end an epoch
            raise DataError(f"{self.describe(index)}: the data set raised StopIteration; expected an item") from error
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"raised for {self.describe(index)}")
            raise
        image, label = self._pair(item, index)
        number = as_label(label, self._numbers, self.describe(index), self.multi_label)
        try:
            return load_item(_plain_image(image)), number
        except ImageError as error:
            if isinstance(image, (str, PathLike, bytes, Mapping, PIL.Image.Image)):
                raise
            raise DataError(f"{self.describe(index)}: {error}") from error

    def _pair(self, item: Any, index: int) -> tuple[Any, Any]:
        if isinstance(item, (list, tuple)) and len(item) == 2:
            return item[0], item[1]
        kind = f"{len(item)} values" if isinstance(item, (list, tuple)) else f"item of type {type(item).__name__}"
        if isinstance(item, Mapping):
            features = getattr(self._inner(index)[0], "features", None) or {}
            image, label = _key(item, features, _IMAGE_KEYS, "Image"), _key(item, features, _LABEL_KEYS, "ClassLabel")
            if image is not None and label is not None:
                return item[image], item[label]
            kind = f"a dict of {some([*map(str, item)])}"
        raise DataError(f"{self.describe(index)}: {kind}; expected (image, label), or a dict with image and label")

    def describe(self, index: int) -> str:
        dataset, inner = self._inner(index)
        if isinstance(dataset, ImageRecords):
            return dataset.describe(inner)
        if isinstance(dataset, DatasetFolder):
            return str(dataset.samples[inner][0])
        return super().describe(index)

    def label(self, index: int) -> Label:
        dataset, inner = self._inner(index)
        if isinstance(dataset, ImageRecords) and dataset.multi_label == self.multi_label:
            return dataset.label(inner)
        if self._labels is None:
            return super().label(index)
        return as_label(self._labels[index], self._numbers, self.describe(index), self.multi_label)

    @property
    def knows_labels(self) -> bool:
        inner = self._inner(0)[0]
        return inner.knows_labels if isinstance(inner, ImageRecords) else self._labels is not None

    @cached_property
    def _labels(self) -> Sequence[Any] | None:
        return _known_labels(self._dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_labels"}

    def _inner(self, index: int) -> tuple[Any, int]:
        """The data set that an image comes from, behind any Subset and ConcatDataset, and its number there."""
        dataset: Any = self._dataset
        while isinstance(dataset, (Subset, ConcatDataset)):
            if isinstance(dataset, Subset):
                dataset, index = dataset.dataset, dataset.indices[index]
            else:
                part = bisect_right(dataset.cumulative_sizes, index)
                index -= dataset.cumulative_sizes[part - 1] if part else 0
                dataset = dataset.datasets[part]
        return dataset, index


def _plain_image(image: Any) -> Any:
    """Images of Hugging Face that are not decoded, tensors without channels, channels in the other order."""
    if isinstance(image, Mapping):
        return image.get("bytes") or image.get("path")
    shape = tuple(getattr(image, "shape", ()))
    if not isinstance(image, Tensor):
        return image.transpose(1, 2, 0) if len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] > 4 else image
    if len(shape) == 2:
        return image[None]
    return image.permute(2, 0, 1) if len(shape) == 3 and shape[0] > 4 and shape[2] in (1, 3, 4) else image


# Data sets of Hugging Face

HUB, SAVED = "hf:", ("dataset_dict.json", "state.json")
"""Beginning of the name of a data set on the Hub; files in the folder of one that was saved."""


def is_set(source: Any) -> bool:
    """Whether an object is a data set of Hugging Face, or several by split, without a transform of the user's own."""
    theirs = type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "column_names")
    return theirs and getattr(source, "format", {}).get("type") != "custom"


def read_set(source: Any, form: str, options: Mapping[str, str]) -> Any:
    """A `Dataset`, or a mapping of such from the names of its splits.

    Args:
        source: such an object; "hf:" and a name on the Hub; a folder or Parquet file.
        form: "set", "hub", "saved" (a folder) or "parquet" (a folder or file).
        options: keywords of `datasets.load_dataset`, of a set on the Hub.

    Raises: DataError: it cannot be read, or is a stream. MissingExtraError: datasets is not installed.
    """
    try:
        import datasets as library
    except ImportError as error:
        raise MissingExtraError(
            "Parquet files and data sets of Hugging Face are read by datasets; pip install 'deit-models[data]'"
        ) from error
    try:
        if form == "set":
            found = source
        elif form == "hub":
            found = library.load_dataset(source.removeprefix(HUB), **options)
        elif form == "saved":
            found = library.load_from_disk(source)
        else:
            files = {"path": source} if os.path.isdir(source) else {"path": "parquet", "data_files": source}
            found = library.load_dataset(**files, **({} if os.path.isdir(source) else {"split": "train"}))
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: {' '.join(str(error).split())}") from error
    if any(
        isinstance(one, library.IterableDataset) for one in (found.values() if isinstance(found, dict) else [found])
    ):
        raise DataError(
            f"{type(found).__name__} is a stream without items by number; load it without streaming=True, or keep a "
            "part: Dataset.from_list(list(stream.take(10_000)), features=stream.features)"
        )
    return found


def _undecoded(data: Any) -> Any:
    """The same set with images in encoded bytes."""
    from datasets import Image

    for column, feature in getattr(data, "features", {}).items():
        data = data.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else data
    return data


def joined_sets(parts: Sequence[Any], name: str) -> Any:
    """Several data sets as one. Raises: DataError: they have different columns."""
    from datasets import concatenate_datasets

    try:
        return parts[0] if len(parts) == 1 else concatenate_datasets([*parts])
    except ValueError as error:
        raise DataError(f"{name}: its splits have different columns; name one of them, split=NAME") from error


def rows_of_set(data: Any, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Values of some columns row by row, as they are stored."""
    if not columns:
        yield from repeat((), len(data))
        return
    for batch in data.with_format("arrow").select_columns([*dict.fromkeys(columns)]).iter(1000):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def kind_of_feature(data: Any, column: str) -> str:
    """Type of a column: "Image" of encoded images, "ClassLabel" of numbers with names, perhaps in lists, or ""."""
    feature = None if data is None else data.features[column]
    encoded = isinstance(feature, Mapping) or getattr(feature, "dtype", "") in ("binary", "large_binary")
    if encoded or type(feature).__name__ == "Image":
        return "Image"
    return "" if names_of_feature(data, column) is None else "ClassLabel"


def names_of_feature(data: Any, column: str) -> list[str] | None:
    """Names of the classes of a column; None: they are not known."""
    feature = None if data is None else data.features[column]
    return getattr(getattr(feature, "feature", feature), "names", None)


class ArrowRecords(LabelledRecords):
    """Images of a data set of Hugging Face, read row by row from its Arrow files and decoded by `load_image`."""

    always_the_same = True

    def __init__(
        self, name: str, data: Any, column: str, rows: Sequence[int], labels: Iterable[Label], classes: Iterable[str]
    ) -> None:
        """Note the rows and their labels; no image is read."""
        super().__init__(name, labels, classes)
        self._column, self._rows = column, rows
        self._data = data.select_columns([column]).with_format("arrow")  # in which images stay encoded
        # rows in the order of the files are read from the table itself, which is faster
        self._direct = getattr(self._data, "_indices", self._data) is None

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, Label]:
        try:
            return load_image(self._stored(index).as_py()), self._labels[index]
        except ImageError as error:
            raise ImageError(f"{self.describe(index)}: {error}") from error

    def _stored(self, index: int) -> Any:
        """Encoded bytes, or a path where the set has no more, as a value of Arrow."""
        row = self._rows[index]
        if self._direct:
            chunks, starts = self._chunks
            part = bisect_right(starts, row) - 1
            value: Any = chunks[part][row - starts[part]]
        else:
            value = self._data[row][self._column][0]
        if hasattr(value, "keys") and value.is_valid:
            value = value["bytes"] if value["bytes"].is_valid else value["path"]
        if not value.is_valid:
            raise ImageError("this row has none")
        return value

    @cached_property
    def _chunks(self) -> tuple[list[Any], list[int]]:
        chunks = self._data.data.column(self._column).chunks
        return chunks, [0, *accumulate(map(len, chunks))]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_chunks"}

    def source(self, index: int) -> Path | tuple[str, bytes]:
        try:
            encoded = self._stored(index).as_py()
        except ImageError:
            encoded = b""
        return Path(encoded) if isinstance(encoded, str) else (self.describe(index), encoded)

    def key(self, index: int) -> str:
        """Its row and the number of its bytes, which are not read."""
        return f"{self._rows[index]} ({self._stored(index).as_buffer().size} bytes)"
