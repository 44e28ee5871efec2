"""Data sets: class folders, sets known by name as torchvision and the DeiT authors keep them, any torch Dataset."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torchvision import datasets

from ..config import nearest
from ..errors import ConfigError, DataError, MissingExtraError, first_line
from ..files import read_text
from .classes import wrap
from .columns import Columns, has_split, is_table, open_table
from .records import (
    SPLIT_FOLDER,
    SPLIT_FOLDERS,
    ArrayRecords,
    FileRecords,
    ImageRecords,
    SubsetRecords,
    check_classes,
    list_images,
    read_class_folders,
    some,
    split_of,
    subfolders,
)

logger = logging.getLogger(__name__)

SplitName = Literal["train", "val"]

_BY_NAME = {"cifar-10-b": "cifar10", "cifar-100": "cifar100", "flowers-102": "flowers102", "ILSVRC2012_": "imagenet"}
"""Beginnings of the names of files and folders that a data set known by name consists of."""
_ANNOTATIONS = "val_annotations.txt"
_NO_CLASS_FOLDERS = ("no class folders", "no images in class folder", "only one class", "look like splits")
_DEEPEST, _PLACES = 5, 200


def open_images(data: Any, split: SplitName, classes: tuple[str, ...] | None = None) -> ImageRecords:
    """Images in a form that `open_dataset` accepts; with `classes`, numbered as those are."""
    return open_dataset(data, split, classes=classes, own_folder=True)


def _numbered_as(records: ImageRecords, classes: Sequence[str] | None) -> ImageRecords:
    """The same images with other numbers for their classes. Raises: DataError: classes that are not expected."""
    if classes is None or tuple(classes) == records.classes:
        return records
    check_classes(records.classes, classes, where=records.name, all_of_them=False)
    return SubsetRecords(records, range(len(records)), classes=classes)


def open_dataset(
    source: Any,
    split: SplitName,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    classes: Sequence[str] | None = None,
    own_folder: bool = False,
    images: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_separator: str | None = None,
) -> ImageRecords:
    """The training or the validation images of a data set.

    Args:
        source: a folder with train/ and val/ (or validation/, valid/, dev/, test/, in any spelling: Training/,
            valid_set/), each with one folder of images a class, or one that holds nothing but such a folder; class
            folders themselves, which are a training set; or a name: cifar10, cifar100, flowers102, stanford_cars,
            imagenet, inaturalist-2018, -2019 or -2021. A colon asks for coarser classes: "inaturalist-2018:genus". A
            name wins over a folder of the same name in the working directory, which is "./cifar10". Or a table (CSV,
            TSV, JSONL, Parquet, a DataFrame), a data set of Hugging Face (an object, a folder that it was saved in or
            with its Parquet files, "hf:owner/name"), see docs/data.md; or what `wrap` accepts.
        split: "train" or "val".
        root: where a named data set lies, "data" by default; not for folders.
        download: fetch a named data set that is not there: cifar10, cifar100, flowers102 and inaturalist-2021 can be.
        classes: the training set's class names, which this set must have too; their order numbers the classes.
        own_folder: the source was named for this split, so one without splits is accepted for "val" too.
        images: the folder that the files of a table are relative to; default: the table's.
        image_column: the table's column of files or images; default: known by its name or type.
        label_column: the column of labels, or a column of 0 and 1 for each class; default: known by its name or type.
        label_separator: between the names of several classes in a cell; an image then has several labels, or none.

    Raises:
        DataError: no such folder or name, another layout, a class without images, fewer than two classes, classes other
            than `classes`, a named data set that is not there. One line each, with what to do.
        ConfigError: an unknown split; root or download with a folder; coarser classes that the set does not have.
        MissingExtraError: the labels of a named data set are MATLAB files, and scipy to read them is not installed.
    """
    if split not in SPLIT_FOLDERS:
        raise ConfigError(f"split={split!r}; expected 'train' or 'val'")
    columns = Columns.of(images, image_column, label_column, label_separator)
    if columns != Columns() and not is_table(source):
        raise ConfigError(
            "images and columns to choose (--images, --image-column, ...) belong to tables and data sets "
            "of Hugging Face"
        )
    if _is_named(source):
        where = Path("data" if root is None else root).expanduser()
        return _open_named(_Wanted(str(source), split, where, download, str(source).partition(":")[2]), classes)
    if root is not None or download:
        raise ConfigError(f"root and download belong to the data sets known by name ({', '.join(DATASETS)})")
    if is_table(source):
        found = open_table(source, split, columns, first=classes is None, own=own_folder)
    elif isinstance(source, (str, PathLike)):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise DataError(_not_there(source, folder))
        return _open_folder(folder, split, classes=classes, own_folder=own_folder)
    else:
        found = wrap(source, otherwise=classes)
    if split == "train" and len(found.classes) < 2:
        raise DataError(f"{found.name}: only one class, {some(found.classes)}; a classifier needs two or more")
    return _numbered_as(found, classes)


def has_validation(source: Any) -> bool:
    """Whether `open_dataset(source, "val")` has a set to open: a name, or a source with a split for it."""
    if _is_named(source) or is_table(source):
        return _is_named(source) or has_split(source, "val")
    folder = Path(source).expanduser() if isinstance(source, (str, PathLike)) else None
    return folder is not None and folder.is_dir() and "val" in _split_folders(_unwrapped(folder))


def _is_named(source: Any) -> bool:
    return isinstance(source, str) and source.partition(":")[0] in DATASETS


class _Wanted(NamedTuple):
    """A split of a data set known by name; `name` is as the user wrote it, `rank` stands behind its colon or is ""."""

    name: str
    split: str
    root: Path
    download: bool
    rank: str


def _open_named(wanted: _Wanted, classes: Sequence[str] | None) -> ImageRecords:
    name = wanted.name.partition(":")[0]
    if wanted.rank and not name.startswith("inaturalist"):
        raise ConfigError(f"{wanted.name}: only the iNaturalist sets have coarser classes to choose after a colon")
    records = _OPENERS[name](wanted)
    if len(records.classes) < 2:
        raise DataError(f"{wanted.name}: only one class, {records.classes[0]}; a classifier needs two or more")
    return _numbered_as(records, classes)


@contextmanager
def _explained(wanted: _Wanted, advice: str | None = None, *, folder: str = "") -> Iterator[None]:
    """Turn torchvision's errors into one line: our `advice`, or the state of the set's `folder`."""
    try:
        yield
    except (OSError, RuntimeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) or "scipy" in str(error):
            raise MissingExtraError(
                f"the labels of {wanted.name} are MATLAB files, which scipy reads: pip install scipy"
            ) from error
        place, reason = wanted.root / folder, first_line(error)
        if advice is not None:
            raise DataError(wanted.name + advice.format(folder=place, reason=reason)) from error
        raise DataError(_absent(wanted, place, reason)) from error


def _absent(wanted: _Wanted, folder: Path, reason: str = "") -> str:
    if wanted.download:
        return f"{wanted.name} could not be downloaded to {wanted.root}: {reason}"
    state = "damaged or incomplete" if folder.exists() else "not there"
    return f"{wanted.name}: {folder} is {state}; pass download=True (--download) or another root"


def _cifar(wanted: _Wanted, kind: type[Any]) -> ImageRecords:
    with warnings.catch_warnings(), _explained(wanted, folder=kind.base_folder):
        # the files were pickled long ago, in a way that NumPy 2.4 and later warn of
        warnings.simplefilter("ignore")
        found = kind(wanted.root, train=wanted.split == "train", download=wanted.download)
    return ArrayRecords(wanted.name, found.data, found.targets, found.classes)


def _imagenet(wanted: _Wanted) -> ImageRecords:
    archives = "ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar"
    advice = f"put {archives} from image-net.org there, or give the folder that holds train/ and val/ instead of a name"
    if wanted.download:
        raise DataError(f"{wanted.name} cannot be downloaded without an account; {advice}")
    with _explained(wanted, f" is not in {{folder}} ({{reason}}); {advice}"):
        found = datasets.ImageNet(wanted.root, split=wanted.split)
    labels = [", ".join(words) for words in found.classes]
    count = Counter(labels)  # "crane" is a bird and a machine
    classes = [
        f"{label} ({wnid})" if count[label] > 1 else label for label, wnid in zip(labels, found.wnids, strict=True)
    ]
    return FileRecords(wanted.name, "", (file for file, _ in found.samples), found.targets, classes)


def _flowers(wanted: _Wanted) -> ImageRecords:
    """Oxford Flowers: trained on the official training and validation images together, scored on the test images."""
    splits = ("train", "val") if wanted.split == "train" else ("test",)
    with _explained(wanted, folder="flowers-102"):
        parts = [datasets.Flowers102(wanted.root, split, download=wanted.download) for split in splits]
    files = (str(file) for part in parts for file in part._image_files)
    labels = [label for part in parts for label in part._labels]
    return FileRecords(wanted.name, "", files, labels, parts[0].classes)


def _cars(wanted: _Wanted) -> ImageRecords:
    advice = (
        ": devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat must lie in {folder} ({reason}); its "
        "authors' address is gone, so it is not downloaded for you"
    )
    with _explained(wanted, advice, folder="stanford_cars"):
        found = datasets.StanfordCars(wanted.root, split="train" if wanted.split == "train" else "test")
    files, labels = zip(*found._samples, strict=True)
    return FileRecords(wanted.name, "", files, map(int, labels), found.classes)


_RANKS_2021 = ("kingdom", "phylum", "class", "order", "family", "genus")
"""Names in a class folder's name, after its number: 00000_Animalia_Annelida_Clitellata_Haplotaxida_..."""


