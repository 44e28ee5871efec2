"""Labelled images: small on their way to workers, parts of other sets, methods that subclasses must give."""

import pickle
import re
from pathlib import Path

import pytest
import tiny
from small_sets import fill, labelled_files

from deit_models.data.datasets import open_dataset
from deit_models.data.records import ImageRecords, SubsetRecords, always_the_same, check_classes, is_image
from deit_models.errors import DataError


def test_records_travel_to_workers_small(tmp_path: Path) -> None:
    records = open_dataset(fill(tmp_path, images=300), "train")
    assert len(pickle.dumps(records)) < 600 * 30
    copy = pickle.loads(pickle.dumps(records))
    assert labelled_files(copy, tmp_path) == labelled_files(records, tmp_path)
    assert records.describe(-1) == records.describe(599)
    with pytest.raises(IndexError):
        records[600]


def test_own_records_that_forget_a_method_are_told() -> None:
    class Half(ImageRecords):
        name, classes = "half", ("a", "b")

    with pytest.raises(NotImplementedError, match=re.escape("Half does not define __len__")):
        len(Half())
    with pytest.raises(NotImplementedError, match=re.escape("Half does not define __getitem__")):
        Half()[0]


def test_images_are_known_by_suffix_and_hidden_files_are_none() -> None:
    assert all(map(is_image, ("a.jpg", "b.JPEG", "c.d.webp")))
    assert not any(map(is_image, (".a.jpg", "jpg", "b.txt", "c.jpg.part")))


def test_part_of_a_set_keeps_order_names_and_labels(tmp_path: Path) -> None:
    whole = open_dataset(fill(tmp_path, ["ant", "bee", "cow"]), "train")
    part = SubsetRecords(whole, [5, 0, 3])
    assert [part.key(i) for i in range(3)] == [whole.key(i) for i in (5, 0, 3)]
    assert [part.label(i) for i in range(3)] == [part[i][1] for i in range(3)] == [2, 0, 1]
    assert part.describe(0) == whole.describe(5)
    fewer = SubsetRecords(whole, [5, 0], classes=["cow", "ant"])
    assert [fewer[i][1] for i in range(2)] == [fewer.label(i) for i in range(2)] == [0, 1]
    assert always_the_same(part)
    assert not always_the_same(tiny.Pictures(3))


def test_other_classes_are_named_three_at_most() -> None:
    check_classes(["b", "a"], ["a", "b"], where="here")
    with pytest.raises(DataError, match=r"here: .* missing b, c, d and 1 more; not in training x"):
        check_classes(["a", "x"], ["a", "b", "c", "d", "e"], where="here")
