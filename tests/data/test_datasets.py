"""Images with labels from class folders in many layouts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL.Image
import pytest
from small_sets import fill, labelled_files, write_image
from torchvision.datasets import ImageFolder

from deit_models.data.datasets import has_validation, open_dataset, open_images
from deit_models.errors import ConfigError, DataError

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


@pytest.mark.parametrize(
    "place", ["archive/dataset", "images", "cats-v1-i.folder/cats-v1-i.folder", "data/raw/2024", "ILSVRC/Data/CLS-LOC"]
)
def test_splits_in_a_folder_of_their_own_are_found(tmp_path: Path, place: str) -> None:
    fill(tmp_path / place / "train")
    fill(tmp_path / place / "valid", images=1)
    write_image(tmp_path / "__MACOSX" / place / "train/cat/0.png")
    (tmp_path / "README.roboflow.txt").touch()
    assert has_validation(tmp_path)
    assert len(open_dataset(tmp_path, "train")) == 4
    records = open_dataset(tmp_path, "val")
    assert (len(records), records.name) == (2, tmp_path.name)


@pytest.mark.parametrize(
    ("train", "val"), [("train/train", "test/test"), ("Train/train", "Valid/VALID"), ("train/images", "val/images")]
)
def test_folders_that_hold_only_their_namesake_or_images_are_read(tmp_path: Path, train: str, val: str) -> None:
    fill(tmp_path / train)
    fill(tmp_path / val, images=1)
    assert len(open_dataset(tmp_path, "train")) == 4
    assert len(open_dataset(tmp_path, "val")) == 2


def test_a_lone_split_is_not_read_as_the_other(tmp_path: Path) -> None:
    fill(tmp_path / "data/test")
    with pytest.raises(DataError, match="data: has test but no train folder"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    "names",
    [("train_en", "test_en"), ("TRAIN_A", "TEST_A"), ("trainA", "testA"), ("x_train", "x_val"), ("train", "val_v2")],
)
def test_more_words_beside_the_split_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        fill(tmp_path / name)
    with pytest.raises(DataError, match=f"{names[0]} and {names[1]} look like splits"):
        open_dataset(tmp_path, "train")


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train_1", "train_2", "val"):
        fill(tmp_path / name)
    with pytest.raises(DataError, match="train_1 and train_2 are one split by their names; join or rename them"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("above", "below"), [(("cat", "dog"), ("train", "val")), (("a", "b", "c"), ("Training", "test"))]
)
def test_splits_within_each_folder_are_no_images_of_one_class(
    tmp_path: Path, above: tuple[str, ...], below: tuple[str, ...]
) -> None:
    fill(tmp_path, [f"{one}/{two}" for one in above for two in below])
    with pytest.raises(DataError, match=r"folders that look like splits, .*; name the folder that holds"):
        open_dataset(tmp_path, "train")


def test_images_without_class_folders_are_explained(tmp_path: Path) -> None:
    for name in ("train", "test", "sample"):
        write_image(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="1 images lie right in it: name a table of their classes, or move each into"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    "file", ["cifar-10-batches-py/data_batch_1", "cifar-100-python/train", "flowers-102/imagelabels.mat"]
)
def test_sets_known_by_name_are_not_class_folders(tmp_path: Path, file: str) -> None:
    place = tmp_path / file
    place.parent.mkdir()
    place.touch()
    for folder in (tmp_path, place.parent):
        with pytest.raises(DataError, match=f"{place.parent.name} is opened by name: .*, with root='{tmp_path}'"):
            open_dataset(folder, "train")


def test_place_of_the_splits_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "set/Data/CLS-LOC/train")
    (tmp_path / "set/Annotations/CLS-LOC/train/cat").mkdir(parents=True)
    (tmp_path / "set/Annotations/CLS-LOC/train/cat/0.xml").touch()
    with pytest.raises(DataError, match=r"folder Annotations; train is in .*/Data/CLS-LOC: name that folder"):
        open_dataset(tmp_path / "set", "train")


def test_tiny_imagenets_validation_images_have_the_classes_of_their_list(tmp_path: Path) -> None:
    fill(tmp_path / "train", ("n1/images", "n2/images"))
    for number in range(3):
        write_image(tmp_path / f"val/images/val_{number}.JPEG")
    annotations = tmp_path / "val/val_annotations.txt"
    annotations.write_text("".join(f"val_{i}.JPEG\tn{2 - i % 2}\t0\t0\t9\t9\n" for i in range(3)))
    training = open_dataset(tmp_path, "train")
    records = open_dataset(tmp_path, "val", classes=training.classes)
    assert records.classes == training.classes == ("n1", "n2")
    assert [records[i][1] for i in range(3)] == [1, 0, 1]
    assert len(open_images(tmp_path / "val", "val")) == 3
    annotations.write_text("val_0.JPEG n1")
    with pytest.raises(DataError, match=r"val_annotations.txt: expected lines of a file's name, a tab and its class"):
        open_dataset(tmp_path, "val")


def test_validation_of_any_kind_is_numbered_as_the_training_set(caplog: pytest.LogCaptureFixture) -> None:
    image = PIL.Image.new("RGB", (2, 2))
    records = open_images([(image, "dog"), (image, "cat"), (image, "dog")], "val", ("eel", "dog", "cat"))
    assert [records[i][1] for i in range(3)] == [1, 2, 1]
    assert caplog.messages == ["list: no images of eel"]
    numbers = open_images([(image, 2), (image, 0)], "val", ("eel", "dog", "cat"))  # which has no names of its own
    assert ([numbers[i][1] for i in range(2)], numbers.classes) == ([2, 0], ("eel", "dog", "cat"))
    with pytest.raises(DataError, match="not in training fox"):
        open_images([(image, "dog"), (image, "fox")], "val", ("dog", "cat"))


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    fill(tmp_path, ("car", "train", "bus"))
    assert open_dataset(tmp_path, "train").classes == ("bus", "car", "train")


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
        (
            class_without_images,
            "train",
            "set: no images in class folder fish; expected .*move it elsewhere if it is no class",
        ),
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
    with pytest.raises(
        DataError, match="cifar-10: neither a folder, a table nor a data set known by name; nearest: cifar10"
    ):
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


@pytest.mark.parametrize("layout", ["val/cat", "cat", "Test/cat"])
def test_one_class_is_enough_to_evaluate_and_too_few_to_train(tmp_path: Path, layout: str) -> None:
    write_image(tmp_path / layout / "0.png")
    assert open_images(tmp_path, "val").classes == ("cat",)
    with pytest.raises(DataError, match=r"only one class, cat; a classifier needs two|no train folder"):
        open_images(tmp_path, "train")
    pairs = [(PIL.Image.new("RGB", (2, 2)), "cat")]
    assert open_images(pairs, "val").classes == ("cat",)
    with pytest.raises(DataError, match="list: only one class, cat; a classifier needs two or more"):
        open_images(pairs, "train")