def _inaturalist_2021(wanted: _Wanted) -> ImageRecords:
    if wanted.rank and wanted.rank not in _RANKS_2021:
        raise ConfigError(f"{wanted.name}: no classes by {wanted.rank!r}{nearest(wanted.rank, _RANKS_2021)}")
    version = "2021_train" if wanted.split == "train" else "2021_valid"
    folder = wanted.root / version
    with _explained(wanted, folder=version):
        if wanted.download:
            datasets.INaturalist(wanted.root, version, download=True)
    if not folder.is_dir():
        raise DataError(_absent(wanted, folder))
    class_of = partial(_taxon, position=1 + _RANKS_2021.index(wanted.rank)) if wanted.rank else str
    return read_class_folders(folder, name=wanted.name, class_of=class_of)


def _taxon(folder: str, position: int) -> str:
    parts = folder.split("_")
    if len(parts) != 8:
        raise DataError(f"class folder {folder}: expected a number and seven taxonomic names, joined by underscores")
    return parts[position]


def _inaturalist_json(wanted: _Wanted, year: int) -> ImageRecords:
    """The competition's JSON files; classes are numbered as they appear in the training annotations.

    Source: the class INatDataset of the authors' datasets.py.
    """
    names = [f"train{year}.json", "categories.json"] + [f"val{year}.json"] * (wanted.split == "val")
    if wanted.download or not all((wanted.root / name).is_file() for name in names):
        raise DataError(
            f"{wanted.name}: {', '.join(names)} and the folder train_val{year} must lie in {wanted.root}; this set is "
            "not downloaded for you, its addresses are at github.com/visipedia/inat_comp"
        )
    training, categories, *others = (_read_json(wanted.root / name) for name in names)
    images = (others or [training])[0]
    try:
        class_of = _classes_of_categories(wanted, categories)
        numbers: dict[str, int] = {}
        for annotation in training["annotations"]:
            numbers.setdefault(class_of[int(annotation["category_id"])], len(numbers))
        files = [image["file_name"] for image in images["images"]]
        # The folder's name, as the authors read it, is the category's number: train_val2018/Aves/2761/x.jpg
        labels = [numbers[class_of[int(file.split("/")[2])]] for file in files]
        place = _place_of_files(wanted, files)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, (ConfigError, DataError)):
            raise
        raise DataError(f"{wanted.root}: {names[-1]} is not the competition's layout ({error!r})") from error
    return FileRecords(wanted.name, wanted.root, map(place, files), labels, numbers)


