"""Read a golden file, and make the weights and the input its figures were computed with."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fill import fill, image


@cache
def read(name: str) -> dict[str, Any]:
    """The golden file of a registered model."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def weights(name: str) -> dict[str, Tensor]:
    """The filled state dict, under the authors' names and in their order."""
    entries = read(name)["state_dict"]
    return {e["name"]: torch.from_numpy(fill(e["name"], tuple(e["shape"]))) for e in entries if e["filled"]}


def inputs(size: int) -> Tensor:
    """The two images of noise, (2, 3, size, size)."""
    return torch.from_numpy(image(2, size))
