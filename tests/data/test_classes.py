"""Data sets of others: class names and labels of every form, what their items may be, and what is refused."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from small_sets import Pictures, fill, plain, write_image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

import deit_models
from deit_models.augmentation.samples import TrainingSamples
from deit_models.data.classes import wrap
from deit_models.data.datasets import open_dataset
from deit_models.data.records import FileRecords
from deit_models.errors import DataError, ImageError

IMAGE = PIL.Image.new("RGB", (2, 2))


class Items(Dataset[Any]):
    """Items as they are given, with attributes."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        return item() if callable(item) else item


def test_wrap_is_public() -> None:
    assert deit_models.wrap is wrap


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
    both = wrap(ConcatDataset([folder, Subset(folder, [2])]))
    assert (len(both), both.classes, both.describe(4)) == (5, ("cat", "dog"), str(tmp_path / "dog/0.png"))
    assert [both.label(i) for i in range(5)] == [0, 0, 1, 1, 1]
    ours = open_dataset(tmp_path, "train")
    assert wrap(Subset(ours, [3])).describe(0) == ours.describe(3)
    assert wrap(Subset(ours, [3])).label(0) == 1


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


@pytest.mark.parametrize("shape", [(3, 8, 6), (8, 6, 3), (8, 6), (1, 8, 6), (8, 6, 1)])
def test_channels_of_tensors_and_arrays_are_first_last_or_none(shape: tuple[int, ...]) -> None:
    pixels = torch.arange(8 * 6 * (3 if 3 in shape else 1), dtype=torch.uint8).reshape(shape)
    expected = pixels[:, 3, 4] if shape[0] in (1, 3) else pixels[3, 4].flatten()
    for source in (TensorDataset(pixels[None], torch.tensor([1])), [(pixels.numpy(), 1)]):
        image, label = wrap(source, 2)[0]
        assert (image.size, image.getpixel((4, 3))) == ((6, 8), (*expected.expand(3).tolist(),))
        assert label == 1


@pytest.mark.parametrize(
    "label",
    [
        *(1, True, 1.0, np.int64(1), np.uint8(1), np.float32(1), np.bool_(True), torch.tensor(1), torch.tensor(1.0)),
        *(np.array([1], np.uint8), torch.tensor([[1]]), [1], np.array(1)),
        *("dog", np.str_("dog")),
        *(torch.eye(3)[1], np.array([0, 1, 0]), [0.0, 1.0, 0.0], (0, 1, 0), torch.tensor([False, True, False])),
    ],
    ids=repr,
)
def test_label_of_any_form_is_its_class(label: Any) -> None:
    number = wrap([(IMAGE, label)], ["cat", "dog", "eel"])[0][1]
    assert (number, type(number)) == (1, int)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "label 3, expected a whole number from 0 to 2"),
        (-1, "label -1, expected"),
        (0.5, "label 0.5, expected"),
        (float("nan"), "label nan, expected"),
        (None, "label None, expected"),
        ("dogs", "label 'dogs', expected a class; nearest: dog"),
        (b"dog", "label b'dog', expected"),
        ([0.1, 0.8, 0.1], "one-hot vector; several at once with wrap\\(..., multi_label=True\\), soft labels never"),
        (torch.tensor([1, 1, 0]), "one-hot vector; several at once with wrap"),
        (np.array([1, 0]), "one-hot vector"),
        (np.array([], int), "one-hot vector"),
    ],
)
def test_other_labels_stop_the_run_instead_of_being_replaced(label: Any, message: str) -> None:
    samples = TrainingSamples(wrap([(IMAGE, label)] * 3, classes=["cat", "dog", "eel"]), plain)
    with pytest.raises(DataError, match=f"image 0 of list: .*{message}") as caught:
        samples[0, 1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        *(([2, 0], (0, 2)), ((), ()), (("eel", "cat"), (0, 2)), ([np.int64(1)], (1,)), ({"dog"}, (1,))),
        *((torch.tensor([1.0, 0, 1]), (0, 2)), (np.array([0, 0, 0]), ()), (np.array([False, True, True]), (1, 2))),
    ],
    ids=repr,
)
def test_several_labels_of_any_form_are_numbers_in_order(label: Any, expected: tuple[int, ...]) -> None:
    records = wrap([(IMAGE, label)], ["cat", "dog", "eel"], multi_label=True)
    assert records.multi_label
    assert records[0][1] == records.label(0) == expected