def _classes_of_categories(wanted: _Wanted, categories: list[dict[str, Any]]) -> Mapping[int, str]:
    rank = wanted.rank or "name"
    ranks = [key for key, value in categories[0].items() if isinstance(value, str)]
    if rank not in ranks:
        raise ConfigError(f"{wanted.name}: no classes by {rank!r}{nearest(rank, ranks)}")
    return {int(entry.get("id", position)): str(entry[rank]) for position, entry in enumerate(categories)}


def _place_of_files(wanted: _Wanted, files: Sequence[str]) -> Callable[[str], str]:
    """From a listed file to its place: as in the archive, or without the super-category, as the authors moved it."""
    if not files:
        raise DataError(f"{wanted.name}: no images for {wanted.split!r}")
    for place in (str, _without_supercategory):
        if (wanted.root / place(files[0])).is_file():
            return place
    raise DataError(
        f"{wanted.name}: {wanted.root / files[0]} is listed and not there, nor is it without its super-category's "
        f"folder; unpack the images' archive in {wanted.root}"
    )


def _without_supercategory(file: str) -> str:
    top, _, category, name = file.split("/")
    return f"{top}/{category}/{name}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error


_OPENERS: dict[str, Callable[[_Wanted], ImageRecords]] = {
    "cifar10": partial(_cifar, kind=datasets.CIFAR10),
    "cifar100": partial(_cifar, kind=datasets.CIFAR100),
    "flowers102": _flowers,
    "stanford_cars": _cars,
    "imagenet": _imagenet,
    "inaturalist-2018": partial(_inaturalist_json, year=2018),
    "inaturalist-2019": partial(_inaturalist_json, year=2019),
    "inaturalist-2021": _inaturalist_2021,
}
DATASETS = tuple(_OPENERS)
"""The names of data sets."""


