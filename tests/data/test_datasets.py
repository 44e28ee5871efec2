"""Images with labels from class folders and from any Dataset, and the samples that loader workers make of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL.Image
import pytest
import torch
from small_sets import Pictures, fill, labelled_files, plain, write_image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from deit_models.augmentation.samples import TrainingSamples
from deit_models.data.datasets import has_validation, open_dataset, wrap
from deit_models.errors import ConfigError, DataError, ImageError

# Class folders


def test_split_folders_are_read_in_torchvisions_order(tmp_path: Path) -> None:
    fill(tmp_path / "train", ("zebra", "Ant", "Öl", "蝶"))
    write_image(tmp_path / "train/zebra/UPPER.PNG")
    for folder in ("nested/deep", "late", "another", "m"):
        write_image(tmp_path / "train/zebra" / folder / "one.jpeg")
    write_image(tmp_path / "train/zebra/übung 1.webp")
    fill(tmp_path / "val", ("zebra", "Ant", "Öl", "蝶"), images=1)
    records = open_dataset(tmp_path, "train")
    theirs = ImageFolder(str(tmp_path / "train"))
    assert records.classes == tuple(theirs.classes) == ("Ant", "zebra", "Öl", "蝶")
    assert [(records.describe(i), records[i][1]) for i in range(len(records))] == theirs.samples
    assert len(records) == 14
    val = open_dataset(str(tmp_path), "val", classes=records.classes)
    assert labelled_files(val, tmp_path / "val") == [
        ("Ant/0.png", 0),
        ("zebra/0.png", 1),
        ("Öl/0.png", 2),
        ("蝶/0.png", 3),
    ]


@pytest.mark.skipif(os.name != "posix", reason="file names of bytes that are no text exist on POSIX systems only")
def test_name_that_is_no_text_is_opened(tmp_path: Path) -> None:
    fill(tmp_path)
    os.rename(tmp_path / "cat/0.png", os.fsencode(tmp_path) + b"/cat/\xff.png")
    records = open_dataset(tmp_path, "train")
    assert [records[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert any(records.describe(i).endswith("\udcff.png") for i in range(4))


def test_hidden_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in (
        ".hidden/0.png",
        "cat/.0.png",
        "cat/._1.png",
        "cat/notes.txt",
        "cat/jpg",
        "cat/.more/0.png",
        "stray.png",
    ):
        write_image(tmp_path / name)
    assert len(open_dataset(tmp_path, "train")) == 4
    assert open_dataset(tmp_path, "train").classes == ("cat", "dog")


def test_linked_class_folder_and_image_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/dog").symlink_to(tmp_path / "store/dog")
    (tmp_path / "set/cat/x.png").symlink_to(tmp_path / "store/cat/0.png")
    found = labelled_files(open_dataset(tmp_path / "set", "train"), tmp_path / "set")
    assert found == [("cat/x.png", 0), ("dog/0.png", 1), ("dog/1.png", 1)]


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_every_common_name_of_a_validation_folder_is_found(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "train")
    fill(tmp_path / name, images=1)
    assert len(open_dataset(tmp_path, "val")) == 2
    fill(tmp_path / "test", images=4)  # stands behind the others
    assert len(open_dataset(tmp_path, "val")) == (8 if name == "test" else 2)
    assert len(open_dataset(tmp_path, "train")) == 4


def test_images_are_decoded_as_everywhere_in_the_package(tmp_path: Path) -> None:
    fill(tmp_path)
    PIL.Image.new("CMYK", (5, 5), (0, 255, 255, 0)).save(tmp_path / "cat/0.png", format="JPEG")
    PIL.Image.new("I;16", (5, 5), 65535).save(tmp_path / "cat/1.png")
    records = open_dataset(tmp_path, "train")
    assert [records[i][0].mode for i in range(4)] == ["RGB"] * 4
    assert records[1][0].getpixel((0, 0)) == (255, 255, 255)


def test_validation_is_numbered_by_the_training_sets_order(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    fill(tmp_path / "val", images=1)
    records = open_dataset(tmp_path, "val", classes=["dog", "cat"])
    assert records.classes == ("dog", "cat")
    assert labelled_files(records, tmp_path / "val") == [("cat/0.png", 1), ("dog/0.png", 0)]


def test_other_validation_classes_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "train", [f"c{i}" for i in range(8)])
    fill(tmp_path / "val", ["c0", "c1", "c2", "c9"])
    message = r"val: not the 8 classes of the training set: missing c3, c4, c5 and 2 more; not in training c9"
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, "val", classes=open_dataset(tmp_path, "train").classes)


def test_folder_of_classes_is_a_training_set_unless_named_for_validation(tmp_path: Path) -> None:
    fill(tmp_path)
    assert len(open_dataset(tmp_path, "train")) == 4
    with pytest.raises(DataError, match=r"without a split.*put the images for validation into .*val"):
        open_dataset(tmp_path, "val")
    assert len(open_dataset(tmp_path, "val", own_folder=True)) == 4


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Val"),
        ("TRAINING", "Testing"),
        ("train_set", "valid_set"),
        ("training-data", "dev"),
        ("train2017", "val2017"),
        ("Train Images", "Evaluation"),
    ],
)
def test_split_folders_in_other_spellings_are_no_classes(tmp_path: Path, train: str, val: str) -> None:
    fill(tmp_path / train)
    fill(tmp_path / val, images=1)
    assert has_validation(tmp_path)
    for split, images in (("train", 4), ("val", 2)):
        records = open_dataset(tmp_path, split)  # type: ignore[arg-type]
        assert (len(records), records.classes) == (images, ("cat", "dog"))


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test"), ("my train", "my val"), ("pets-training", "pets-dev-set")]
)
def test_folders_that_look_like_splits_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        fill(tmp_path / name)
    with pytest.raises(DataError, match=f"{names[0]} and {names[1]} look like splits, not like classes; rename them"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    "classes", [("bullet_train", "car"), ("steam train", "crash-test", "x"), ("strain", "contest")]
)
def test_classes_that_end_in_the_word_of_a_split_are_classes(tmp_path: Path, classes: tuple[str, ...]) -> None:
    assert open_dataset(fill(tmp_path, classes), "train").classes == tuple(sorted(classes))


def test_test_images_without_classes_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    write_image(tmp_path / "Test" / "0.png")
    assert not has_validation(tmp_path)
    assert len(open_dataset(tmp_path, "train")) == 4
    with pytest.raises(DataError, match=r"has train but no val .* folder with class folders"):
        open_dataset(tmp_path, "val")


def test_folders_beside_the_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "val", "test", "unsorted"):
        fill(tmp_path / name)
    assert len(open_dataset(tmp_path, "train")) == 4
    assert caplog.messages == [f"{tmp_path}: images are read from train, none from unsorted"]


def test_nested_folders_belong_to_the_class_above(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, ("animals/cat", "animals/dog", "plants/rose", "tools"))
    assert open_dataset(tmp_path, "train").classes == ("animals", "plants", "tools")
    assert "classes are the 3 folders in it" in caplog.text
    assert "animals/cat, animals/dog, plants/rose, are of the class above" in caplog.text
    for name in ("animals", "plants"):
        write_image(tmp_path / name / "0.png")
    caplog.clear()
    assert len(open_dataset(tmp_path, "train")) == 10
    assert not caplog.messages
    fill(tmp_path / "other/inner")
    with pytest.raises(DataError, match=r"only one class, inner;.*; are they in .*inner\?"):
        open_dataset(tmp_path / "other", "train")


def test_empty_class_folders_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fill(tmp_path) / "fish" / "deep").mkdir(parents=True)
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / ".DS_Store").touch()
    assert open_dataset(tmp_path, "train").classes == ("cat", "dog")
    assert caplog.messages == [f"{tmp_path}: no class for empty folders: bird, fish"]


def test_validation_may_lack_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "val", ("ant", "cow"), images=1)
    (tmp_path / "val" / "bee").mkdir()
    records = open_dataset(tmp_path, "val", classes=("cow", "bee", "ant", "gnu"))
    assert records.classes == ("cow", "bee", "ant", "gnu")
    assert [records.label(i) for i in range(2)] == [2, 0]
    assert caplog.messages[-1] == f"{tmp_path / 'val'}: no images of bee, gnu"


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    fill(tmp_path, ("car", "train", "test"))
    assert open_dataset(tmp_path, "train").classes == ("car", "test", "train")


def test_split_folders_with_images_right_in_them_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, ("train", "val"))
    with pytest.raises(DataError, match="train: no class folders"):
        open_dataset(tmp_path, "train")


def empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


def class_without_images(path: Path) -> Path:
    (fill(path) / "fish").mkdir()
    (path / "fish" / "notes.txt").touch()
    return path


def no_validation(path: Path) -> Path:
    fill(path / "train")
    return path


def a_file(path: Path) -> Path:
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (empty_folder, "train", "set: no class folders; expected one folder of images for each class"),
        (class_without_images, "train", "set: no images in class folder fish; expected .*[.]jpg .* files"),
        (lambda path: fill(path, ["cat"]), "train", "set: only one class, cat; a classifier needs two"),
        (no_validation, "val", "set: has train but no val or validation or valid or test folder"),
        (a_file, "train", "set: not a folder"),
        (lambda path: path, "train", "set: no such folder$"),
    ],
)
def test_unusable_folder_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], split: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(make(tmp_path / "set"), split)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that others than its owner may read."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def without_privileges() -> Iterator[None]:
    """The superuser, as whom tests may run, could read any folder."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions as POSIX has them")
