"""Data sets known by name, in the layouts that torchvision and the DeiT authors' scripts keep them in."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torchvision import datasets

from ..config import nearest
from ..errors import ConfigError, DataError, MissingExtraError
from .records import ArrayRecords, FileRecords, ImageRecords, check_classes, read_class_folders


class _Wanted(NamedTuple):
    name: str
    """As the user wrote it: "inaturalist-2018:genus"."""
    split: str
    root: Path
    download: bool
    rank: str
    """What stands behind the colon: "genus", or ""."""


def open_named(
    source: str, split: str, root: Path, *, download: bool, classes: Sequence[str] | None = None
) -> ImageRecords:
    """One split of a data set known by name; the arguments are those of `datasets.open_dataset`.

    Raises: DataError: not there, damaged, or other classes than `classes`. ConfigError: coarser classes that it does
        not have. MissingExtraError: ImageNet's archives are there, and scipy to read them is not.
    """
    name, _, rank = source.partition(":")
    records = _OPENERS[name](_Wanted(source, split, root, download, rank))
    if len(records.classes) < 2:
        raise DataError(f"{source}: only one class, {', '.join(records.classes)}; a classifier needs two or more")
    if classes is not None and tuple(classes) != records.classes:
        check_classes(records.classes, classes, where=source)
        raise DataError(f"{source}: the training set's classes stand in another order; use the same data set for both")
    return records


def _cifar(wanted: _Wanted, kind: type[Any]) -> ImageRecords:
    _refuse_rank(wanted)
    try:
        with warnings.catch_warnings():
            # The files were pickled long ago, in a way that NumPy 2.4 and later warn of
            warnings.simplefilter("ignore")
            found = kind(wanted.root, train=wanted.split == "train", download=wanted.download)
    except (OSError, RuntimeError) as error:
        raise DataError(_absent(wanted, kind.base_folder, error)) from error
    return ArrayRecords(wanted.name, found.data, found.targets, found.classes)


def _imagenet(wanted: _Wanted) -> ImageRecords:
    _refuse_rank(wanted)
    archives = "ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar"
    advice = f"put {archives} from image-net.org there, or give the folder that holds train/ and val/ instead of a name"
    if wanted.download:
        raise DataError(f"{wanted.name} cannot be downloaded without an account; {advice}")
    try:
        found = datasets.ImageNet(wanted.root, split=wanted.split)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{wanted.name} is not in {wanted.root} ({_first_line(error)}); {advice}") from error
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"reading {archives.split()[0]} needs {error.name}: pip install {error.name}"
        ) from error
    labels = [", ".join(words) for words in found.classes]
    count = Counter(labels)  # "crane" is a bird and a machine
    classes = [
        f"{label} ({wnid})" if count[label] > 1 else label for label, wnid in zip(labels, found.wnids, strict=True)
    ]
    return FileRecords(wanted.name, "", (file for file, _ in found.samples), found.targets, classes)


def _flowers(wanted: _Wanted) -> ImageRecords:
    """Oxford Flowers: trained on the official training and validation images together, scored on the test images."""
    _refuse_rank(wanted)
    splits = ("train", "val") if wanted.split == "train" else ("test",)
    try:
        parts = [datasets.Flowers102(wanted.root, split, download=wanted.download) for split in splits]
    except ModuleNotFoundError as error:
        raise _needs_scipy(wanted) from error
    except (OSError, RuntimeError) as error:
        raise DataError(_absent(wanted, "flowers-102", error)) from error
    files = (str(file) for part in parts for file in part._image_files)
    labels = [label for part in parts for label in part._labels]
    return FileRecords(wanted.name, "", files, labels, parts[0].classes)


def _cars(wanted: _Wanted) -> ImageRecords:
    _refuse_rank(wanted)
    folder = wanted.root / "stanford_cars"
    names = "devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
    try:
        found = datasets.StanfordCars(wanted.root, split="train" if wanted.split == "train" else "test")
    except (OSError, RuntimeError) as error:
        if "scipy" in str(error):
            raise _needs_scipy(wanted) from error
        raise DataError(
            f"{wanted.name}: {names} must lie in {folder} ({_first_line(error)}); its authors' address is gone, so it "
            "is not downloaded for you"
        ) from error
    files, labels = zip(*found._samples, strict=True)
    return FileRecords(wanted.name, "", files, map(int, labels), found.classes)


def _needs_scipy(wanted: _Wanted) -> MissingExtraError:
    return MissingExtraError(f"the labels of {wanted.name} are MATLAB files, which scipy reads: pip install scipy")


_RANKS_2021 = ("kingdom", "phylum", "class", "order", "family", "genus")
"""What a class folder's name gives after its number: 00000_Animalia_Annelida_Clitellata_Haplotaxida_..."""


def _inaturalist_2021(wanted: _Wanted) -> ImageRecords:
    if wanted.rank and wanted.rank not in _RANKS_2021:
        raise ConfigError(f"{wanted.name}: no classes by {wanted.rank!r}{nearest(wanted.rank, _RANKS_2021)}")
    version = "2021_train" if wanted.split == "train" else "2021_valid"
    folder = wanted.root / version
    try:
        if wanted.download:
            datasets.INaturalist(wanted.root, version, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(_absent(wanted, version, error)) from error
    if not folder.is_dir():
        raise DataError(_absent(wanted, version, None))
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
    """Where a listed file lies: as the archive has it, or without the super-category, as the authors moved them."""
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


def _refuse_rank(wanted: _Wanted) -> None:
    if wanted.rank:
        raise ConfigError(f"{wanted.name}: only the iNaturalist sets have coarser classes to choose after a colon")


def _absent(wanted: _Wanted, folder: str, error: Exception | None) -> str:
    if wanted.download:
        return f"{wanted.name} could not be downloaded to {wanted.root}: {_first_line(error)}"
    reason = "damaged or incomplete" if (wanted.root / folder).exists() else "not there"
    return f"{wanted.name}: {wanted.root / folder} is {reason}; pass download=True (--download) or another root"


def _first_line(error: Exception | None) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
"""The names."""