def _not_there(source: str | os.PathLike[str], folder: Path) -> str:
    if folder.exists():
        return f"{folder}: not a folder; expected one with train/ and val/, or with a folder of images for each class"
    if not isinstance(source, str) or os.path.dirname(source):
        return f"{folder}: no such folder"
    return f"{source}: neither a folder, a table nor a data set known by name{nearest(source, DATASETS)}"


def _split_folders(folder: Path) -> dict[str, str]:
    """The folder of each split in a folder; none where it holds class folders.

    A set of vehicles may well have a class called "train": its folder holds images, a split's holds class folders.
    Where there is nothing but split folders, images right in them are a mistake and no classes "train" and "val". A
    test folder beside others may hold images without classes, and is then passed over.

    Raises: DataError: folders such as seg_train and seg_test, or several of one name.
    """
    found = subfolders(folder)
    named = {name: match for name in found if (match := SPLIT_FOLDER.fullmatch(name))}
    deep = {name for name in named if subfolders(folder / name)}
    if not named or (len(named) < len(found) and not deep and not {*SPLIT_FOLDERS} <= {*map(split_of, named)}):
        return {}
    present: dict[str, str] = {}
    unsure: dict[str, str] = {}
    for split, words in SPLIT_FOLDERS.items():
        for word in reversed(words):
            alike = [name for name, match in named.items() if match["word"].lower() == word]
            alike = [name for name in alike if name in deep or not deep or not word.startswith("test")]
            sure = [name for name in alike if split_of(name)]
            if len(sure) > 1:
                raise DataError(f"{folder}: {' and '.join(sure)} are one split by their names; join or rename them")
            if alike:
                (present if sure else unsure)[split] = (sure or alike)[0]
    unsure = {split: name for split, name in unsure.items() if split not in present and (name in deep or not present)}
    if unsure and len(both := {**present, **unsure}) == 2:
        raise DataError(
            f"{folder}: {both['train']} and {both['val']} look like splits, not like classes; rename them to train and "
            "val, or name each by itself"
        )
    return present


