"""Labelled images: the interface for training and evaluation, its implementations, and the scan of class folders."""

from __future__ import annotations

import io
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, ImageError
from ..images.decoding import HEIF_SUFFIXES, load_image, reads_heif

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = tuple(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pfm .pgm .png .pnm .ppm .tga .tif "
    ".tiff .webp".split()
)
"""Files with these suffixes, in upper or lower case, are images: in training, evaluation and prediction."""
_UNREAD_SUFFIXES = tuple(".arw .cr2 .cr3 .dng .jxl .nef .orf .psd .raf .raw .rw2 .svg".split())
_NO_IMAGES = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that operating systems and servers make; like hidden ones they hold no images of the user's."""

SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "development", "eval", "evaluation", "test", "testing"),
}
"""Words for a split's folder, in the order they are looked for."""
SPLIT_FOLDER = re.compile(
    rf"(?P<before>.*[\W_])?(?P<word>{'|'.join(sum(SPLIT_FOLDERS.values(), ()))})"
    r"[\W_]*(?:data|folder|images|set|split)?[\W_]*\d*(?P<after>[\W_].*|[a-z])?",
    re.IGNORECASE,
)
"""A split's folder, such as Train, valid_set, VAL2017; with more around the word, it is one by suspicion only."""


def split_of(name: str) -> str | None:
    """Split that a folder's name stands for, "train" or "val"; None: neither, or by suspicion only."""
    match = SPLIT_FOLDER.fullmatch(name)
    if match is None or match["before"] or match["after"]:
        return None
    return next(split for split, words in SPLIT_FOLDERS.items() if match["word"].lower() in words)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, and not hidden."""
    known = name.lower().endswith(IMAGE_SUFFIXES) or (name.lower().endswith(HEIF_SUFFIXES) and reads_heif())
    return known and not name.startswith(".")


Label = int | tuple[int, ...]
"""Number of an image's class; of a set with several labels an image, the numbers in ascending order, perhaps none."""


class Labels:
    """Labels of many images in one or two blocks of memory, see `FileRecords`.

    Attributes:
        multi: whether each is a tuple, as the first one is.
    """

    def __init__(self, labels: Iterable[Label]) -> None:
        rest = iter(labels)
        first = next(rest, None)
        self.multi = isinstance(first, tuple)
        self._numbers, self._ends = array("q"), array("q", [0] * self.multi)
        every: Iterator[Any] = chain([] if first is None else [first], rest)
        if not self.multi:
            self._numbers.extend(every)
        for label in every:
            self._numbers.extend(label)
            self._ends.append(len(self._numbers))

    def __len__(self) -> int:
        return len(self._ends) - 1 if self.multi else len(self._numbers)

    def __getitem__(self, index: int) -> Label:
        if not self.multi:
            return self._numbers[index]
        index = range(len(self))[index]
        return tuple(self._numbers[self._ends[index] : self._ends[index + 1]])


class ImageRecords(Dataset[tuple[Any, Label]]):
    """Labelled images: item i is (RGB PIL image, label from 0 to len(classes) - 1).

    In the place of a PIL image there may be its levels, (C, H, W) uint8, where C is neither 1 nor 3. Where
    `multi_label` is True, a label is a tuple of numbers of classes, see `Label`.

    A subclass sets `name` and `classes` and gives `__len__`, `__getitem__` and, where it can, `describe`; an image that
    cannot be read raises ImageError or OSError, so that the run can go on without it.
    """

    name: str
    """The set's name in messages."""
    classes: tuple[str, ...]
    """Class names in the order of their labels."""
    multi_label: bool = False
    """Whether an image has several labels, or none."""

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} does not define __len__")

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        raise NotImplementedError(f"{type(self).__name__} does not define __getitem__")

    def describe(self, index: int) -> str:
        """The source of an image, for messages: its file, or its number and the set's name."""
        return f"image {index} of {self.name}"

    def key(self, index: int) -> str:
        """A name of an image that does not depend on the set's place: its file below the root, or its number."""
        return str(index)

    def label(self, index: int) -> Label:
        """The label alone; subclasses give it without reading the image where they can."""
        return self[index][1]

    @property
    def knows_labels(self) -> bool:
        """Whether `label` reads no image."""
        return type(self).label is not ImageRecords.label

    def source(self, index: int) -> Path | tuple[str, bytes]:
        """An image before it is decoded: its file, or a name and encoded bytes."""
        image, buffer = self[index][0], io.BytesIO()
        if isinstance(image, Tensor):
            raise DataError(f"{self.describe(index)}: {len(image)} channels, which no image file holds")
        image.save(buffer, "PNG", compress_level=1)
        return self.describe(index), buffer.getvalue()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {len(self)} images, {len(self.classes)} classes)"


