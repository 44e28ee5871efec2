"""What images there are: class folders, data sets known by name, and any torch Dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import index as whole_number
from pathlib import Path
from typing import Any, Literal

import PIL.Image
from torch.utils.data import Subset
from torchvision.datasets import DatasetFolder

from ..config import nearest
from ..decoding import load_image
from ..errors import ConfigError, DataError
from .named_datasets import DATASETS, open_named
from .records import FileRecords, ImageRecords, read_class_folders, some, subfolders

__all__ = ["ImageRecords", "open_dataset", "wrap"]

Split = Literal["train", "val"]

_FOLDERS: dict[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
"""Names of a split's folder, in the order they are looked for."""


def open_dataset(
    source: str | os.PathLike[str],
    split: Split,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    classes: Sequence[str] | None = None,
    own_folder: bool = False,
) -> ImageRecords:
    """The training or the validation images of a data set.

    Args:
        source: a folder with train/ and val/ (or validation/, valid/, test/), each with one folder of images a class; a
            folder that holds class folders itself, which is a training set; or a name: cifar10, cifar100, flowers102,
            stanford_cars, imagenet, inaturalist-2018, -2019 or -2021. A colon asks for coarser classes:
            "inaturalist-2018:genus". A name wins over a folder of the same name in the working directory, which is
            "./cifar10".
        split: "train" or "val".
        root: where a named data set lies, "data" by default; not for folders.
        download: fetch a named data set that is not there: cifar10, cifar100, flowers102 and inaturalist-2021 can be.
        classes: the training set's class names, which this set must have too; their order numbers the classes.
        own_folder: the folder was named for this split, so class folders right in it are accepted for "val" too.

    Raises:
        DataError: no such folder or name, another layout, a class without images, fewer than two classes, classes other
            than `classes`, a named data set that is not there. One line each, with what to do.
        ConfigError: an unknown split; root or download with a folder.
    """
    if split not in _FOLDERS:
        raise ConfigError(f"split={split!r}; expected 'train' or 'val'")
    if isinstance(source, str) and source.partition(":")[0] in DATASETS:
        where = Path("data" if root is None else root).expanduser()
        return open_named(source, split, where, download=download, classes=classes)
    if root is not None or download:
        raise ConfigError(f"root and download belong to the data sets known by name ({', '.join(DATASETS)})")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(_not_there(source, folder))
    return _open_folder(folder, split, classes=classes, own_folder=own_folder)


def _not_there(source: str | os.PathLike[str], folder: Path) -> str:
    if folder.exists():
        return f"{folder}: not a folder; expected one with train/ and val/, or with a folder of images for each class"
    if not isinstance(source, str) or os.path.dirname(source):
        return f"{folder}: no such folder"
    return f"{source}: neither a folder nor a data set known by name{nearest(source, DATASETS)}"


def has_validation(source: str | os.PathLike[str]) -> bool:
    """Whether `open_dataset(source, "val")` has a set to open: a name, or a folder with one of the folders for it."""
    if isinstance(source, str) and source.partition(":")[0] in DATASETS:
        return True
    folder = Path(source).expanduser()
    return folder.is_dir() and any(name in _FOLDERS["val"] for name in _split_folders(folder))


def _split_folders(folder: Path) -> list[str]:
    """The folders of splits in a folder; none where it holds class folders.

    A set of vehicles may well have a class called "train": its folder holds images, a split's holds class folders.
    Where there is nothing but split folders, images right in them are a mistake and no classes "train" and "val".
    """
    found = subfolders(folder)
    present = [name for names in _FOLDERS.values() for name in names if name in found]
    split = present and (len(present) == len(found) or any(subfolders(folder / name) for name in present))
    return present if split else []


def _open_folder(folder: Path, split: Split, *, classes: Sequence[str] | None, own_folder: bool) -> FileRecords:
    if present := _split_folders(folder):
        for name in _FOLDERS[split]:
            if name in present:
                return read_class_folders(folder / name, name=folder.resolve().name, classes=classes)
        raise DataError(f"{folder}: has {some(present)} but no {' or '.join(_FOLDERS[split])} folder")
    if split == "val" and not own_folder:
        raise DataError(
            f"{folder}: class folders without a split, which are a training set; put the images for validation into "
            f"{folder / 'val'} and the others into {folder / 'train'}, or name a folder for validation alone"
        )
    return read_class_folders(folder, classes=classes)


def wrap(dataset: Any, classes: Sequence[str] | None = None) -> ImageRecords:
    """Any Dataset of (image, label) pairs, as the training loop reads it.

    Args:
        dataset: has a length, and items of an image, in a form that `load_image` accepts (a PIL image, a path, an array
            or tensor of uint8 or of floats 0..1, not yet normalised), and a whole number from 0.
        classes: class names in the order of the labels; by default the data set's own `classes`, or those of the data
            set that a Subset or ConcatDataset is made from.

    Raises: DataError: no length or no images, no class names, fewer than two classes.
    """
    if isinstance(dataset, ImageRecords) and (classes is None or tuple(classes) == dataset.classes):
        return dataset
    return _WrappedRecords(dataset, classes)


class _WrappedRecords(ImageRecords):
    def __init__(self, dataset: Any, classes: Sequence[str] | None) -> None:
        self.name = str(getattr(dataset, "name", type(dataset).__name__))
        found = _own_classes(dataset) if classes is None else classes
        if found is None:
            raise DataError(f"{self.name} does not say its classes; pass wrap(dataset, classes=[...])")
        self.classes = tuple(name if isinstance(name, str) else ", ".join(name) for name in found)
        if len(self.classes) < 2:
            raise DataError(f"{self.name}: {len(self.classes)} class; a classifier needs two or more")
        try:
            self._length = len(dataset)
        except TypeError as error:
            raise DataError(f"{self.name} has no length; expected a Dataset with len() and items by index") from error
        if self._length == 0:
            raise DataError(f"{self.name}: no images")
        self._dataset = dataset

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        item = self._dataset[index]
        try:
            image, label = item
            number = whole_number(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.describe(index)}: {error}; expected a pair of image and whole number") from error
        if not 0 <= number < len(self.classes):
            raise DataError(f"{self.describe(index)}: label {number}, expected 0 to {len(self.classes) - 1}")
        return load_image(image), number

    def describe(self, index: int) -> str:
        dataset, inner = self._inner(index)
        if isinstance(dataset, ImageRecords):
            return dataset.describe(inner)
        if isinstance(dataset, DatasetFolder):
            return str(dataset.samples[inner][0])
        return super().describe(index)

    def label(self, index: int) -> int:
        dataset, inner = self._inner(index)
        if isinstance(dataset, ImageRecords):
            return dataset.label(inner)
        known = getattr(dataset, "targets", None)
        if known is None or len(known) != len(dataset) or getattr(dataset, "target_transform", None) is not None:
            return super().label(index)
        return int(known[inner])

    def _inner(self, index: int) -> tuple[Any, int]:
        """The data set that an image comes from, behind any Subsets, and its number there."""
        dataset: Any = self._dataset
        while isinstance(dataset, Subset):
            dataset, index = dataset.dataset, dataset.indices[index]
        return dataset, index


def _own_classes(dataset: Any) -> Sequence[Any] | None:
    """`classes` of a data set, or of what a Subset (.dataset) or ConcatDataset (.datasets) is made from."""
    while dataset is not None:
        if getattr(dataset, "classes", None) is not None:
            return dataset.classes
        parts = getattr(dataset, "datasets", None) or [None]
        dataset = getattr(dataset, "dataset", parts[0])
    return None