def _unwrapped(folder: Path) -> Path:
    """The folder, or one that lies alone in it, perhaps further down, and holds splits."""
    place = folder
    for _ in range(_DEEPEST):
        names = subfolders(place)
        if len(names) != 1 or SPLIT_FOLDER.fullmatch(names[0]):
            break
        place /= names[0]
    return place if _split_folders(place) else folder


def _open_folder(folder: Path, split: SplitName, *, classes: Sequence[str] | None, own_folder: bool) -> ImageRecords:
    name, folder = folder.resolve().name, _unwrapped(folder)
    if present := _split_folders(folder):
        if split in present:
            if split == "train" and (others := [one for one in subfolders(folder) if split_of(one) is None]):
                logger.warning("%s: images are read from %s, none from %s", folder, present[split], some(others))
            return _read_folder(folder / present[split], name, classes, fewest=1 + (split == "train"))
        expected = {"train": "train", "val": "val or validation or valid or test"}[split]
        raise DataError(f"{folder}: has {some([*present.values()])} but no {expected} folder with class folders")
    if split == "val" and not own_folder:
        raise DataError(
            f"{folder}: class folders without a split, which are a training set; put the images for validation into "
            "its folder val and the others into its folder train, or name a folder for validation alone"
        )
    return _read_folder(folder, name, classes, fewest=1 + (split == "train"))


def _read_folder(folder: Path, name: str, classes: Sequence[str] | None, *, fewest: int) -> ImageRecords:
    """Class folders, or images with Tiny ImageNet's list of their classes; errors come with a remedy.

    A folder that holds but one of its own name, as archives of train/train/, or one called images, stands for that.
    """
    if (folder / _ANNOTATIONS).is_file():
        return _read_annotations(folder, name, classes)
    if is_table(folder):
        return _numbered_as(open_table(folder, None, Columns(), first=classes is None), classes)
    inner = subfolders(folder)
    if len(inner) == 1 and inner[0].lower() in (folder.name.lower(), "images") and subfolders(folder / inner[0]):
        folder /= inner[0]
    try:
        return read_class_folders(folder, name=name, classes=classes, fewest=fewest)
    except DataError as error:
        if any(sign in error.args[0] for sign in _NO_CLASS_FOLDERS) and (hint := _hint(folder)):
            raise DataError(f"{error.args[0].partition(';')[0]}; {hint}") from error
        raise


def _read_annotations(folder: Path, name: str, classes: Sequence[str] | None) -> FileRecords:
    """Validation images as Tiny ImageNet keeps them: in the folder images, each with a line of file, class, box."""
    lines = read_text(folder / _ANNOTATIONS, error=DataError).splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or any(len(row) < 2 for row in rows):
        raise DataError(f"{folder / _ANNOTATIONS}: expected lines of a file's name, a tab and its class")
    found = sorted({row[1] for row in rows})
    if classes is not None:
        check_classes(found, classes, where=str(folder), all_of_them=False)
    numbers = {label: number for number, label in enumerate(found if classes is None else classes)}
    return FileRecords(name, folder / "images", (row[0] for row in rows), (numbers[row[1]] for row in rows), numbers)


def _hint(folder: Path) -> str:
    """A remedy for a folder that is no set of class folders; "" if there is none to see."""
    names = [folder, *sorted(folder.iterdir())]
    for path in names:
        if known := next((name for start, name in _BY_NAME.items() if path.name.startswith(start)), None):
            return f"{path.name} is opened by name: {known}, with root={str(path.parent)!r} (--root)"
    if images := list_images(folder, recursive=False)[0]:
        tables = [path for path in (*names, *folder.parent.iterdir()) if path.is_file() and is_table(path)]
        listed = f"name their table: {tables[0]}, with --images {folder}" if tables else "name a table of their classes"
        return f"{len(images)} images lie right in it: {listed}, or move each into its class's folder"
    waiting = [folder]
    for place in islice(waiting, _PLACES):
        inner = [place / name for name in subfolders(place)]
        training = [path / name for path in inner if split_of(path.name) == "train" for name in subfolders(path)[:1]]
        if any(list_images(path)[0] for path in training):
            return f"train is in {place}: name that folder"
        waiting += inner
    return ""
