"""What the tests of the training engine share: pictures in memory, a model of a few thousand weights, plain recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from settings import PLAIN, RANDOM
from torch import Tensor, nn

import deit_models
from deit_models.checkpoint import Preprocessing
from deit_models.data.records import ArrayRecords
from deit_models.distributed import Process
from deit_models.errors import ImageError
from deit_models.models.layers import ImageClassifier
from deit_models.recipes.recipe import Recipe
from deit_models.training.learner import Learner, make_learner

SIZE = 8
PREPROCESSING = Preprocessing(resize=SIZE, crop=(SIZE, SIZE), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
ALONE = Process(0, 1, torch.device("cpu"))
WORKER = Path(__file__).parent / "training" / "worker.py"

LIVELY: dict[str, Any] = {**PLAIN, **RANDOM, "repeats": 3}
"""Everything that draws random numbers or keeps a state."""


def recipe(base: Mapping[str, Any] = PLAIN, /, **changes: Any) -> Recipe:
    return Recipe(**{**base, **changes})


def model(*, seed: int = 0, distilled: bool = False, **options: Any) -> ImageClassifier:
    torch.manual_seed(seed)
    name = "deit_micro_distilled_patch4_32" if distilled else "deit_micro_patch4_32"
    return deit_models.create_model(
        name, **{"img_size": SIZE, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, **options}
    )


class Pictures(ArrayRecords):
    """Noise with labels; those in `broken` cannot be read. `read` notes every index that was asked for."""

    def __init__(
        self, count: int, *, classes: int = 3, seed: int = 0, broken: Iterable[int] = (), shift: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        levels = torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, classes, (count,), generator=generator)
        labels = ((labels + shift) % classes).tolist()
        super().__init__("noise", levels.numpy(), labels, [f"kind {number}" for number in range(classes)])
        self.levels, self.labels, self.broken = levels, torch.tensor(labels), set(broken)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        self.read.append(index)
        if index in self.broken:
            raise ImageError(f"picture {index} is broken")
        return super().__getitem__(index)

    def tensors(self, preprocessing: Preprocessing) -> Tensor:
        """All of them as the evaluation transform gives them."""
        images = self.levels.permute(0, 3, 1, 2).double() / 255
        mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
        return ((images - mean) / std).float()


class Several(Pictures):
    """Noise with several labels an image, or none."""

    def __init__(self, count: int, *, classes: int = 3, seed: int = 0, broken: Iterable[int] = ()) -> None:
        super().__init__(count, classes=classes, seed=seed, broken=broken)
        rows = torch.rand(count, classes, generator=torch.Generator().manual_seed(seed)) < 0.4
        labels = [tuple(row.nonzero().flatten().tolist()) for row in rows]
        ArrayRecords.__init__(self, "noise", self.levels.numpy(), labels, self.classes)
        self.labels = rows.float()


def learner(network: nn.Module, settings: Recipe, *, teacher: Any = None, process: Process = ALONE) -> Learner:
    return make_learner(network, settings, num_classes=3, process=process, preprocessing=PREPROCESSING, teacher=teacher)


def differences(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The largest difference of each pair of tensors in two nested states; other values must be equal."""
    if isinstance(first, Tensor):
        assert first.shape == second.shape, path
        assert first.dtype == second.dtype, path
        yield path, float((first.detach().double() - second.detach().double()).abs().max()) if first.numel() else 0.0
    elif isinstance(first, Mapping):
        assert first.keys() == second.keys(), path
        for key in first:
            yield from differences(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{path}/{number}")
    else:
        assert first == second, path


def same_bits(first: Any, second: Any) -> None:
    """Two nested states are equal, bit for bit (0.0 and -0.0 apart)."""
    assert [name for name, difference in differences(first, second) if difference != 0.0] == []


def state(out: Path) -> dict[str, Any]:
    """The saved state of a run."""
    return torch.load(out / "last.pt", weights_only=True)


def start_worker(*arguments: Any, torchrun: int = 0, limit_s: float = 240) -> str:
    """Run `worker.py` in a process of its own, with one thread, and give its output; it must succeed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    root = os.pathsep.join([str(Path(deit_models.__file__).parents[1]), str(WORKER.parents[1])])
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
