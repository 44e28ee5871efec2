"""Data sets known by name, each read from a tiny copy in its own layout on disk."""

import json
import os
import pickle
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import datasets

from deit_models.data.datasets import open_dataset
from deit_models.errors import ConfigError, DataError, MissingExtraError


def write_image(path: Path, grey: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), (grey, grey, grey)).save(path)


# CIFAR

CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


@pytest.fixture(params=CIFAR)
def cifar(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a data set of which torchvision finds three images a file in tmp_path."""
    kind = CIFAR[request.param]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    key = "labels" if request.param == "cifar10" else "fine_labels"
    for number, (file, _) in enumerate(kind.train_list + kind.test_list):
        images = np.zeros((3, 3072), np.uint8)
        images[:, :1024] = 10 * number + np.arange(3)[:, None]  # red first, then green and blue, row by row
        images[:, 1024:1056] = 255  # the first row of green
        (folder / file).write_bytes(pickle.dumps({"data": images, key: [0, 1, number % 2]}))
    meta = {kind.meta["key"]: ["cat", "dog"]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    # these files have other checksums
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, _: os.path.isfile(path))
    return request.param


def test_cifar_is_read_as_torchvision_reads_it(cifar: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        records = open_dataset(cifar, split, root=tmp_path)
        theirs = CIFAR[cifar](tmp_path, train=split == "train")
        assert len(records) == len(theirs) == (15 if (cifar, split) == ("cifar10", "train") else 3)
        assert records.classes == ("cat", "dog")
        for index in range(len(records)):
            assert records[index][0].tobytes() == theirs[index][0].tobytes()
            assert records[index][1] == theirs[index][1]
    assert records[1][0].getpixel((0, 0))[1:] == (255, 0)
    assert records[1][0].getpixel((0, 1))[1:] == (0, 0)
    assert records.describe(2) == f"image 2 of {cifar}"


def test_validation_classes_must_be_the_training_sets(cifar: str, tmp_path: Path) -> None:
    assert len(open_dataset(cifar, "val", root=tmp_path, classes=("cat", "dog"))) == 3
    with pytest.raises(
        DataError, match=f"{cifar}: not the 2 classes of the training set: missing bird; not in training cat"
    ):
        open_dataset(cifar, "val", root=tmp_path, classes=["dog", "bird"])
    plain, turned = (open_dataset(cifar, "val", root=tmp_path, classes=names) for names in (None, ["dog", "cat"]))
    assert [turned[i][1] for i in range(3)] == [1 - plain[i][1] for i in range(3)]


def test_default_root_is_the_folder_data(cifar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/data").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    assert len(open_dataset(cifar, "val")) == 3


def test_incomplete_cifar_is_told_from_an_absent_one(cifar: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not there; pass download=True \(--download\) or another root"):
        open_dataset(cifar, "train", root=tmp_path / "elsewhere")
    folder = CIFAR[cifar].base_folder
    (tmp_path / folder / CIFAR[cifar].test_list[0][0]).unlink()
    with pytest.raises(DataError, match=f"{cifar}: .*{folder} is damaged or incomplete; pass download=True"):
        open_dataset(cifar, "train", root=tmp_path)


@pytest.fixture
def no_network() -> Iterator[None]:
    """A proxy that nobody listens behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{free.getsockname()[1]}"
    handler = urllib.request.ProxyHandler({"http": proxy, "https": proxy})
    urllib.request.install_opener(urllib.request.build_opener(handler))
    yield
    urllib.request.install_opener(urllib.request.build_opener())


@pytest.mark.usefixtures("no_network")
def test_failed_download_is_one_line(cifar: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{cifar} could not be downloaded to .*Connection refused>$"):
        open_dataset(cifar, "train", root=tmp_path / "elsewhere", download=True)
    assert len(open_dataset(cifar, "val", root=tmp_path, download=True)) == 3  # there already


def test_sets_without_ranks_refuse_one(tmp_path: Path) -> None:
    for name in ("cifar10:genus", "imagenet:genus"):
        with pytest.raises(ConfigError, match=f"{name}: only the iNaturalist sets have coarser classes"):
            open_dataset(name, "train", root=tmp_path)


# Flowers and Cars, whose labels are MATLAB files


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    savemat = pytest.importorskip("scipy.io").savemat
    folder = tmp_path / "flowers-102"
    for number in range(1, 7):
        write_image(folder / "jpg" / f"image_{number:05}.jpg", grey=40 * number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 102, 1, 2, 102]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[4, 5]], "tstid": [[3, 6]]})
    # these files have other checksums
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, _: os.path.isfile(path))
    return tmp_path


