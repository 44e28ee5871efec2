"""Data sets of Hugging Face's library: objects, saved folders, Parquet files; DataFrames of pandas."""

import io
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from small_sets import write_image

from deit_models.batches.loading import make_loader
from deit_models.batches.memory import keep_in_memory
from deit_models.data.classes import wrap
from deit_models.data.datasets import has_validation, open_dataset, open_images
from deit_models.data.records import SubsetRecords, always_the_same
from deit_models.data.sources import image_sources
from deit_models.errors import ConfigError, DataError, ImageError
from deit_models.images.decoding import load_image

library = pytest.importorskip("datasets", reason="datasets is not installed")
pandas = pytest.importorskip("pandas", reason="pandas is not installed")
pytestmark = [
    # of the library's own: fork beside threads, files that it leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
]

NAMES = ["cat", "dog", "eel"]
LABELS = [0, 1, 2, 1]


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    library.disable_progress_bars()
    yield
    library.enable_progress_bars()


def encoded(number: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), (number * 40, 0, 0)).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def columns(**changes: Any) -> Any:
    """A set of four images with one label each, and with several."""
    features = {
        "image": library.Image(),
        "label": library.ClassLabel(names=NAMES),
        "tags": library.Sequence(library.ClassLabel(names=NAMES)),
        "word": library.Value("string"),
    }
    values = {
        "image": [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(4)],
        "label": LABELS,
        "tags": [[2, 0], [], [1], [0, 1, 2]],
        "word": ["sea", "land", "sea", "air"],
    }
    data = library.Dataset.from_dict(values, features=library.Features(features))
    return data.select_columns(["image", *changes.pop("keep", ["label"])])


def by_split(*names: str) -> Any:
    return library.DatasetDict({name: columns().select(range(4 - place)) for place, name in enumerate(names)})


def parquet(folder: Path, **sets: Any) -> Path:
    """A folder as on the Hub."""
    for split, data in sets.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def test_sets_are_read_by_the_types_of_their_columns(caplog: pytest.LogCaptureFixture) -> None:
    records = open_images(columns(), "train")
    assert (records.classes, records.multi_label, len(records)) == (tuple(NAMES), False, 4)
    assert [records.label(i) for i in range(4)] == [records[i][1] for i in range(4)] == LABELS
    assert [records[i][0].getpixel((0, 0))[0] for i in range(4)] == [0, 40, 80, 120]
    assert (records.describe(2), records.label(-1)) == ("image 2 of Dataset", 1)
    assert not caplog.records
    with pytest.raises(IndexError):
        records[4]


@pytest.mark.parametrize(
    ("keep", "options", "classes", "labels"),
    [
        (["tags"], {}, NAMES, [(0, 2), (), (1,), (0, 1, 2)]),
        (["label", "tags"], {"label_column": "tags"}, NAMES, [(0, 2), (), (1,), (0, 1, 2)]),
        (["label", "word"], {}, NAMES, LABELS),
        (["word"], {}, ["air", "land", "sea"], [2, 1, 2, 0]),
        (["label", "word"], {"label_column": "word"}, ["air", "land", "sea"], [2, 1, 2, 0]),
    ],
)
def test_labels_are_numbers_lists_or_names(
    keep: list[str], options: dict[str, Any], classes: list[str], labels: list[Any]
) -> None:
    records = open_dataset(columns(keep=keep), "train", **options)
    assert (records.classes, [records.label(i) for i in range(4)]) == (tuple(classes), labels)
    assert records.multi_label is isinstance(labels[0], tuple)


def test_splits_of_a_set_are_those_of_folders(tmp_path: Path) -> None:
    both = by_split("train", "validation", "test")
    both.save_to_disk(tmp_path / "saved")
    hub = parquet(tmp_path / "hub", **both)
    for source in (both, tmp_path / "saved", str(hub)):
        assert [len(open_dataset(source, split)) for split in ("train", "val")] == [4, 3]
        assert has_validation(source)
        assert len(image_sources(source)) == 9
    for source in (tmp_path / "saved", hub):
        assert len(open_dataset(f"{source},split=test", "val")) == 2
        assert not has_validation(f"{source},split=train")
        with pytest.raises(DataError, match=r"no split for split=dev among train, validation, test; choose one, as in"):
            open_dataset(f"{source},split=dev", "val")
    assert len(open_images(by_split("train", "test"), "val")) == 3
    with pytest.raises(DataError, match="DatasetDict: no split for validation among train, unlabelled"):
        open_images(by_split("train", "unlabelled"), "val")


