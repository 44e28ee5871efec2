"""Images of any form to look at: order, names, labels where they are known."""

import pickle
from pathlib import Path

import pytest
from small_sets import Pictures, fill, write_image
from torchvision.datasets import ImageFolder

from deit_models.data.datasets import open_dataset
from deit_models.data.records import SubsetRecords
from deit_models.data.sources import find_images, image_sources
from deit_models.errors import DataError, ImageError
from deit_models.images.decoding import load_image


def test_folder_gives_its_files_in_the_order_of_find_images(tmp_path: Path) -> None:
    for name in ("b/x.png", "b-c/y.png", "a.png", "z.png"):
        write_image(tmp_path / name)
    sources = image_sources(tmp_path)
    assert (
        [*sources] == find_images(tmp_path) == [tmp_path / name for name in ("a.png", "b/x.png", "b-c/y.png", "z.png")]
    )
    assert sources[1:3] == [tmp_path / "b/x.png", tmp_path / "b-c/y.png"]
    assert (sources.name(-1), sources.label(0)) == (str(tmp_path / "z.png"), None)
    assert len(image_sources(tmp_path, recursive=False)) == 2


def test_files_and_folders_of_a_list_keep_their_order(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pets")
    write_image(tmp_path / "a.png")
    listed = [tmp_path / "a.png", str(tmp_path / "gone.png"), folder, tmp_path / "a.png"]
    sources = image_sources(listed)
    assert [*sources] == [tmp_path / "a.png", tmp_path / "gone.png", *find_images(folder), tmp_path / "a.png"]
    assert [*image_sources(str(tmp_path / "a.png"))] == [tmp_path / "a.png"]
    with pytest.raises(IndexError):
        sources[7]
    assert len(image_sources([])) == 0


def test_class_folders_give_labels_where_they_are_asked_for(tmp_path: Path) -> None:
    sources = image_sources(fill(tmp_path), labelled=True)
    assert [sources.label(i) for i in range(4)] == ["cat", "cat", "dog", "dog"]
    with pytest.raises(DataError, match="an image alone has no label"):
        image_sources(tmp_path / "cat/0.png", labelled=True)
    with pytest.raises(ImageError, match="no image in it or below"):
        image_sources([tmp_path / "cat/0.png", empty(tmp_path / "empty")])


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_images_of_data_sets_are_a_name_and_the_bytes_of_their_pixels(tmp_path: Path) -> None:
    sources = image_sources(Pictures(4))
    name, encoded = sources[3]
    assert name == sources.name(3) == "image 3 of pictures"
    assert load_image(encoded).tobytes() == Pictures(4)[3][0].tobytes()
    assert [sources.label(i) for i in range(4)] == ["a", "b", "c", "a"]
    name, encoded = image_sources(ImageFolder(fill(tmp_path)))[2]
    assert name == str(tmp_path / "dog/0.png")
    assert load_image(encoded).getpixel((0, 0)) == (50, 0, 10)


def test_images_in_files_stay_files(tmp_path: Path) -> None:
    records = open_dataset(fill(tmp_path), "train")
    pairs = [(tmp_path / "dog/1.png", "dog"), (tmp_path / "cat/0.png", "cat")]
    assert [*image_sources(pairs)] == [path for path, _ in pairs]
    assert image_sources(SubsetRecords(records, [3]))[0] == tmp_path / "dog/1.png"


def test_sources_travel_to_other_processes_small(tmp_path: Path) -> None:
    sources = image_sources(fill(tmp_path, images=300))
    assert len(pickle.dumps(sources)) < 600 * 30
    assert [*pickle.loads(pickle.dumps(sources))] == [*sources]