def test_flowers_are_trained_on_two_splits_and_scored_on_the_third(flowers: Path) -> None:
    train = open_dataset("flowers102", "train", root=flowers)
    test = open_dataset("flowers102", "val", root=flowers, classes=train.classes)
    assert [(Path(train.describe(i)).stem, train[i][1], train.label(i)) for i in range(4)] == [
        ("image_00001", 0, 0), ("image_00002", 1, 1), ("image_00004", 0, 0), ("image_00005", 1, 1),
    ]  # fmt: skip
    assert [test[i][1] for i in range(2)] == [101, 101]
    assert len(train.classes) == 102
    assert train.classes[0] == "pink primrose"


def test_absent_flowers_can_be_fetched(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    with pytest.raises(DataError, match=r"flowers-102 is not there; pass download=True"):
        open_dataset("flowers102", "train", root=tmp_path)


@pytest.fixture
def cars(tmp_path: Path) -> Path:
    savemat = pytest.importorskip("scipy.io").savemat
    folder = tmp_path / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([("a.jpg", 2), ("b.jpg", 1)], dtype=[("fname", object), ("class", object)])
        savemat(folder / file, {"annotations": rows})
        for name in ("a", "b"):
            write_image(folder / f"cars_{split}" / f"{name}.jpg")
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["Acura RL Sedan 2012", "BMW M3"], dtype=object)})
    return tmp_path


def test_cars_are_read_as_torchvision_reads_them(cars: Path) -> None:
    for split, theirs in (("train", "train"), ("val", "test")):
        records = open_dataset("stanford_cars", split, root=cars)
        expected = datasets.StanfordCars(cars, split=theirs)._samples
        assert [(records.describe(i), records[i][1]) for i in range(2)] == expected
        assert [records.label(i) for i in range(2)] == [1, 0]
    assert records.classes == ("Acura RL Sedan 2012", "BMW M3")