def test_a_lone_set_is_a_training_set_unless_it_is_named_for_validation(tmp_path: Path) -> None:
    columns().save_to_disk(tmp_path / "saved")
    columns().to_parquet(tmp_path / "one.parquet")
    for source in (tmp_path / "saved", tmp_path / "one.parquet", columns()):
        assert len(open_dataset(source, "train")) == len(open_dataset(source, "val", own_folder=True)) == 4
        assert not has_validation(source)
        with pytest.raises(DataError, match="no splits, so it is a training set"):
            open_dataset(source, "val")


def test_images_are_decoded_by_our_decoder(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "file.png", (7, 8, 9))
    rows = [
        {"bytes": encoded(1, format="JPEG", exif=exif), "path": None},
        {"bytes": None, "path": str(tmp_path / "file.png")},
        {"bytes": b"no image", "path": "x.png"},
        None,
    ]
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=NAMES)})
    data = library.Dataset.from_dict({"image": rows, "label": [0, 1, 2, 0]}, features=features)
    records = open_images(data, "train")
    assert records[0][0].size == (6, 8)
    assert records[0][0].tobytes() == load_image(rows[0]["bytes"]).tobytes()  # type: ignore[index]
    assert records[1][0].getpixel((0, 0)) == (7, 8, 9)
    for index in (2, 3):
        with pytest.raises(ImageError, match=f"image {index} of Dataset: "):
            records[index]
    sources = image_sources(data)
    assert (sources[1], sources[0]) == (tmp_path / "file.png", ("image 0 of Dataset", rows[0]["bytes"]))  # type: ignore[index]
    assert sources[3] == ("image 3 of Dataset", b"")
    assert wrap(data)[0][0].size == (6, 8)


def test_nothing_is_decoded_ahead_and_sets_travel_small(tmp_path: Path) -> None:
    columns().save_to_disk(tmp_path / "saved")
    records = open_dataset(tmp_path / "saved", "train")
    assert len(pickle.dumps(records)) < 4000
    assert pickle.loads(pickle.dumps(records))[3][0].getpixel((0, 0)) == (120, 0, 0)
    assert always_the_same(records)
    part = SubsetRecords(records, [3, 1])
    assert ([part.key(i) for i in range(2)], part.source(0)) == (
        [f"{row} ({len(encoded(row))} bytes)" for row in (3, 1)],
        ("image 3 of saved", encoded(3)),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_sets_are_read_by_loading_processes_and_kept_in_memory(tmp_path: Path, workers: int) -> None:
    columns().save_to_disk(tmp_path / "saved")
    records = open_dataset(tmp_path / "saved", "train")
    loader = make_loader(Reds(records), [3, 0, 2], batch_size=2, workers=workers, device=torch.device("cpu"))
    assert torch.cat([*loader]).tolist() == [120, 0, 80]
    cached = keep_in_memory(records, "ram", workers=workers)
    assert [cached[i][0].getpixel((0, 0))[0] for i in range(4)] == [0, 40, 80, 120]


class Reds(torch.utils.data.Dataset[torch.Tensor]):
    """The red of each image."""

    def __init__(self, records: Any) -> None:
        self.records = records

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(self.records[index][0].getpixel((0, 0))[0])


def test_a_split_column_and_the_order_of_rows_are_kept() -> None:
    data = columns(keep=["label", "word"]).rename_column("word", "split").shuffle(seed=1)
    words = data["split"][:]
    data = data.remove_columns("split").add_column("split", ["train" if word == "sea" else "test" for word in words])
    parts = {split: open_images(data, split) for split in ("train", "val")}
    assert sorted(parts["train"].label(i) for i in range(2)) == [0, 2]
    for part in parts.values():
        assert [part[i][0].getpixel((0, 0))[0] // 40 % 3 for i in range(2)] == [
            part.label(i) if part[i][0].getpixel((0, 0))[0] < 120 else 0 for i in range(2)
        ]


def test_missing_labels_are_named_unless_they_are_not_needed() -> None:
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=NAMES)})
    rows = {"image": [{"bytes": encoded(0), "path": None}] * 3, "label": [1, -1, -1]}
    data = library.Dataset.from_dict(rows, features=features)
    with pytest.raises(DataError, match=r"Dataset: 2 of 3 rows have no label \(empty or -1\), the first is row 2"):
        open_images(data, "val")
    assert [image_sources(data).label(i) for i in range(3)] == ["dog", None, None]


