"""Images of any form to look at: files, folders, tables, data sets. Labels are not needed, and given where known."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, groupby
from os import PathLike, fspath
from pathlib import Path
from typing import Any, overload

from ..errors import ConfigError, DataError, ImageError
from .classes import pairs_of
from .columns import Columns, is_table, open_table
from .datasets import open_images
from .records import (
    IMAGE_SUFFIXES,
    FileRecords,
    ImageRecords,
    SubsetRecords,
    list_images,
    read_class_folders,
    unread_files,
)

logger = logging.getLogger(__name__)

Undecoded = Path | tuple[str, bytes]
"""An image: its file, or a name and encoded bytes."""


class ImageSources(Sequence[Undecoded]):
    """Images in order, each read when it is asked for; small on their way to other processes."""

    def __init__(self, parts: Iterable[ImageRecords]) -> None:
        self._parts = [*parts]
        self._ends = [*accumulate(map(len, self._parts))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Undecoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Undecoded]: ...

    def __getitem__(self, index: int | slice) -> Undecoded | list[Undecoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        records, inner = self._place(index)
        return records.source(inner)

    def name(self, index: int) -> str:
        """The image's path, or its number and its set's name, without reading it."""
        records, inner = self._place(index)
        return records.describe(inner)

    def label(self, index: int) -> str | tuple[str, ...] | None:
        """Name of the image's class, or of each of them where there may be several; None: unknown."""
        records, inner = self._place(index)
        if not records.classes:
            return None
        label = records.label(inner)
        if isinstance(label, tuple):
            return tuple(records.classes[number] for number in label)
        return records.classes[label] if label >= 0 else None

    def chosen(self, wanted: Callable[[str], bool]) -> ImageSources:
        """Those whose name is wanted."""
        return ImageSources(
            SubsetRecords(part, [i for i in range(len(part)) if wanted(part.describe(i))]) for part in self._parts
        )

    def _place(self, index: int) -> tuple[ImageRecords, int]:
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


def image_sources(
    source: Any,
    *,
    labelled: bool = False,
    recursive: bool = True,
    images: str | PathLike[str] | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_separator: str | None = None,
) -> ImageSources:
    """The images of any source, of all its splits, in a fixed order.

    Args:
        source: an image file, a folder, which is searched, another form that `open_dataset` accepts, or a list of such;
            the result of this function as it is. A file that is not there counts as an image that cannot be read.
        labelled: whether labels are needed: a folder is then one with a folder of images for each class.
        recursive: search the folders in a folder too.
        images: these four: see `open_dataset`.
        image_column: of a table.
        label_column: of a table.
        label_separator: of a table.

    Raises: ImageError: a folder without images. DataError: a folder that cannot be read; no labels, if they are needed;
        and the errors of `open_dataset`.
    """
    if isinstance(source, ImageSources):
        return source
    listed = source if isinstance(source, (list, tuple)) and not pairs_of(source) else [source]
    columns = Columns.of(images, image_column, label_column, label_separator)
    if columns != Columns() and not any(map(is_table, listed)):
        raise ConfigError(
            "columns to choose (--images, --image-column, ...) belong to tables and data sets of Hugging Face"
        )
    parts: list[ImageRecords] = []
    for alone, group in groupby(listed, _is_one_image):
        some = [*group]
        if alone and labelled:
            raise DataError(f"{some[0]}: an image alone has no label; expected a folder for each class, or a table")
        if alone:
            parts.append(_unlabelled("", map(fspath, some)))
        else:
            parts += [_opened(one, columns, labelled=labelled, recursive=recursive) for one in some]
    return ImageSources(parts)


def _is_one_image(source: Any) -> bool:
    return isinstance(source, (str, PathLike)) and not os.path.isdir(source) and not is_table(source)


def _opened(source: Any, columns: Columns, *, labelled: bool, recursive: bool) -> ImageRecords:
    if is_table(source):
        return open_table(source, None, columns, labelled=labelled)
    if isinstance(source, (str, PathLike)):
        folder = Path(source)
        return read_class_folders(folder, fewest=1) if labelled else _folder(folder, recursive=recursive)
    return open_images(source, "val")


def _unlabelled(root: str | Path, files: Iterable[str]) -> FileRecords:
    listed = [*files]
    return FileRecords(fspath(root), root, listed, [-1] * len(listed), ())


def _folder(folder: Path, *, recursive: bool) -> FileRecords:
    """The images of a folder, by the names of folders and files; see `find_images`."""
    if not folder.is_dir():
        raise ImageError(
            f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}; expected one of images"
        )
    found, unread = list_images(folder, recursive=recursive)
    if not found:
        where = "in it or below" if recursive else "directly in it"
        reason = unread_files(unread) if unread else f"looked for {' '.join(IMAGE_SUFFIXES)}"
        raise ImageError(f"{folder}: no image {where}; {reason}")
    if unread:
        logger.warning("%s: %s", folder, unread_files(unread))
    return _unlabelled(folder, sorted(found, key=lambda name: name.split("/")))


def find_images(folder: str | PathLike[str], *, recursive: bool = True) -> list[Path]:
    """The image files of a folder, sorted; they are known by IMAGE_SUFFIXES, see `list_images` for what is left out.

    Files that look like images and cannot be read here, such as HEIC without pillow-heif, are counted in a warning.

    Raises: ImageError: no such folder, or no image in it. DataError: a folder in it cannot be read.
    """
    root = Path(folder)
    records = _folder(root, recursive=recursive)
    return [root / records.key(index) for index in range(len(records))]