def test_absent_cars_say_which_files_belong_there(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    for download in (False, True):
        with pytest.raises(
            DataError, match=r"devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat must lie"
        ):
            open_dataset("stanford_cars", "train", root=tmp_path, download=download)


@pytest.mark.usefixtures("flowers")
def test_missing_scipy_is_named(cars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("flowers102", "stanford_cars"):
        with pytest.raises(MissingExtraError, match=f"labels of {name} are MATLAB files.* pip install scipy"):
            open_dataset(name, "train", root=cars)


# ImageNet


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    words = {"n01": ("tench", "Tinca tinca"), "n02": ("crane",), "n03": ("crane",)}
    torch.save((words, ["n02"]), tmp_path / "meta.bin")
    for grey, wnid in enumerate(words):
        write_image(tmp_path / "train" / wnid / "b.JPEG", grey)
        write_image(tmp_path / "train" / wnid / "a.JPEG", grey)
        write_image(tmp_path / "val" / wnid / "x.JPEG", grey)
    return tmp_path


def test_imagenet_is_read_as_torchvision_reads_it(imagenet: Path) -> None:
    for split in ("train", "val"):
        records = open_dataset("imagenet", split, root=imagenet)
        theirs = datasets.ImageNet(imagenet, split)
        assert [(records.describe(i), records[i][1]) for i in range(len(records))] == theirs.samples
    assert records.classes == ("tench, Tinca tinca", "crane (n02)", "crane (n03)")
    assert open_dataset(imagenet, "val").classes == ("n01", "n02", "n03")


def test_absent_imagenet_says_which_files_belong_there(imagenet: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be downloaded without an account; put ILSVRC2012_devkit"):
        open_dataset("imagenet", "train", root=imagenet, download=True)
    (imagenet / "meta.bin").unlink()
    with pytest.raises(
        DataError, match=r"imagenet is not in .*ILSVRC2012_devkit.*or give the folder that holds"
    ) as caught:
        open_dataset("imagenet", "train", root=imagenet)
    assert "\n" not in str(caught.value)


# iNaturalist 2018 and 2019

_RANKS = ("name", "genus", "family", "order", "class", "phylum", "kingdom", "supercategory")
_CROWS = ("Corvus", "Corvidae", "Passeriformes", "Aves", "Chordata", "Animalia", "Aves")
_ROSES = ("Rosa", "Rosaceae", "Rosales", "Magnoliopsida", "Tracheophyta", "Plantae", "Plantae")
SPECIES = [
    {"id": number, **dict(zip(_RANKS, (name, *taxa), strict=True))}
    for number, (name, taxa) in enumerate(
        [("Corvus corax", _CROWS), ("Corvus frugilegus", _CROWS), ("Rosa canina", _ROSES)]
    )
]
TRAINING = [2, 0, 1, 2]
VALIDATION = [1, 0, 2]


def inaturalist(root: Path, year: int = 2018, *, moved: bool = False) -> Path:
    """The competition's layout; `moved` as the authors' loader expects it, without the super-category's folder."""
    for split, categories in (("train", TRAINING), ("val", VALIDATION)):
        images, annotations = [], []
        for number, category in enumerate(categories):
            file = f"train_val{year}/{SPECIES[category]['supercategory']}/{category}/{split}{number}.jpg"
            images.append({"id": number, "file_name": file})
            annotations.append({"image_id": number, "category_id": category})
            parts = file.split("/")
            write_image(root / ("/".join((parts[0], *parts[2:])) if moved else file), grey=60 * category)
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    # their "id" counts, not their place
    (root / "categories.json").write_text(json.dumps(SPECIES[::-1]))
    return root


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("year", [2018, 2019])
def test_inaturalist_numbers_classes_as_training_meets_them(tmp_path: Path, year: int, moved: bool) -> None:
    inaturalist(tmp_path, year, moved=moved)
    train = open_dataset(f"inaturalist-{year}", "train", root=tmp_path)
    assert train.classes == ("Rosa canina", "Corvus corax", "Corvus frugilegus")
    assert [train[i][1] for i in range(4)] == [0, 1, 2, 0]
    val = open_dataset(f"inaturalist-{year}", "val", root=tmp_path, classes=train.classes)
    assert [val[i][1] for i in range(3)] == [2, 1, 0]
    assert [abs(val[i][0].getpixel((0, 0))[0] - grey) < 3 for i, grey in enumerate((60, 0, 120))] == [True] * 3
    assert val.classes == train.classes


@pytest.mark.parametrize(
    ("rank", "classes", "labels"),
    [
        ("kingdom", ("Plantae", "Animalia"), [1, 1, 0]),
        ("phylum", ("Tracheophyta", "Chordata"), [1, 1, 0]),
        ("class", ("Magnoliopsida", "Aves"), [1, 1, 0]),
        ("order", ("Rosales", "Passeriformes"), [1, 1, 0]),
        ("supercategory", ("Plantae", "Aves"), [1, 1, 0]),
        ("family", ("Rosaceae", "Corvidae"), [1, 1, 0]),
        ("genus", ("Rosa", "Corvus"), [1, 1, 0]),
        ("name", ("Rosa canina", "Corvus corax", "Corvus frugilegus"), [2, 1, 0]),
    ],
)
def test_inaturalist_has_coarser_classes(
    tmp_path: Path, rank: str, classes: tuple[str, ...], labels: list[int]
) -> None:
    val = open_dataset(f"inaturalist-2018:{rank}", "val", root=inaturalist(tmp_path))
    assert val.classes == classes
    assert [val[i][1] for i in range(3)] == labels


def test_unknown_rank_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inaturalist-2018:genius: no classes by 'genius'; nearest: genus"):
        open_dataset("inaturalist-2018:genius", "train", root=inaturalist(tmp_path))


def test_single_class_is_refused(tmp_path: Path) -> None:
    inaturalist(tmp_path)
    (tmp_path / "categories.json").write_text(json.dumps([{**entry, "kingdom": "All"} for entry in SPECIES]))
    with pytest.raises(DataError, match="inaturalist-2018:kingdom: only one class, All"):
        open_dataset("inaturalist-2018:kingdom", "train", root=tmp_path)


def no_images_file(root: Path) -> None:
    (root / "val2018.json").unlink()


def truncated(root: Path) -> None:
    (root / "val2018.json").write_text('{"images": [')


def another_layout(root: Path) -> None:
    (root / "val2018.json").write_text('{"images": [{"file_name": "a.jpg"}]}')


def no_entries(root: Path) -> None:
    (root / "val2018.json").write_text('{"images": []}')


def no_photos(root: Path) -> None:
    (root / "train_val2018").rename(root / "elsewhere")


def unknown_category(root: Path) -> None:
    (root / "val2018.json").write_text('{"images": [{"file_name": "train_val2018/Aves/7/a.jpg"}]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_images_file, r"train2018.json, categories.json, val2018.json and the folder train_val2018 must lie in "),
        (truncated, r"val2018.json: not readable as JSON"),
        (another_layout, r"val2018.json is not the competition's layout \(IndexError"),
        (unknown_category, r"val2018.json is not the competition's layout \(KeyError\(7\)\)"),
        (no_entries, r"inaturalist-2018: no images for 'val'"),
        (no_photos, r"train_val2018/Aves/1/val0.jpg is listed and not there"),
    ],
)  # fmt: skip
def test_damaged_inaturalist_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(inaturalist(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        open_dataset("inaturalist-2018", "val", root=tmp_path)
    assert "\n" not in str(caught.value)


# iNaturalist 2021

FOLDERS_2021 = [
    "00000_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
    "00001_Plantae_Tracheophyta_Magnoliopsida_Rosales_Rosaceae_Rosa_canina",
    "00002_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_frugilegus",
]


@pytest.fixture
def inaturalist_2021(tmp_path: Path) -> Path:
    for version, images in (("2021_train", 2), ("2021_valid", 1)):
        for folder in FOLDERS_2021:
            for number in range(images):
                write_image(tmp_path / version / folder / f"{number}.jpg")
    return tmp_path


@pytest.mark.parametrize("rank", ["", "kingdom", "class", "family", "genus"])
def test_inaturalist_2021_is_read_as_torchvision_reads_it(inaturalist_2021: Path, rank: str) -> None:
    source = f"inaturalist-2021:{rank}" if rank else "inaturalist-2021"
    for split, version in (("train", "2021_train"), ("val", "2021_valid")):
        records = open_dataset(source, split, root=inaturalist_2021)
        theirs = datasets.INaturalist(inaturalist_2021, version, target_type=rank or "full", loader=str)
        ours = [(records.describe(i), records[i][1]) for i in range(len(records))]
        expected = [
            (str(inaturalist_2021 / version / FOLDERS_2021[category] / file), theirs[i][1])
            for i, (category, file) in enumerate(theirs.index)
        ]
        assert sorted(ours) == sorted(expected)
        names = [theirs.category_name(rank or "full", number) for number in range(len(records.classes))]
        assert records.classes == tuple(names)


def test_unusable_inaturalist_2021_is_refused(inaturalist_2021: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no classes by 'species'; nearest: "):
        open_dataset("inaturalist-2021:species", "train", root=inaturalist_2021)
    with pytest.raises(DataError, match=r"2021_train is not there; pass download=True"):
        open_dataset("inaturalist-2021", "train", root=tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    write_image(inaturalist_2021 / "2021_train/birds/x.jpg")
    with pytest.raises(DataError, match="class folder birds: expected a number and seven taxonomic names"):
        open_dataset("inaturalist-2021:genus", "train", root=inaturalist_2021)