def test_folder_that_may_not_be_read_is_named(public_folder: Path) -> None:
    fill(public_folder)
    (public_folder / "dog").chmod(0)
    with without_privileges(), pytest.raises(DataError, match=r"dog: cannot be read \(Permission denied\)$"):
        open_dataset(public_folder, "train")


def test_unknown_name_and_misplaced_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cifar-10: neither a folder nor a data set known by name; nearest: cifar10"):
        open_dataset("cifar-10", "train")
    with pytest.raises(ConfigError, match="split='test'; expected 'train' or 'val'"):
        open_dataset(fill(tmp_path), "test")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="root and download belong to the data sets known by name"):
        open_dataset(tmp_path, "train", download=True)
    with pytest.raises(ConfigError, match="root and download"):
        open_dataset(tmp_path, "train", root=tmp_path)


def test_name_wins_over_a_folder_which_a_path_still_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "cifar10")
    with pytest.raises(DataError, match="cifar-10-batches-py is not there"):
        open_dataset("cifar10", "train")
    assert len(open_dataset("./cifar10", "train")) == len(open_dataset(Path("cifar10"), "train")) == 4


# Any Dataset


def test_torchvision_dataset_and_its_subsets_are_wrapped(tmp_path: Path) -> None:
    folder = ImageFolder(str(fill(tmp_path)))
    records = wrap(folder)
    assert records.classes == ("cat", "dog")
    assert records[2][0].size == (8, 6)
    assert records[2][1] == 1
    part = wrap(Subset(Subset(folder, [3, 1]), [1]))
    assert part.classes == ("cat", "dog")
    assert len(part) == 1
    assert part.describe(0) == str(tmp_path / "cat/1.png")
    both = wrap(ConcatDataset([folder, folder]))
    assert (len(both), both.classes, both.describe(5)) == (8, ("cat", "dog"), "image 5 of ConcatDataset")
    ours = open_dataset(tmp_path, "train")
    assert wrap(Subset(ours, [3])).describe(0) == ours.describe(3)


