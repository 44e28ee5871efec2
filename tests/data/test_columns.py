"""Tables: which columns, rows and files are read, labels of every kind, and what is refused in one line."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from small_sets import fill, write_image

from deit_models.data.datasets import has_validation, open_dataset
from deit_models.data.records import ImageRecords
from deit_models.data.sources import image_sources
from deit_models.errors import ConfigError, DataError, ImageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in the folder img."""
    for number in range(6):
        write_image(tmp_path / f"img/{number}.png", (number, 0, 0))
    return tmp_path


def table(folder: Path, text: str, name: str = "t.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def labelled(records: ImageRecords) -> list[tuple[str, Any]]:
    """The key of each image and the name of its class, or their names."""
    labels = [(records.key(i), records.label(i)) for i in range(len(records))]
    return [
        (key, tuple(records.classes[n] for n in label) if isinstance(label, tuple) else records.classes[label])
        for key, label in labels
    ]


CATS_AND_DOGS = [("img/1.png", "dog"), ("img/0.png", "a cat"), ("img/2.png", "dog")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path,label\nimg/1.png,dog\nimg/0.png,a cat\nimg/2.png,dog\n"),
        ("t.csv", "\ufefffile name;class\r\nimg/1.png;dog\r\n\r\nimg/0.png;a cat\r\nimg/2.png;dog"),
        ("t.CSV", 'LABEL,Image-Path,note\ndog,img/1.png,"a, b"\na cat, img/0.png,"two\nlines"\n"dog",img/2.png,\n'),
        ("t.tsv", "file_name\tspecies\nimg/1.png\tdog\nimg/0.png\ta cat\nimg/2.png\tdog\n"),
        ("t.csv", "label|path\ndog|img/1.png\na cat|img/0.png\ndog|img/2.png\n"),
        ("t.jsonl", "".join(json.dumps({"image": path, "target": name}) + "\n" for path, name in CATS_AND_DOGS)),
        (
            "t.ndjson",
            '{"img":"img/1.png","cls":"dog"}\n\n{"cls":"a cat","img":"img/0.png"}\r\n{"img":"img/2.png","cls":"dog"}',
        ),
    ],
)
def test_tables_of_every_kind_are_read(folder: Path, name: str, text: str, caplog: pytest.LogCaptureFixture) -> None:
    records = open_dataset(table(folder, text, name), "train")
    assert labelled(records) == CATS_AND_DOGS
    assert (records.classes, records.multi_label, records.name) == (("a cat", "dog"), False, name)
    assert [records[i][0].getpixel((0, 0))[0] for i in range(3)] == [1, 0, 2]
    assert len(caplog.records) == 1