class LabelledRecords(ImageRecords):
    """Images whose labels are in memory; a subclass gives `__getitem__`."""

    def __init__(self, name: str, labels: Iterable[Label], classes: Iterable[str]) -> None:
        """Note the labels; the classes are drawn after them."""
        self.name, self._labels, self.classes = name, Labels(labels), tuple(classes)
        self.multi_label = self._labels.multi

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> Label:
        return self._labels[index]


class FileRecords(LabelledRecords):
    """Images in files, decoded by `load_image` when they are read."""

    always_the_same = True

    def __init__(
        self, name: str, root: str | Path, files: Iterable[str], labels: Iterable[Label], classes: Iterable[str]
    ) -> None:
        """Note the files, relative to root, then their labels; no file is opened."""
        self._root = os.fspath(root)
        # Three blocks of memory instead of a million objects: workers that fork would copy those as soon as they count
        # a reference to them, and workers that spawn would unpickle them one by one
        names, self._ends = bytearray(), array("q", [0])
        for file in files:
            names += os.fsencode(file)
            self._ends.append(len(names))
        self._names = bytes(names)
        super().__init__(name, labels, classes)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, Label]:
        return load_image(self.describe(index)), self._labels[index]

    def source(self, index: int) -> Path | tuple[str, bytes]:
        return Path(self.describe(index))

    def describe(self, index: int) -> str:
        return os.path.join(self._root, self.key(index))

    def key(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])


class ArrayRecords(LabelledRecords):
    """Images in memory: an (N, H, W, 3) uint8 array."""

    always_the_same = True

    def __init__(self, name: str, images: Any, labels: Iterable[Label], classes: Iterable[str]) -> None:
        super().__init__(name, labels, classes)
        self._images = images

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, Label]:
        return PIL.Image.fromarray(self._images[index]), self._labels[index]