def test_records_are_not_wrapped_again() -> None:
    pictures = Pictures(3)
    assert wrap(pictures) is pictures
    assert wrap(pictures, ["a", "b", "c"]) is pictures
    assert wrap(pictures, ["x", "y", "z"]).classes == ("x", "y", "z")


def test_tensors_arrays_and_paths_are_images(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 5, 7)
    images[1] = 1.0
    records = wrap(TensorDataset(images, torch.tensor([0, 1])), classes=["dark", "light"])
    assert records[1][0].getpixel((0, 0)) == (255, 255, 255)
    assert records[1][1] == 1
    assert type(records[1][1]) is int
    write_image(tmp_path / "x.png", (1, 2, 3))
    pairs = [(str(tmp_path / "x.png"), np.int64(1)), (np.full((4, 4, 3), 9, np.uint8), 0)]
    mixed = wrap(pairs, classes=["a", "b"])
    assert [mixed[i][0].getpixel((0, 0)) for i in range(2)] == [(1, 2, 3), (9, 9, 9)]


@pytest.mark.parametrize(
    ("dataset", "classes", "message"),
    [
        ([(0, 0)], None, r"list does not say its classes; pass wrap\(dataset, classes="),
        ([(0, 0)], ["one"], "1 class; a classifier needs two"),
        ([], ["a", "b"], "list: no images"),
        (iter([(0, 0)]), ["a", "b"], "has no length"),
    ],
)
def test_unusable_dataset_is_refused(dataset: object, classes: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        wrap(dataset, classes)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((PIL.Image.new("RGB", (2, 2)), 2), "image 0 of list: label 2, expected 0 to 1"),
        ((PIL.Image.new("RGB", (2, 2)), -1), "label -1, expected 0 to 1"),
        ((PIL.Image.new("RGB", (2, 2)), 0.5), "image 0 of list: .*expected a pair of image and whole number"),
        (PIL.Image.new("RGB", (2, 2)), "expected a pair of image and whole number"),
        ((1, 2, 3), "expected a pair of image and whole number"),
    ],
)
def test_wrong_item_stops_the_run_instead_of_being_replaced(item: object, message: str) -> None:
    samples = TrainingSamples(wrap([item] * 3, classes=["a", "b"]), plain)
    with pytest.raises(DataError, match=message):
        samples[0, 1]


def test_normalised_images_are_explained() -> None:
    with pytest.raises(DataError, match=r"cannot be read; last: .*expected 0 to 1, not yet normalised"):
        TrainingSamples(wrap([(torch.randn(3, 4, 4), 0)] * 3, classes=["a", "b"]), plain)[0, 1]


def test_damaged_image_of_a_subset_stays_an_image_error() -> None:
    with pytest.raises(ImageError, match="1 is damaged"):
        wrap(Subset(Pictures(3, damaged=[1]), [1]))[0]
