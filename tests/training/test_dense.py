"""Making label maps: the teacher's probabilities for the whole of each image, what is refused, and interrupted runs."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from deit_models import make_label_maps
from deit_models.augmentation.label_maps import LabelMaps
from deit_models.errors import ConfigError, DataError, TrainingError
from deit_models.files import read_json
from deit_models.images.transforms import EvalTransform

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"student": tiny.PREPROCESSING, "device": "cpu", "workers": 0}


def convnet(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    body = [nn.Conv2d(3, 8, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, classes)).eval()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [5, 64])
def test_maps_hold_the_teachers_probabilities_for_each_place(tmp_path: Path, batch_size: int) -> None:
    pictures, teacher = tiny.Pictures(41), convnet()
    about = make_label_maps(teacher, pictures, tmp_path, batch_size=batch_size, **PLAIN)
    assert (about["grid"], about["images"], about["pixels"]) == ([4, 4], 41, [8, 8])
    assert read_json(tmp_path / "about.json") == about
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "maps.npy"]
    found = LabelMaps(tmp_path, pictures).dense(torch.arange(41), CPU)
    cells = teacher[:2](pictures.tensors(tiny.PREPROCESSING)).permute(0, 2, 3, 1)
    expected = (cells @ teacher[4].weight.T + teacher[4].bias).softmax(dim=3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_map_covers_the_whole_of_an_image_whatever_its_aspect(tmp_path: Path) -> None:
    """The left half of a wide image is white: so is the left half of its map, which a centre crop would shift."""

    class Wide(tiny.Pictures):
        def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
            image = PIL.Image.new("RGB", (40, 8))
            image.paste((255, 255, 255), (0, 0, 20, 8))
            return image, 0

    teacher = convnet()
    make_label_maps(teacher, Wide(3), tmp_path, **PLAIN)
    found = LabelMaps(tmp_path, Wide(3)).dense(torch.tensor([0]), CPU)[0]
    steps = found.diff(dim=2).abs().amax(dim=(0, 1))  # the resize rings a little beside the edge
    assert float(steps[1]) > 3 * float(steps[[0, 2]].max())


@torch.no_grad()
def test_own_models_teach_at_their_own_size_and_others_at_the_students_or_as_asked(tmp_path: Path) -> None:
    pictures = tiny.Pictures(4)
    model = tiny.model(img_size=16).eval()
    model.origin = replace(model.origin, preprocessing=replace(model.origin.preprocessing, mean=(0.1, 0.2, 0.3)))
    assert make_label_maps(model, pictures, tmp_path / "own", **PLAIN)["grid"] == [4, 4]
    assert make_label_maps(convnet(), pictures, tmp_path / "other", img_size=(12, 8), **PLAIN)["grid"] == [6, 4]
    found = LabelMaps(tmp_path / "own", pictures).dense(torch.tensor([2]), CPU)
    spec = replace(model.origin.preprocessing, resize=(16, 16), crop=(16, 16))
    patches = model.forward_features(EvalTransform(spec)(pictures[2][0])[None])[:, 1:]
    expected = model.head(patches).softmax(dim=2).mT.reshape(1, 3, 4, 4)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_unreadable_images_have_no_labels_and_too_many_end_it(tmp_path: Path) -> None:
    pictures = tiny.Pictures(9, broken=(4,))
    make_label_maps(convnet(), pictures, tmp_path / "one", **PLAIN)
    found = LabelMaps(tmp_path / "one", pictures).dense(torch.arange(9), CPU).sum(dim=(1, 2, 3))
    assert found[4] == 0
    assert (found.round() == 16).sum() == 8
    with pytest.raises(DataError, match="at least 3 of the 9 images"):
        make_label_maps(convnet(), tiny.Pictures(9, broken=(1, 4, 6)), tmp_path / "many", **PLAIN)


def test_interrupted_run_goes_on_after_its_last_block(tmp_path: Path) -> None:
    pictures = tiny.Pictures(48)
    make_label_maps(convnet(), pictures, tmp_path / "whole", **PLAIN)

    class Stopped(tiny.Pictures):
        def __getitem__(self, index: int) -> Any:
            if index == 30:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    options = {**PLAIN, "batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        make_label_maps(convnet(), Stopped(48), tmp_path / "cut", **options)
    with pytest.raises(ConfigError, match=r"maps.npy.parts exists; --resume .*--overwrite"):
        make_label_maps(convnet(), pictures, tmp_path / "cut", **options)
    pictures.read.clear()
    make_label_maps(convnet(), pictures, tmp_path / "cut", resume=True, **options)
    assert min(pictures.read) == 30
    first, second = (np.load(tmp_path / name / "maps.npy") for name in ("whole", "cut"))
    assert first.tobytes() == second.tobytes()
    pictures.read.clear()
    make_label_maps(convnet(), pictures, tmp_path / "cut", resume=True, **options)
    assert not pictures.read
    other = copy.deepcopy(convnet())
    with torch.no_grad():
        other[4].bias += 1
    with pytest.raises(ConfigError, match=r"is of another run .weights: "):
        make_label_maps(other, pictures, tmp_path / "cut", resume=True, **options)
    make_label_maps(other, pictures, tmp_path / "cut", overwrite=True, **options)
    assert np.load(tmp_path / "cut" / "maps.npy").tobytes() != first.tobytes()


def test_what_makes_no_maps_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pictures, out = tiny.Pictures(4), tmp_path / "maps"
    with pytest.raises(ConfigError, match=r"Sequential gives no logits .* of 2x2 pixels; .*, --img-size\)"):
        make_label_maps(convnet(), pictures, out, img_size=(2, 2), **PLAIN)
    with pytest.raises(ConfigError, match="function gives no logits for places of an image"):
        make_label_maps(lambda x: F.one_hot(torch.zeros(len(x), dtype=torch.long), 3) * 1.0, pictures, out, **PLAIN)
    with pytest.raises(TrainingError, match="teacher has 4 classes, the student's data 3"):
        make_label_maps(convnet(4), pictures, out, **PLAIN)
    with pytest.raises(DataError, match="label maps are of one class for each image"):
        make_label_maps(convnet(), tiny.Several(4), out, **PLAIN)
    assert not out.exists()