def test_columns_chosen_by_name_are_told_with_the_options(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = table(folder, "id,path,label,genus,split\n1,img/0.png,cat,felis,train\n2,img/1.png,dog,canis,train\n")
    assert open_dataset(source, "train").classes == ("cat", "dog")
    choice = "(--image-column, --label-column choose others)"
    line = f"t.csv: images from 'path', labels from 'label', splits from 'split' {choice}"
    assert [record.getMessage() for record in caplog.records] == [line]
    caplog.clear()
    assert open_dataset(source, "train", image_column="path", label_column="genus").classes == ("canis", "felis")
    assert [record.getMessage() for record in caplog.records] == [f"t.csv: splits from 'split' {choice}"]


def test_numbers_are_classes_in_order_of_size(folder: Path) -> None:
    records = open_dataset(table(folder, "path,label\nimg/0.png,10\nimg/1.png,2\nimg/2.png,10\n"), "train")
    assert records.classes == ("2", "10")
    assert [records.label(i) for i in range(3)] == [1, 0, 1]
    lines = '{"path": "img/0.png", "label": 10}\n{"path": "img/1.png", "label": 2}\n'
    assert open_dataset(table(folder, lines, "t.jsonl"), "train").classes == ("2", "10")


def test_files_are_relative_to_the_table_or_to_the_folder_that_is_named(folder: Path) -> None:
    text = "path,label\n0.png,cat\n1.png,dog\n"
    with pytest.raises(DataError, match=r"t\.csv: no file .*0\.png \(it is in img\), nor others .* with images \(--im"):
        open_dataset(table(folder, text), "train")
    records = open_dataset(table(folder, text), "train", images=folder / "img")
    assert records.describe(1) == str(folder / "img/1.png")
    absolute = table(folder, f"path,label\n{folder}/img/0.png,cat\n{folder}/img/1.png,dog\n")
    assert open_dataset(absolute, "train")[1][0].getpixel((0, 0)) == (1, 0, 0)


def test_names_without_suffix_are_those_of_files(folder: Path) -> None:
    text = "image_id,label\n0,cat\n1,dog\n17,dog\n"
    records = open_dataset(table(folder, text), "train", images=folder / "img")
    assert [records.key(i) for i in range(3)] == ["0.png", "1.png", "17"]
    with pytest.raises(ImageError, match="17: no such file"):
        records[2]
    write_image(folder / "img/1.jpg")
    with pytest.raises(DataError, match=r"'1' is 1\.(jpg|png) and 1\.(jpg|png) in .*img; add the suffixes"):
        open_dataset(table(folder, text), "train", images=folder / "img")


def test_missing_files_are_images_that_cannot_be_read(folder: Path) -> None:
    records = open_dataset(table(folder, "path,label\nimg/0.png,cat\nimg/gone.png,dog\n"), "train")
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        records[1]


SPLITS = "path,label,split\nimg/0.png,cat,train\nimg/1.png,dog,train\nimg/2.png,cat,test\nimg/3.png,dog,valid\n"


def test_splits_of_a_column_are_those_of_folders(folder: Path) -> None:
    source = table(folder, SPLITS)
    keys = {split: [key for key, _ in labelled(open_dataset(source, split))] for split in ("train", "val")}
    assert keys == {"train": ["img/0.png", "img/1.png"], "val": ["img/3.png"]}
    assert len(open_dataset(f"{source},split=test", "val")) == 1
    assert len(open_dataset(f"{source},split=all", "train")) == 4
    assert has_validation(source)
    assert not has_validation(f"{source},split=train")
    assert len(image_sources(source)) == 4
    without = table(folder, SPLITS.replace("valid", "test"), "u.csv")
    assert [key for key, _ in labelled(open_dataset(without, "val"))] == ["img/2.png", "img/3.png"]


def test_a_table_without_splits_is_a_training_set_unless_it_is_named_for_validation(folder: Path) -> None:
    source = table(folder, "path,label\nimg/0.png,cat\nimg/1.png,dog\n")
    assert not has_validation(source)
    with pytest.raises(DataError, match=r"t\.csv: no splits, so it is a training set; name another for validation"):
        open_dataset(source, "val")
    assert len(open_dataset(source, "val", own_folder=True)) == 2
    val = open_dataset(
        table(folder, "path,label\nimg/2.png,dog\n", "v.csv"), "val", own_folder=True, classes=("cat", "dog")
    )
    assert (val.classes, val.label(0)) == (("cat", "dog"), 1)


SEVERAL = [("img/0.png", ("cat", "dog")), ("img/1.png", ()), ("img/2.png", ("eel",))]


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("t.csv", "path,tags\nimg/0.png,dog|cat\nimg/1.png,\nimg/2.png,eel | eel\n", {"label_separator": "|"}),
        ("t.csv", "path,tags\nimg/0.png,dog cat\nimg/1.png,\nimg/2.png,eel\n", {"label_separator": " "}),
        (
            "t.csv",
            "path,cat,dog,eel\nimg/0.png,1,1.0,0\nimg/1.png,0,0,0\nimg/2.png,False,0,true\n",
            {"label_column": ["cat", "dog", "eel"]},
        ),
        (
            "t.jsonl",
            '{"path":"img/0.png","tags":["dog","cat"]}\n{"path":"img/1.png","tags":[]}\n{"path":"img/2.png","tags":["eel"]}',
            {},
        ),
    ],
)
def test_several_labels_come_from_names_in_a_cell_or_a_column_each(
    folder: Path, name: str, text: str, options: dict[str, Any]
) -> None:
    records = open_dataset(table(folder, text, name), "train", **options)
    assert records.multi_label
    assert (records.classes, labelled(records)) == (("cat", "dog", "eel"), SEVERAL)


def test_labels_are_not_needed_to_look_at_images(folder: Path) -> None:
    source = table(folder, "image_id,width,height\n3,8,6\n0,8,6\n")
    sources = image_sources(source, images=folder / "img")
    assert [*sources] == [folder / "img/3.png", folder / "img/0.png"]
    assert sources.label(0) is None
    given = image_sources(table(folder, "path,label\nimg/3.png,cat\nimg/0.png,\n", "u.csv"))
    assert [given.label(i) for i in range(2)] == ["cat", None]
    mixed = image_sources([folder / "img/5.png", source], images=folder / "img")
    assert [path.name for path in mixed if isinstance(path, Path)] == ["5.png", "3.png", "0.png"]
    with pytest.raises(DataError, match="which column has the labels"):
        image_sources(source, labelled=True)


def test_a_folder_with_its_table_is_read_as_hugging_face_does(folder: Path) -> None:
    for split, rows in {"train": "0.png,cat\n1.png,dog\n", "validation": "2.png,dog\n"}.items():
        for number in range(3):
            write_image(folder / f"data/{split}/{number}.png")
        table(folder / f"data/{split}", f"file_name,label\n{rows}", "metadata.csv")
    assert labelled(open_dataset(folder / "data", "train")) == [("0.png", "cat"), ("1.png", "dog")]
    assert labelled(open_dataset(folder / "data", "val", classes=("cat", "dog"))) == [("2.png", "dog")]
    assert len(open_dataset(folder / "data/train", "train")) == 2
    classes = fill(folder / "classes")
    table(classes, "lesion_id,dx\n1,nv\n", "metadata.csv")
    assert open_dataset(classes, "train").classes == ("cat", "dog")


