"""Images with labels from class folders and from any Dataset, and the samples that loader workers make of them."""

import os
import pickle
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as TF

from deit_models.augmentation.samples import TrainingSamples, TrainSampler
from deit_models.data.datasets import open_dataset, wrap
from deit_models.data.inputs import EvalSamples
from deit_models.data.records import ImageRecords
from deit_models.errors import ConfigError, DataError, ImageError


def write_image(path: Path, colour: tuple[int, int, int] = (200, 30, 90), size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(path, format="PNG")


def fill(folder: Path, classes: Sequence[str] = ("cat", "dog"), images: int = 2) -> Path:
    for number, name in enumerate(classes):
        for image in range(images):
            write_image(folder / name / f"{image}.png", (number * 50, image * 40, 10))
    return folder


def labelled_files(records: ImageRecords, folder: Path) -> list[tuple[str, int]]:
    return [(os.path.relpath(records.describe(i), folder), records[i][1]) for i in range(len(records))]


class Pictures(ImageRecords):
    """Images in memory of which some cannot be read."""

    def __init__(self, count: int, damaged: Sequence[int] = (), error: type[Exception] = ImageError) -> None:
        self.name = "pictures"
        self.classes = ("a", "b", "c")
        self.count, self.damaged, self.error = count, set(damaged), error

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        if index in self.damaged:
            raise self.error(f"{index} is damaged")
        return PIL.Image.new("RGB", (4, 4), (index, index, index)), index % 3


def noisy(image: PIL.Image.Image) -> Tensor:
    """Randomness from every generator that a transform may use."""
    noise = torch.rand(3, 4, 4) + random.random() + float(np.random.rand())
    return TF.pil_to_tensor(image) + noise


def plain(image: PIL.Image.Image) -> Tensor:
    return TF.pil_to_tensor(image).float()


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


def test_records_travel_to_workers_small(tmp_path: Path) -> None:
    records = open_dataset(fill(tmp_path, images=300), "train")
    assert len(pickle.dumps(records)) < 600 * 30
    copy = pickle.loads(pickle.dumps(records))
    assert labelled_files(copy, tmp_path) == labelled_files(records, tmp_path)
    assert records.describe(-1) == records.describe(599)
    with pytest.raises(IndexError):
        records[600]


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


def one_empty_class(path: Path) -> Path:
    (fill(path) / "fish").mkdir()
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
        (one_empty_class, "train", "set: no images in class folder fish; expected .*[.]jpg .* files"),
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


def test_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    scandir = os.scandir

    def refusing(path: Path) -> Any:  # the superuser, as whom tests may run, could read any folder
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"dog: cannot be read \(Permission denied\)$"):
        open_dataset(tmp_path, "train")


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


# Samples


def samples_of(workers: int, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    samples = TrainingSamples(Pictures(20, damaged=[4]), noisy)
    # in order, reversed: another worker reads each sample, after another one
    loader = DataLoader(samples, batch_size=3, sampler=keys, num_workers=workers)  # type: ignore[arg-type]
    batches = list(loader)
    return [torch.cat(column) for column in zip(*batches, strict=True)]  # type: ignore[return-value]


def test_sample_is_the_same_in_any_process_and_order() -> None:
    sampler = TrainSampler(20, batch_size=20, repeats=2, seed=1)
    keys = list(sampler)
    torch.manual_seed(0)
    images, labels, failed = samples_of(0, keys)
    assert len(images.flatten(1).unique(dim=0)) == 20  # the copies of an image differ
    for workers in (1, 2):
        torch.manual_seed(workers)
        random.seed(workers)
        np.random.seed(workers)
        others = samples_of(workers, keys)
        assert all(torch.equal(a, b) for a, b in zip(others, (images, labels, failed), strict=True))
        backwards = samples_of(workers, keys[::-1])
        assert torch.equal(backwards[0].flip(0), images)


def test_seed_alone_decides_the_augmentation() -> None:
    samples = TrainingSamples(Pictures(9), noisy)
    first, second = samples[3, 77][0], samples[3, 77][0]
    assert torch.equal(first, second)
    assert not torch.equal(first, samples[3, 78][0])
    # another image, the same noise: the seed is the caller's to choose
    assert torch.allclose(first - 3, samples[0, 77][0], atol=1e-5)
    assert samples[3, (1 << 63) - 1][1:] == (0, -1)


@pytest.mark.parametrize("damaged", [[], [0], range(9)])
def test_main_process_finds_its_generators_as_it_left_them(damaged: Sequence[int]) -> None:
    samples = TrainingSamples(Pictures(9, damaged), noisy)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    np.random.set_state(before[2])
    try:
        samples[0, 5]
    except DataError:
        assert len(damaged) == 9
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize("error", [ImageError, OSError, FileNotFoundError])
def test_damaged_image_is_replaced_and_reported(error: type[Exception]) -> None:
    samples = TrainingSamples(Pictures(9, damaged=[3, 4, 8], error=error), plain)
    image, label, failed = samples[3, 1]
    assert (image[0, 0, 0], label, failed) == (5, 2, 3)
    image, label, failed = samples[8, 1]  # the first follows the last
    assert (image[0, 0, 0], label, failed) == (0, 0, 8)
    assert samples[5, 1][2] == -1


def test_damaged_file_in_a_folder_is_replaced_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    whole = (tmp_path / "dog/0.png").read_bytes()
    (tmp_path / "dog/0.png").write_bytes(whole[: len(whole) // 2])
    records = open_dataset(tmp_path, "train")
    image, label, failed = TrainingSamples(records, plain)[2, 1]
    assert (label, records.describe(failed)) == (1, str(tmp_path / "dog/0.png"))
    assert torch.equal(image, plain(records[3][0]))


def test_too_many_damaged_images_in_a_row_stop_the_run() -> None:
    samples = TrainingSamples(Pictures(30, damaged=range(10, 16)), plain)
    assert samples[11, 0][2] == 11  # the fifth substitute is fine
    with pytest.raises(DataError, match="image 10 of pictures and the 5 images after it cannot be read; last: 15 is"):
        samples[10, 0]


def test_error_of_a_transform_is_no_damaged_image() -> None:
    def broken(_: PIL.Image.Image) -> NoReturn:
        raise ImageError("a mistake in the transform")

    with pytest.raises(ImageError, match="a mistake in the transform"):
        TrainingSamples(Pictures(3), broken)[0, 0]


def test_damaged_image_is_skipped_in_evaluation() -> None:
    samples = EvalSamples(Pictures(5, damaged=[1]), lambda image: plain(TF.resize(image, [6, 6])))
    assert samples[0][1:] == (0, -1)
    assert torch.equal(samples[0][0], torch.zeros(3, 6, 6))
    image, label, failed = samples[1]
    assert (image.shape, image.dtype, image.abs().sum(), label, failed) == ((3, 6, 6), torch.float32, 0, -1, 1)
    images, labels, failures = next(iter(DataLoader(samples, batch_size=5)))
    assert (labels.tolist(), failures.tolist()) == ([0, -1, 2, 0, 1], [-1, 1, -1, -1, -1])
    assert images.shape == (5, 3, 6, 6)
    assert len(samples) == 5


def test_own_records_that_forget_a_method_are_told() -> None:
    class Half(ImageRecords):
        name, classes = "half", ("a", "b")

    with pytest.raises(NotImplementedError, match=re.escape("Half does not define __len__")):
        len(Half())
    with pytest.raises(NotImplementedError, match=re.escape("Half does not define __getitem__")):
        Half()[0]