def test_pairs_with_lists_of_names_have_several_labels() -> None:
    for pairs in ([(IMAGE, ["eel", "cat"]), (IMAGE, [])], [("a.png", ("eel", "cat")), ("b.png", ())]):
        records = wrap(pairs)
        assert (records.multi_label, records.classes) == (True, ("cat", "eel"))
        assert [records.label(i) for i in range(2)] == [(0, 1), ()]
    both = wrap(ConcatDataset([records, Subset(records, [0])]))
    assert (both.multi_label, both.label(2)) == (True, (0, 1))
    assert not wrap([(IMAGE, [1]), (IMAGE, [0])], 2).multi_label


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (1, "label 1, expected a list of classes, as an image has several labels"),
        ("dog", "label 'dog', expected a list"),
        (["dogs"], "label 'dogs', expected a class; nearest: dog"),
        ([3], "label 3, expected a whole number from 0 to 2"),
        ([0, 1, 0], r"label \[0, 1, 0\], expected different classes; a 0 or 1 for each class is a tensor or array"),
        (torch.tensor([0.5, 1, 0]), "expected a 0 or 1 for each of 3 classes"),
        (np.array([1, 0]), "expected a 0 or 1 for each of 3 classes"),
        (np.array(1), "expected a 0 or 1 for each of 3 classes"),
        (np.array(["cat", "dog", "eel"]), "expected a 0 or 1 for each of 3 classes"),
    ],
)
def test_other_forms_of_several_labels_stop_the_run(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"image 0 of list: .*{message}"):
        wrap([(IMAGE, label)] * 3, ["cat", "dog", "eel"], multi_label=True)[0]


@pytest.mark.parametrize(
    "item",
    [
        {"image": IMAGE, "label": 1},
        {"img": IMAGE, "labels": np.array([1]), "id": 7},
        {"pixel_values": torch.zeros(3, 4, 4), "target": torch.tensor(1)},
        {"image": {"bytes": None, "path": "a.png"}, "label": 1},
        {"label": 1, "image": {"bytes": b"a.png", "path": None}},
        (IMAGE, 1),
        [IMAGE, 1],
    ],
    ids=["image", "img", "pixel_values", "path inside", "bytes inside", "tuple", "list"],
)
def test_items_are_pairs_or_dicts(item: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    if isinstance(item, dict) and isinstance(item.get("image"), dict) and item["image"]["bytes"]:
        item["image"]["bytes"] = (tmp_path / "a.png").read_bytes()
    image, label = wrap(Items([item], classes=["a", "b"]))[0]
    assert (image.mode, label) == ("RGB", 1)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (IMAGE, "item of type Image; expected"),
        ((IMAGE, 0, 7), "3 values; expected"),
        ({"image": IMAGE, "caption": "a dog"}, "a dict of image, caption; expected"),
        (torch.zeros(2, 3), "item of type Tensor"),
        ((torch.randn(3, 4, 4), 0), "float image with values from .*; expected 0 to 1, not yet normalised"),
        ((0, IMAGE), "label <PIL.Image.Image"),
        ((object(), 0), "object is not an image; pass a path"),
        (lambda: next(iter(())), "raised StopIteration; expected an item"),
    ],
)
def test_wrong_item_stops_the_run_and_is_named(item: Any, message: str) -> None:
    samples = TrainingSamples(wrap(Items([item] * 3, classes=["a", "b"])), plain)
    with pytest.raises(DataError, match=f"image 0 of Items: .*{message}"):
        samples[0, 1]


@pytest.mark.parametrize(
    "error", [KeyError("no such row"), ZeroDivisionError(), AttributeError("x"), RuntimeError("y")]
)
def test_error_of_the_data_set_keeps_its_type_and_names_the_item(error: Exception) -> None:
    def broken() -> None:
        raise error

    samples = TrainingSamples(wrap(Items([broken] * 3, classes=["a", "b"])), plain)
    with pytest.raises(type(error)) as caught:
        samples[0, 1]
    assert caught.value is error
    assert getattr(error, "__notes__", [""])[0] in ("", "raised for image 0 of Items")


def test_damaged_image_of_a_subset_stays_an_image_error() -> None:
    with pytest.raises(ImageError, match="1 is damaged"):
        wrap(Subset(Pictures(3, damaged=[1]), [1]))[0]


class ClassLabel(SimpleNamespace):
    """As Hugging Face's feature of this name."""


class Image:
    """As Hugging Face's feature of this name."""


class Table(Items):
    """As a Dataset of Hugging Face: rows of columns with features; a column is read without the images."""

    def with_format(self, kind: None) -> "Table":
        assert kind is None
        return Table([[self.items]], features=self.features)

    def __getitem__(self, index: Any) -> Any:
        return [row[index] for row in self.items[0][0]] if isinstance(index, str) else super().__getitem__(index)


@pytest.mark.parametrize("names", [("image", "label"), ("photo", "breed"), ("img", "fine")])
def test_columns_are_known_by_name_or_by_feature(names: tuple[str, str]) -> None:
    rows = [dict(zip((*names, "id"), (IMAGE, number, number), strict=True)) for number in (1, 0, 1)]
    features = {names[0]: Image(), names[1]: ClassLabel(names=["cat", "dog"]), "id": object()}
    records = wrap(Table(rows, features=features))
    assert records.classes == ("cat", "dog")
    assert [records[i][1] for i in range(3)] == [records.label(i) for i in range(3)] == [1, 0, 1]


