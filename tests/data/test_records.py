"""Labelled images: small on their way to workers, parts of other sets, methods that subclasses must give."""

import os
import pickle
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from small_sets import fill, labelled_files, write_image
from torch.utils.data import Subset

from deit_models.data.classes import wrap
from deit_models.data.datasets import open_dataset
from deit_models.data.records import (
    ArrayRecords,
    CachedRecords,
    FileRecords,
    ImageRecords,
    SubsetRecords,
    always_the_same,
    check_classes,
    is_image,
)
from deit_models.errors import DataError, ImageError
from deit_models.images.decoding import load_image
from deit_models.predict import find_images


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


def link(at: Path, to: Path) -> None:
    at.symlink_to(to, target_is_directory=True)


@pytest.mark.skipif(os.name != "posix", reason="links as POSIX has them")
def test_a_link_to_itself_is_one_file_that_cannot_be_read(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    for name in ("b.jpg", "c"):
        (tmp_path / name).symlink_to(name)
    assert [Path(path).name for path in find_images(tmp_path)] == ["a.png", "b.jpg"]
    with pytest.raises(ImageError, match=r"b\.jpg: cannot be read"):
        load_image(tmp_path / "b.jpg")


@pytest.mark.skipif(os.name != "posix", reason="links as POSIX has them")
def test_links_are_followed_but_no_folder_is_read_twice(tmp_path: Path) -> None:
    fill(tmp_path / "t", ["ant", "bee"])
    store = fill(tmp_path / "store", ["more"], images=3)
    link(tmp_path / "t/ant/up", tmp_path)
    link(tmp_path / "t/ant/itself", tmp_path / "t/ant")
    link(tmp_path / "t/bee/store", store)
    for depth in range(3):  # each folder holds two links to the next
        (tmp_path / f"chain/{depth}").mkdir(parents=True)
        link(tmp_path / f"chain/{depth}/a", tmp_path / f"chain/{depth + 1}")
        link(tmp_path / f"chain/{depth}/b", tmp_path / f"chain/{depth + 1}")
    fill(tmp_path / "chain/3", ["last"], images=1)
    link(tmp_path / "t/bee/chain", tmp_path / "chain/0")
    records = open_dataset(tmp_path / "t", "train")
    found = [records.key(i) for i in range(len(records))]
    assert found == [
        *("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png", "bee/chain/a/a/a/last/0.png"),
        *(f"bee/store/more/{i}.png" for i in range(3)),
    ]
    assert len(find_images(tmp_path / "t")) == 8


def test_folders_far_below_are_read(tmp_path: Path) -> None:
    place = fill(tmp_path, ["ant", "bee"]) / "ant"
    for _ in range(1200):  # beyond Python's limit of recursion
        place /= "d"
    deep = str(place)
    os.makedirs(deep[: len(str(tmp_path)) + 1500])
    assert len(open_dataset(tmp_path, "train")) == 4


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="HEIC is read here")
def test_files_that_only_look_like_images_are_counted_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, ["ant", "bee"])
    for name in ("ant/a.HEIC", "ant/b.heif", "bee/c.CR2", "bee/.d.heic", "bee/notes.txt"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    line = (
        f"{tmp_path}: 3 image files that cannot be read here (.cr2, .heic, .heif); pip install pillow-heif, which "
        "reads HEIC, or convert them to JPEG or PNG"
    )
    assert len(open_dataset(tmp_path, "train")) == len(find_images(tmp_path)) == 4
    assert [record.getMessage() for record in caplog.records] == [line, line]
    for image in (tmp_path / "bee").glob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match=r"class folder bee; 3 image files that cannot be read here"):
        open_dataset(tmp_path, "train")
    with pytest.raises(ImageError, match=r"bee: no image in it or below; 1 image files .* \(\.cr2\); convert them"):
        find_images(tmp_path / "bee")
    (tmp_path / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypmif1")
    for source in (tmp_path / "ant/a.HEIC", tmp_path / "renamed.jpg", b"\0\0\0\x18ftypheix"):
        with pytest.raises(ImageError, match=r"(a\.HEIC|renamed\.jpg|12 bytes): .*pip install pillow-heif"):
            load_image(source)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", ".thumbnails", ".ipynb_checkpoints"])
def test_folders_of_operating_systems_hold_no_images(tmp_path: Path, name: str) -> None:
    fill(tmp_path, ["ant", "bee"])
    for place in (tmp_path / name, tmp_path / "ant" / name):
        write_image(place / "copy.png")
    assert len(open_dataset(tmp_path, "train")) == len(find_images(tmp_path)) == 4


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


SEVERAL = [(1, 2), (), (0,), (0, 1, 2)]


def test_several_labels_an_image_pass_through_every_kind_of_set(tmp_path: Path) -> None:
    files = [f"{i}.png" for i in range(4)]
    for number, file in enumerate(files):
        write_image(tmp_path / file, (number, 0, 0), (5, 4))
    names = ("ant", "bee", "cow")
    records = FileRecords("insects", tmp_path, files, iter(SEVERAL), names)
    arrays = ArrayRecords("insects", np.zeros((4, 4, 5, 3), np.uint8), SEVERAL, names)
    pixels = torch.zeros(4, 3, 4, 5, dtype=torch.uint8)
    cached = CachedRecords(records, pixels, torch.zeros(4, 3), {})
    for whole in (records, arrays, cached, SubsetRecords(records, range(4)), wrap(Subset(records, range(4)))):
        assert whole.multi_label
        assert [whole.label(i) for i in range(4)] == [whole[i][1] for i in range(4)] == SEVERAL
        assert whole.label(-1) == SEVERAL[-1]
        with pytest.raises(IndexError):
            whole.label(4)
    turned = SubsetRecords(records, [3, 0, 1], classes=["cow", "bee", "ant"])
    assert [turned.label(i) for i in range(3)] == [turned[i][1] for i in range(3)] == [(0, 1, 2), (0, 1), ()]
    assert not FileRecords("insects", tmp_path, files, [0, 1, 2, 0], names).multi_label


def test_several_labels_travel_to_workers_small(tmp_path: Path) -> None:
    files = (f"{i}.png" for i in range(1000))
    records = FileRecords("many", tmp_path, files, ((i % 3, 3 + i % 2) for i in range(1000)), "abcde")
    assert len(pickle.dumps(records)) < 1000 * (16 + 8 + 8 + 12)
    assert pickle.loads(pickle.dumps(records)).label(7) == (1, 4)
