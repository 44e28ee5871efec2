"""Small labelled sets: class folders of plain images, images that draw at random or cannot be read, label maps."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from deit_models.augmentation.label_maps import images_in_words, packed
from deit_models.data.records import ImageRecords
from deit_models.errors import ImageError


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


def distributions(*shape: int, seed: int = 0) -> Tensor:
    """Random probabilities, the second axis being that of the classes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(dim=1)


def write_maps(folder: Path, records: Any, probabilities: Tensor, **changes: Any) -> Path:
    """A folder of maps, without `make_label_maps`."""
    folder.mkdir()
    np.save(folder / "maps.npy", packed(probabilities))
    about = {"teacher": "a teacher", "weights": "0", "grid": list(probabilities.shape[2:]), **images_in_words(records)}
    (folder / "about.json").write_text(json.dumps({**about, **changes}), encoding="utf-8")
    return folder