class CachedRecords(ImageRecords):
    """A set whose images have one size and are decoded already; its names and messages are the set's own.

    Attributes:
        images: (N, 3, H, W) uint8, perhaps shared with other processes.
        labels: (N,) int64, or (N, len(classes)) of 0 and 1; without meaning where the image cannot be read.
        broken: images that cannot be read, by index, and why.
    """

    always_the_same = True

    def __init__(self, records: ImageRecords, images: Tensor, labels: Tensor, broken: Mapping[int, str]) -> None:
        self.name, self.classes, self.multi_label = records.name, records.classes, records.multi_label
        self.images, self.labels, self.broken = images, labels, dict(broken)
        self._records = records

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every image."""
        return self.images.shape[2], self.images.shape[3]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, Label]:
        index = self.readable(range(len(self))[index])
        height, width = self.size
        pixels = self.images[index].permute(1, 2, 0).contiguous().numpy().tobytes()
        image = PIL.Image.frombytes("RGB", (width, height), pixels)
        return image, self._records.label(index) if self.multi_label else int(self.labels[index])

    def readable(self, index: int) -> int:
        """The same index. Raises: ImageError: the image cannot be read."""
        if index in self.broken:
            raise ImageError(self.broken[index])
        return index

    def label(self, index: int) -> Label:
        return self._records.label(index)

    def source(self, index: int) -> Path | tuple[str, bytes]:
        return self._records.source(index)

    def describe(self, index: int) -> str:
        return self._records.describe(index)

    def key(self, index: int) -> str:
        return self._records.key(index)


class SubsetRecords(ImageRecords):
    """Some of the images of another set, in a given order; perhaps of some of its classes only."""

    def __init__(self, records: ImageRecords, indices: Iterable[int], *, classes: Sequence[str] | None = None) -> None:
        """Note which images.

        Args:
            records: the whole set.
            indices: of the wanted images.
            classes: names that the images' labels are among, which number the labels anew; default: those of `records`.
        """
        self.name, self.multi_label = records.name, records.multi_label
        self.classes = records.classes if classes is None else tuple(classes)
        self._records = records
        self._indices = array("q", indices)
        wanted = {name: number for number, name in enumerate(self.classes)}
        self._numbers = {number: wanted[name] for number, name in enumerate(records.classes) if name in wanted}
        self._numbers[-1] = -1  # unknown

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        image, label = self._records[self._indices[index]]
        return image, self._renumbered(label)

    def label(self, index: int) -> Label:
        return self._renumbered(self._records.label(self._indices[index]))

    @property
    def knows_labels(self) -> bool:
        return self._records.knows_labels

    def _renumbered(self, label: Label) -> Label:
        if isinstance(label, tuple):
            return tuple(sorted(self._numbers[number] for number in label))
        return self._numbers[label]

    def source(self, index: int) -> Path | tuple[str, bytes]:
        return self._records.source(self._indices[index])

    def describe(self, index: int) -> str:
        return self._records.describe(self._indices[index])

    def key(self, index: int) -> str:
        return self._records.key(self._indices[index])


def always_the_same(records: ImageRecords) -> bool:
    """Whether an image is the same each time it is read, as in our own sets; other sets and subclasses may draw."""
    if type(records) is SubsetRecords:
        return always_the_same(records._records)
    return bool(vars(type(records)).get("always_the_same", False))


def subfolders(folder: str | Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones. Raises: DataError: it cannot be read."""
    return _listed(folder)[1]


