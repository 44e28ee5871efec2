"""What the tests of fine-tuning share: images told apart by their colour, and a model of a few thousand weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn

import deit_models
from deit_models.data.records import ArrayRecords
from deit_models.models.layers import ImageClassifier

CLASSES = ("ant", "bee", "cow")
QUICK: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 0,
    "batch_size": 6,
    "precision": "float32",
    "patience": 0,
    "lr_batch": 0,
}
"""Fields of the recipe for runs that must end soon."""


def pixels(label: int, *, seed: int, side: int = 16, shift: int = 120) -> np.ndarray:
    """(side, side, 3) noise, with more of one colour; `shift` is by how much, of 255."""
    level = np.random.default_rng((seed, label)).integers(0, 256 - shift, (side, side, 3), dtype=np.uint8)
    level[..., label % 3] += shift
    return level


def save_folders(folder: Path, classes: Sequence[str] = CLASSES, count: int = 6, *, seed: int = 0) -> Path:
    """A folder of images for each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            PIL.Image.fromarray(pixels(label, seed=seed + number)).save(folder / name / f"{number:02}.png")
    return folder


class Counted(ArrayRecords):
    """Images in memory that note which of them are read, each time."""

    def __init__(self, count: int, *, classes: int = 3, seed: int = 0, shift: int = 120) -> None:
        labels = [number % classes for number in range(count)]
        images = np.stack([pixels(label, seed=seed + number, shift=shift) for number, label in enumerate(labels)])
        super().__init__("counted", images, labels, [f"kind {number}" for number in range(classes)])
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        self.read.append(index)
        return super().__getitem__(index)


class Mixed(ArrayRecords):
    """Images with several labels, each a colour that is stronger in a third of the rows; the fourth label is none."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        chosen = draw.random((count, 3)) < (0.5, 0.4, 0.25)
        images = draw.integers(0, 135, (count, 16, 16, 3), dtype=np.uint8)
        for colour in range(3):
            images[:, 5 * colour : 5 * colour + 5, :, colour] += (120 * chosen[:, None, None, colour]).astype(np.uint8)
        labels = [tuple(int(number) for number in np.flatnonzero(row)) for row in chosen]
        super().__init__("mixed", images, labels, ("red", "green", "blue", "grey"))


class Unlabelled(torch.utils.data.Dataset):
    """A Dataset that tells its labels with the images only."""

    def __init__(self, records: Counted) -> None:
        self.records, self.classes = records, list(records.classes)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return self.records[index]


def atom(*, distilled: bool = False, num_classes: int = 10, seed: int = 0, **options: Any) -> ImageClassifier:
    """A small model with random weights, large enough for its features to differ."""
    torch.manual_seed(seed)
    name = "deit_micro_distilled_patch4_32" if distilled else "deit_micro_patch4_32"
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": num_classes}
    model = deit_models.create_model(name, **{**small, **options})
    torch.manual_seed(seed)  # whatever the heads drew: the body is the same for any number of classes
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def recipe(**changes: Any) -> deit_models.recipes.recipe.Recipe:
    return deit_models.recipe_named("finetune", **{**QUICK, **changes})