def test_two_columns_of_classes_are_not_chosen_from() -> None:
    features = {"img": Image(), "fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["x", "y"])}
    records = wrap(Table([{"img": IMAGE, "fine": 0, "coarse": 1}], features=features), ["a", "b"])
    with pytest.raises(DataError, match="a dict of img, fine, coarse; expected"):
        records[0]


@pytest.mark.parametrize(
    ("attributes", "classes"),
    [
        ({"classes": ["cat", "dog"]}, ("cat", "dog")),
        ({"classes": np.array(["cat", "dog"])}, ("cat", "dog")),
        ({"classes": {1: "dog", 0: "cat"}}, ("cat", "dog")),
        ({"classes": [("crane", "bird"), ("crane",), ("crane",)]}, ("crane, bird", "crane (1)", "crane (2)")),
        ({"classes": range(2)}, ("0", "1")),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"classes": ["dog", "cat"], "class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"reader": SimpleNamespace(class_to_idx={"cat": 0, "dog": 1})}, ("cat", "dog")),
    ],
)
def test_class_names_are_found(attributes: dict[str, Any], classes: tuple[str, ...]) -> None:
    assert wrap(Items([(IMAGE, 0)] * 3, **attributes)).classes == classes


def test_names_among_the_labels_are_the_classes_unless_items_have_numbers() -> None:
    names = ["dog", "cat", "dog"]
    assert wrap([(IMAGE, name) for name in names]).classes == ("cat", "dog")
    assert wrap(Items([(IMAGE, name) for name in names], targets=names)).classes == ("cat", "dog")
    features = {"image": Image(), "label": object()}
    assert wrap(Table([{"image": IMAGE, "label": name} for name in names], features=features)).classes == ("cat", "dog")
    for numbered in ((IMAGE, 0), {"pixel_values": IMAGE, "labels": 0}, [IMAGE, np.int64(0)]):
        with pytest.raises(DataError, match="does not say its classes"):
            wrap(Items([numbered] * 3, targets=names))


def test_classes_are_numbers_only_if_asked_for() -> None:
    assert wrap([(IMAGE, 0)], 3).classes == ("0", "1", "2")
    with pytest.raises(
        DataError, match=r"list does not say its classes; pass wrap\(dataset, classes=\[...\]\), or their"
    ):
        wrap([(IMAGE, 0)])


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"targets": [1, 0]}, [1, 0]),
        ({"targets": torch.tensor([1, 0])}, [1, 0]),
        ({"labels": np.array([[1], [0]])}, [1, 0]),
        ({"targets": ["b", "a"]}, [1, 0]),
        ({"targets": [1, 0], "target_transform": lambda label: 1 - label}, [0, 0]),
        ({"labels": ["a", "b", "c"]}, [0, 0]),
        ({}, [0, 0]),
    ],
)
def test_labels_are_known_without_the_images(known: dict[str, Any], expected: list[int]) -> None:
    records = wrap(Items([(IMAGE, 0), (IMAGE, 0)], classes=["a", "b"], **known))
    assert [records.label(i) for i in range(2)] == expected
    assert [pickle.loads(pickle.dumps(records.label(i))) for i in range(2)] == expected


def test_list_of_paths_is_a_table_of_files(tmp_path: Path) -> None:
    fill(tmp_path)
    rows = [(tmp_path / "dog/0.png", "dog"), (str(tmp_path / "cat/0.png"), "cat")]
    records = wrap(rows)
    assert isinstance(records, FileRecords)
    assert (records.classes, [records.label(i) for i in range(2)]) == (("cat", "dog"), [1, 0])
    assert records.describe(0) == str(tmp_path / "dog/0.png")
    assert records[1][0].getpixel((0, 0)) == (0, 0, 10)
    with pytest.raises(DataError, match=r"dog/0.png: label 'dog', expected a class"):
        wrap(rows, ["cat", "eel"])


class Stream(IterableDataset[Any]):
    classes = ("a", "b")

    def __iter__(self) -> Iterator[Any]:
        yield IMAGE, 0


class Endless(Dataset[Any]):
    classes = ("a", "b")

    def __getitem__(self, index: int) -> Any:
        return IMAGE, 0


@pytest.mark.parametrize(
    ("dataset", "classes", "message"),
    [
        ([(0, 0)], "ab", "classes='ab'; expected a list of names"),
        ([], ["a", "b"], "list: no images"),
        (iter([(0, 0)]), ["a", "b"], r"has no length and items by index; pass list\(dataset\) if it fits"),
        ({(0, 0), (1, 1)}, ["a", "b"], "set has no length and items by index"),
        (Stream(), None, "Stream has no length and items by index"),
        (Endless(), None, "Endless has no length and items by index"),
        (DataLoader(Items([(IMAGE, 0)])), None, r"DataLoader gives batches; pass its data set \(loader.dataset\)"),
        ({"train": [], "test": []}, None, r"a dict of train, test; pass one of its data sets, such as data\['train'\]"),
        (SimpleNamespace(iloc=0), ["a", "b"], "is no data set of items; pass it to open_dataset"),
        (Items([0], class_to_idx={"a": 1, "b": 2}), None, "classes numbered 1, 2; expected 0 to 1"),
        (
            ConcatDataset([Items([0], classes=["a", "b"]), Items([0], classes=["a", "c"])]),
            None,
            "ConcatDataset is made from data sets with different classes",
        ),
    ],
)
def test_unusable_dataset_is_refused(dataset: Any, classes: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        wrap(dataset, classes)