def _listed(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder, sorted, without hidden ones."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in _NO_IMAGES:
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return sorted(files), sorted(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link that leads to itself is a file that cannot be read, not the folder's end."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_images(folder: str | Path, *, recursive: bool = True) -> tuple[list[str], list[str]]:
    """Images in a folder and below it, relative to it and folder by folder; and files that only look like images.

    Hidden folders and those of operating systems are left out. Links are followed, though no folder is read twice, nor
    one that holds `folder`.

    Raises: DataError: a folder cannot be read.
    """
    images, unread = [], []
    for prefix, files in _walk(folder, recursive=recursive):
        for name in files:
            if is_image(name):
                images.append(prefix + name)
            elif name.lower().endswith(HEIF_SUFFIXES + _UNREAD_SUFFIXES):
                unread.append(prefix + name)
    return images, unread


def _walk(folder: str | Path, *, recursive: bool = True) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it as `list_images` goes through them: the prefix of their files' names, the names."""
    seen = {_identity(parent) for parent in Path(folder).resolve().parents}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        place = os.path.join(folder, prefix) if prefix else folder
        if (identity := _identity(place)) in seen:
            continue
        seen.add(identity)
        files, folders = _listed(place)
        yield prefix, files
        waiting += [f"{prefix}{name}/" for name in reversed(folders)] if recursive else []


def _identity(folder: str | Path) -> tuple[int, int]:
    """The same for every name of a folder."""
    try:
        found = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return found.st_dev, found.st_ino


def unread_files(names: Sequence[str]) -> str:
    """A line on files that look like images and cannot be read, with the remedy."""
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    heif = "pip install pillow-heif, which reads HEIC, or " if suffixes & {*HEIF_SUFFIXES} else ""
    kinds = ", ".join(sorted(suffixes))
    return f"{len(names)} image files that cannot be read here ({kinds}); {heif}convert them to JPEG or PNG"


def read_class_folders(
    folder: Path,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    class_of: Callable[[str], str] = str,
    fewest: int = 2,
) -> FileRecords:
    """A folder with one folder of images a class; classes are numbered in the order of their folders' names.

    Args:
        folder: holds the class folders.
        name: of the set in messages; default: the folder's name.
        classes: expected names; their order numbers the classes.
        class_of: from a folder's name to its class's, where several folders make one class.
        fewest: classes that are needed.

    Empty folders, and expected classes without one, are named in a warning. Images in folders of a class folder are of
    that class; a warning says so where a class folder holds nothing else.

    Raises: DataError: fewer classes, a class folder with other files only, classes that are not expected.
    """
    names = subfolders(folder)
    if not names:
        raise DataError(f"{folder}: no class folders; expected one folder of images for each class")
    _check_spelling(folder, names)
    listed = {entry: list_images(folder / entry) for entry in names}
    folders = _filled(folder, listed)
    found = list(dict.fromkeys(map(class_of, folders)))
    if classes is not None:
        check_classes(found, classes, where=str(folder), all_of_them=False)
    numbers = {label: number for number, label in enumerate(found if classes is None else classes)}
    unread = [name for entry in folders for name in listed[entry][1]]
    advice = unread_files(unread) if unread else ""
    if empty := [entry for entry in folders if not listed[entry][0]]:
        expected = advice or "expected .jpg, .png and other image files; move it elsewhere if it is no class"
        raise DataError(f"{folder}: no images in class folder {some(empty)}; {expected}")
    if advice:
        logger.warning("%s: %s", folder, advice)
    nested = _nested(folder, listed)
    if len(numbers) < fewest or (len(numbers) == 1 and nested):
        hint = f"; are they in {folder / folders[0]}?" if nested else ""
        raise DataError(f"{folder}: only one class, {found[0]}; a classifier needs two or more class folders{hint}")
    if nested:
        logger.warning(
            "%s: classes are the %d folders in it; images in folders below, as %s, are of the class above",
            *(folder, len(folders), some(nested)),
        )
    labels = array("q")
    for entry in folders:
        labels.extend([numbers[class_of(entry)]] * len(listed[entry][0]))
    files = (f"{entry}/{image}" for entry in folders for image in listed.pop(entry)[0])
    return FileRecords(name or folder.resolve().name, folder, files, labels, numbers)


def _filled(folder: Path, listed: Mapping[str, tuple[list[str], list[str]]]) -> list[str]:
    """Folders with any file in them or below, hidden ones aside; a warning names the others."""
    empty = [name for name, (images, _) in listed.items() if not images and not _has_files(folder / name)]
    if len(empty) == len(listed):
        raise DataError(f"{folder}: no images in class folder {some(empty)}, nor any other file")
    if empty:
        logger.warning("%s: no class for empty folders: %s", folder, some(empty))
    return [name for name in listed if name not in {*empty}]


def _has_files(folder: Path) -> bool:
    return any(files for _, files in _walk(folder))


def _nested(folder: Path, listed: Mapping[str, tuple[list[str], list[str]]]) -> list[str]:
    """Folders of images within class folders that have no image beside them. Raises: DataError: they are splits."""
    nested = [
        f"{entry}/{inner}"
        for entry, (images, _) in listed.items()
        if all("/" in image for image in images)
        for inner in dict.fromkeys(image.partition("/")[0] for image in images)
    ]
    if {"train", "val"} <= {split_of(path.partition("/")[2]) for path in nested}:
        raise DataError(
            f"{folder}: folders within folders that look like splits, {some(nested)}; name the folder that holds train "
            "and val, or move each class into both"
        )
    return nested


def _check_spelling(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError for a name that is no Unicode text, as after a bad unzip: names are written into config.json."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{folder}: class folder {os.fsencode(name)!r} is not named in UTF-8; rename it") from error


def check_classes(found: Sequence[str], expected: Sequence[str], *, where: str, all_of_them: bool = True) -> None:
    """Raise DataError unless two sets have the same class names; the order may differ.

    Unless `all_of_them` must be there, a warning names the missing ones.
    """
    here, there = set(found), set(expected)
    missing = [name for name in expected if name not in here]
    extra = [name for name in found if name not in there]
    if missing and not extra and not all_of_them:
        logger.warning("%s: no images of %s", where, some(missing))
    elif missing or extra:
        parts = [f"missing {some(missing)}"] * bool(missing) + [f"not in training {some(extra)}"] * bool(extra)
        raise DataError(f"{where}: not the {len(expected)} classes of the training set: {'; '.join(parts)}")


def some(names: Sequence[str]) -> str:
    """At most three names of a list, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