def test_a_table_travels_to_workers_small(folder: Path) -> None:
    rows = "".join(f"img/{number % 6}.png,{'cat' if number % 2 else 'dog'}\n" for number in range(1000))
    records = open_dataset(table(folder, f"path,label\n{rows}"), "train")
    assert len(pickle.dumps(records)) < 1000 * (9 + 8 + 8 + 4)


PAIR = "path,label\nimg/0.png,cat\nimg/1.png,dog\n"


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("t.csv", "", {}, "t.csv: empty; expected a line of column names"),
        ("t.csv", "img/0.png,cat\nimg/1.png,dog\n", {}, "its first line has img/0.png; expected names of columns"),
        (
            "t.csv",
            "x,label\nimg/0.png,cat\n",
            {},
            r"which column has the images\? Name it with image_column .* of x, label",
        ),
        (
            "t.csv",
            "path,a,b\nimg/0.png,0,1\n",
            {},
            r"which column has the labels\? .* or one of 0 and 1 for each class, of path",
        ),
        ("t.csv", PAIR, {"label_column": "lable"}, "0 columns 'lable', expected one; nearest: label"),
        ("t.csv", "path,label,label\nimg/0.png,a,b\n", {"label_column": "label"}, "2 columns 'label', expected one"),
        ("t.csv", PAIR + "img/2.png\n", {}, "line 4 has 1 values; expected 2"),
        ("t.csv", PAIR + "img/2.png,\n", {}, r"1 of 3 rows have no label \(empty or -1\), the first is row 3"),
        ("t.csv", PAIR + ",cat\n", {}, "row 3 has nothing in column 'path'"),
        ("t.csv", "path,label\nimg/0.png,cat\n", {}, "only one class, cat; a classifier needs two or more"),
        ("t.csv", "path,label\n", {}, "no images"),
        (
            "t.csv",
            "path,a,b\nimg/0.png,1,maybe\n",
            {"label_column": ["a", "b"]},
            "row 1 has 'maybe' in column 'b'; expected 0 or 1",
        ),
        ("t.csv", PAIR, {"label_separator": ""}, "label_separator=''; expected"),
        ("t.jsonl", '{"path": "img/0.png", "label": 1}\n[1]\n', {}, "line 2 is no JSON object"),
        ("t.jsonl", '{"path": "img/0.png", "label": 1}\nno\n', {}, "line 2 is no JSON object"),
        (
            "t.jsonl",
            '{"path": "img/0.png", "label": "a"}\n{"path": "img/1.png", "label": ["a"]}\n',
            {},
            r"row 2 has label \['a'\]; expected lists in all rows or none",
        ),
    ],
)
def test_tables_are_refused_in_one_line(
    folder: Path, name: str, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        open_dataset(table(folder, text, name), "train", **options)
    assert "\n" not in str(caught.value)


def test_splits_and_options_that_do_not_exist_are_named(folder: Path) -> None:
    source = table(folder, SPLITS.replace("valid", "B").replace("test", "A"))
    with pytest.raises(
        DataError, match=r"no split for validation among train, A, B; choose one, as in t\.csv,split=train"
    ):
        open_dataset(source, "val")
    with pytest.raises(DataError, match="no split for split=C among train, A, B"):
        open_dataset(f"{source},split=C", "val")
    with pytest.raises(ConfigError, match="no option 'spilt'; expected split"):
        open_dataset(f"{source},spilt=A", "val")
    with pytest.raises(DataError, match="leave out split="):
        open_dataset(f"{table(folder, PAIR, 'u.csv')},split=A", "train")
    with pytest.raises(DataError, match=r"gone\.csv: No such file"):
        open_dataset(folder / "gone.csv", "train")
    with pytest.raises(ConfigError, match="belong to tables"):
        open_dataset(fill(folder / "classes"), "train", label_column="x")
    with pytest.raises(ConfigError, match="belong to tables"):
        image_sources(folder / "img", images=folder)
    with pytest.raises(ConfigError, match="options behind a comma belong to tables"):
        open_dataset(f"{folder / 'classes'},split=train", "train")
    with pytest.raises(DataError, match=r"cannot be read as a table in UTF-8 .*0xe9"):
        open_dataset(table(folder, "path,label\nimg/0.png,caf\xe9\n", encoding="latin-1"), "train")


def test_images_beside_a_table_are_explained(folder: Path) -> None:
    table(folder, "name,label\n0.png,cat\n", "labels.csv")
    with pytest.raises(DataError) as raised:
        open_dataset(folder / "img", "train")
    # the whole text: the message itself ends at 300 characters, which long paths fill
    assert re.search(r"6 images lie right in it: name their table: .*labels\.csv, with --images", raised.value.args[0])


def test_exif_is_honoured_as_in_folders(folder: Path) -> None:
    image, exif = PIL.Image.new("RGB", (8, 4)), PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "img/turned.jpg", exif=exif)
    records = open_dataset(table(folder, "path,label\nimg/turned.jpg,cat\nimg/1.png,dog\n"), "train")
    assert records[0][0].size == (4, 8)