def test_streams_several_labels_and_wrong_columns_are_refused_with_the_way_out() -> None:
    stream = columns().to_iterable_dataset()
    for source in (stream, library.IterableDatasetDict({"train": stream})):
        with pytest.raises(DataError, match=r"is a stream without items by number; load it without streaming=True"):
            open_images(source, "train")
    with pytest.raises(DataError, match=r"which column has the labels\? .* of image, label, tags"):
        open_images(columns(keep=["label", "tags"]), "train")
    with pytest.raises(DataError, match="0 columns 'lable', expected one; nearest: label"):
        open_dataset(columns(), "train", label_column="lable")
    with pytest.raises(ConfigError, match="its images are in it; leave out images="):
        open_dataset(columns(), "train", images="photos")


def test_a_transform_of_the_users_own_is_read_through_it() -> None:
    blank = PIL.Image.new("RGB", (2, 2), (9, 9, 9))
    data = columns().with_transform(lambda rows: {"image": [blank] * len(rows["image"]), "label": rows["label"]})
    records = open_images(data, "train")
    assert (records[1][0].getpixel((0, 0)), records[1][1], records.classes) == ((9, 9, 9), 1, tuple(NAMES))
    assert not always_the_same(records)


def test_paths_in_parquet_files_and_frames_are_those_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        write_image(tmp_path / f"{number}.png", (number, 0, 0))
    frame = pandas.DataFrame({"image_id": [2, 0, 1], "label": [1.0, 7.0, 1.0]}, index=[5, 6, 7])
    frame.to_parquet(tmp_path / "t.parquet")
    with caplog.at_level(logging.ERROR):
        for source in (frame, tmp_path / "t.parquet"):
            records = open_dataset(source, "train", images=tmp_path)
            assert ([records.key(i) for i in range(3)], records.classes) == (["2.png", "0.png", "1.png"], ("1", "7"))
            assert [records.label(i) for i in range(3)] == [0, 1, 0]
    with pytest.raises(DataError, match=r"DataFrame: no file 2, nor others of the table; name the folder"):
        open_images(frame, "train")
    frame["label"] = [["a", "b"], [], ["b"]]
    frame.to_parquet(tmp_path / "t.parquet")
    for source in (frame, tmp_path / "t.parquet"):
        records = open_dataset(source, "train", images=tmp_path)
        assert [records.label(i) for i in range(3)] == [(0, 1), (), (1,)]
    frame["label"] = [1.0, float("nan"), None]
    with pytest.raises(DataError, match="DataFrame: 2 of 3 rows have no label"):
        open_dataset(frame, "train", images=tmp_path)


def test_a_stray_parquet_file_beside_class_folders_changes_nothing(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        write_image(tmp_path / name / "0.png", (number, 0, 0))
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "index.parquet")
    assert open_dataset(tmp_path, "train").classes == ("cat", "dog")


def test_a_set_that_cannot_be_reached_is_one_line() -> None:
    command = [sys.executable, "-m", "deit_models", "evaluate", "deit_micro_distilled_patch4_32", "hf:owner/name"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(r"deit-models: hf:owner/name: .*Offline.*\n", done.stderr)
    with pytest.raises(ConfigError, match="no option 'config'; expected name or revision or split"):
        open_dataset("hf:owner/name,config=x", "train")


def test_offline_is_refused_for_a_set_on_the_hub_unless_its_library_is_told() -> None:
    arguments = ["evaluate", "deit_micro_distilled_patch4_32", "hf:owner/name", "--offline"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "deit_models", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "hf:owner/name is read offline with HF_HUB_OFFLINE=1" in done.stderr
