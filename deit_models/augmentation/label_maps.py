"""Label maps: a teacher's probabilities for each cell of each training image, on disk, cut along with the augmentation.

A folder holds `maps.npy`, read by memory mapping, and `about.json`: the teacher, the classes, the grid, and a digest of
the images' names, so that maps of other images are refused.

Source: Jiang et al., All Tokens Matter: Token Labeling for Training Better Vision Transformers, 2021, arXiv:2104.10858,
sections 3.2 and 3.3.

Differs from the authors' code:
- probabilities are stored, theirs are the logits, with a softmax after the cut, in which other classes count as 0;
- a crop's rows and columns are cut from the map's rows and columns; they hand them over in the other order;
- geometric operations of RandAugment come after the crop here, and move no label; theirs come before it, and move it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from ..data.records import ImageRecords, some
from ..errors import CheckpointError, ConfigError, DataError, first_line, shown
from ..files import digest_of_names, read_json
from ..images.transforms import to_device

MAPS_NAME, ABOUT_NAME = "maps.npy", "about.json"
KEPT = 5
"""Classes that are kept of each cell, the likeliest ones; the paper's number."""


def images_in_words(records: ImageRecords) -> dict[str, Any]:
    """Identity of a set of training images: the facts in which maps and images must agree."""
    labels = (f"\t{records.label(i)}" if records.knows_labels else "" for i in range(len(records)))
    names = digest_of_names(f"{records.key(i)}{label}" for i, label in enumerate(labels))
    return {"classes": list(records.classes), "images": len(records), "names": names}


def row_type(num_classes: int) -> np.dtype[Any]:
    """The type of an entry of `maps.npy`: a class, in two or four bytes, and its probability."""
    return np.dtype([("class", "<i2" if num_classes <= 1 << 15 else "<i4"), ("probability", "<f2")])


def packed(probabilities: Tensor) -> Any:
    """The likeliest classes of each cell: (B, K, h, w) float -> an array (B, KEPT or K, h, w) of `row_type`."""
    values, classes = probabilities.float().topk(min(KEPT, probabilities.shape[1]), dim=1)
    rows = np.empty(tuple(values.shape), row_type(probabilities.shape[1]))
    rows["class"], rows["probability"] = classes.cpu().numpy(), values.cpu().numpy()
    return rows


class LabelMaps:
    """The label maps of a training set, of which only the rows in use are read.

    Attributes:
        about: the facts of `about.json`.
    """

    def __init__(self, folder: str | os.PathLike[str], records: ImageRecords) -> None:
        """Open a folder that `make_label_maps` wrote.

        Raises: ConfigError: it is no such folder. DataError: its maps are of other classes or other images.
        """
        self.folder, self.num_classes = Path(folder), len(records.classes)
        try:
            self.about = read_json(self.folder / ABOUT_NAME)
            self._rows = np.load(self.folder / MAPS_NAME, mmap_mode="r")
            shape = (self.about["images"], min(KEPT, len(self.about["classes"])), *self.about["grid"])
        except (OSError, ValueError, LookupError, TypeError, CheckpointError) as error:
            text = f"{self.folder} holds no label maps ({first_line(error)}); `deit-models label-maps` makes them"
            raise ConfigError(text) from error
        self._check_images(records)
        if self._rows.shape != shape or self._rows.dtype != row_type(self.num_classes):
            raise ConfigError(f"{self.folder / MAPS_NAME} does not fit {ABOUT_NAME} beside it; make the maps again")

    def _check_images(self, records: ImageRecords) -> None:
        wanted = images_in_words(records)
        advice = f"{records.name}; make maps of these images with `deit-models label-maps`"
        theirs, ours = self.about["classes"], wanted["classes"]
        if theirs != ours:
            first = [name for name in theirs if name not in ours], [name for name in ours if name not in theirs]
            known = " and ".join(some(names) for names in first if names) or "the same in another order"
            raise DataError(f"{self.folder} has maps of other classes ({known}) than {advice}")
        for name, what in (
            ("images", "maps of {} images, expected {}"),
            ("names", "maps of other images ({}, not {})"),
        ):
            if self.about.get(name) != wanted[name]:
                raise DataError(f"{self.folder} has {what.format(shown(self.about.get(name)), wanted[name])}: {advice}")

    def __str__(self) -> str:
        """The maps' identity, for the state of a run."""
        return f"{self.about.get('teacher')} ({self.about.get('weights')}), {self.about['names']}"

    def dense(self, numbers: Tensor, device: torch.device) -> Tensor:
        """The maps of some images: (B,) int64 on the CPU -> (B, K, h, w) float32 on the device, 0 for other classes."""
        rows = self._rows[numbers.numpy()]
        classes, values = (
            to_device(torch.from_numpy(rows[name].astype(kind)), device)
            for name, kind in (("class", np.int64), ("probability", np.float32))
        )
        maps = torch.zeros(len(rows), self.num_classes, *rows.shape[2:], device=device)
        return maps.scatter_(1, classes, values)

    def cut(self, places: Tensor, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Labels of the patches of augmented images, see `cut_maps`.

        Shape: (B, 6) float64 on the CPU: the image's number, then the box -> (B, grid h * w, K) on the device.
        """
        return cut_maps(self.dense(places[:, 0].long(), device), to_device(places[:, 1:].float(), device), grid)


def cut_maps(maps: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Label maps of crops, on the grid of a student's patches: (B, K, h, w) and (B, 5) -> (B, grid h * w, K) float32.

    A box is top, left, bottom and right as fractions of the image's sides, and 1 for a crop that is mirrored. A patch
    has the mean of the map under it (RoIAlign), scaled to a sum of 1. Where a patch lies outside of the image in part,
    as in the padding of a crop, the sum is the part inside: the rest has no label.
    """
    top, left, bottom, right, mirrored = boxes.unbind(1)
    height, width = maps.shape[2:]
    numbers = torch.arange(len(maps), device=maps.device)
    regions = torch.stack([numbers, left * width, top * height, right * width, bottom * height], dim=1)
    cells = roi_align(maps, regions, grid, aligned=True)
    inside = _inside(top, bottom, grid[0])[:, :, None] * _inside(left, right, grid[1])[:, None, :]
    # an image that the teacher could not read has zeros, and keeps them
    shares = cells * (inside / cells.sum(dim=1).clamp(min=1e-12))[:, None]
    shares = torch.where(mirrored[:, None, None, None] > 0, shares.flip(3), shares)
    return shares.flatten(2).transpose(1, 2)


def _inside(start: Tensor, end: Tensor, count: int) -> Tensor:
    """The part from 0 to 1 of each of `count` equal parts between two places: two of (B,) -> (B, count)."""
    steps = torch.arange(count + 1, device=start.device) / count
    edges = start[:, None] + (end - start)[:, None] * steps
    return edges.clamp(0, 1).diff(dim=1) / edges.diff(dim=1)
