"""What the tests on a GPU share: small and full-size members of each family, images told apart by colour, recipes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from os import environ, pathsep
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from settings import PLAIN
from torch import Tensor, nn

import deit_models
from deit_models.models.layers import ImageClassifier
from deit_models.recipes.recipe import Recipe

CLASSES = ("ant", "bee", "cow")
SIDE = 32
WORKER = Path(__file__).with_name("gpu_worker.py")

_DEIT: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_T2T: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", _DEIT),
    "deit3": ("deit3_small_patch16_224", _DEIT),
    "distilled": ("deit_tiny_distilled_patch16_224", _DEIT),
    "levit": (
        "levit_128s",
        {"img_size": 64, "embed_dim": (32, 48), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8},
    ),
    "t2t_vit": ("t2t_vit_7", _T2T),
    "t2t_vit_t": ("t2t_vit_t_14", _T2T),
    "vit_resnas": (
        "vit_resnas_tiny",
        {
            "img_size": 64,
            "patch_size": 8,
            "stem_dim": 8,
            "stages": (
                {"embed_dim": 16, "head_dim": 8, "num_heads": (3, 1), "mlp_hidden": (20, 28)},
                {"embed_dim": 24, "head_dim": 6, "num_heads": (2,), "mlp_hidden": (30,)},
            ),
        },
    ),
    "cait": ("cait_xxs24_224", _DEIT | {"depth_token_only": 2}),
    "resmlp": ("resmlp_12", {key: value for key, value in _DEIT.items() if key != "num_heads"}),
}
FULL = {family: name for family, (name, _) in SMALL.items()}


def small(family: str, *, num_classes: int = 10, seed: int = 0, **options: Any) -> ImageClassifier:
    """A member of a family with a few thousand weights, untrained, in eval mode."""
    torch.manual_seed(seed)
    name, sizes = SMALL[family]
    return deit_models.create_model(name, num_classes=num_classes, **{**sizes, **options}).eval()


@torch.no_grad()
def as_trained(model: ImageClassifier, images: Tensor) -> ImageClassifier:
    """In place: random weights whose logits depend on the image, as trained ones do.

    Every branch counts, BatchNorms know the images, and each head's logits have mean 0 and spread 1 over them: fresh
    weights give nearly the same logits for every image, of which a comparison says little.
    """
    generator = torch.Generator().manual_seed(1)
    norms = [part for part in model.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            scale = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.2
            parameter.normal_(std=scale, generator=generator)
        elif parameter.abs().max() < 0.5:  # biases, and factors that begin near 0
            parameter.normal_(std=0.1, generator=generator)
        else:
            parameter.normal_(mean=1, std=0.2, generator=generator)
    for norm in norms:
        norm.momentum = None  # statistics become the mean over all batches
        norm.reset_running_stats()
    model.train(bool(norms))
    model.forward_heads(images)
    model.eval()
    found = model.forward_heads(images)
    for logits, name in zip((found.cls, found.dist), model.head_names, strict=False):
        if logits is not None:
            layer = [part for part in getattr(model, name).modules() if isinstance(part, nn.Linear)][-1]
            spread = logits.std(0).mean()
            layer.weight /= spread
            layer.bias.copy_((layer.bias - logits.mean(0)) / spread)
    return model


def random_images(model: ImageClassifier, count: int, *, seed: int = 0) -> Tensor:
    """Smooth random images as a model takes them, (B, 3, H, W) float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return nn.functional.interpolate(coarse, model.config.image_hw, mode="bilinear", align_corners=True)


def pixels(label: int, seed: int) -> np.ndarray:
    """(SIDE, SIDE, 3) noise with more of one colour."""
    level = np.random.default_rng((seed, label)).integers(0, 160, (SIDE, SIDE, 3), dtype=np.uint8)
    level[..., label % 3] += 90
    return level


class Colours(torch.utils.data.Dataset[Any]):
    """Labelled images that a small model learns to tell apart in a few steps."""

    classes = CLASSES

    def __init__(self, count: int, *, seed: int = 0) -> None:
        self.images = [pixels(number % 3, seed + number) for number in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        if index >= len(self.images):
            raise IndexError(index)
        return PIL.Image.fromarray(self.images[index]), index % 3


def save_folders(folder: Path, count: int, *, seed: int = 0) -> Path:
    """A folder of images for each class."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            PIL.Image.fromarray(pixels(label, seed + number)).save(folder / name / f"{number:02}.png")
    return folder


def files(folder: Path) -> list[Path]:
    """Its images, in order."""
    return sorted(folder.rglob("*.png"))


STEADY: dict[str, Any] = {
    **PLAIN,
    "epochs": 4,
    "batch_size": 12,
    "lr": 2e-3,
    "warmup_epochs": 0,
    "schedule": "constant",
    "distillation": "none",
}
"""Nothing random but the order of the images."""


def recipe(**changes: Any) -> Recipe:
    return deit_models.recipe_named("deit_300e", **{**STEADY, **changes})


def run_worker(scenario: str, folder: Path, device: torch.device, *, torchrun: bool = False) -> int:
    """Run a scenario of `gpu_worker.py` in a process of its own, one thread; gives the exit status.

    Anything but success or a kill is an error that shows what it printed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"] if torchrun else []
    root = pathsep.join([str(Path(deit_models.__file__).parents[1]), str(WORKER.parents[1])])
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), scenario, str(folder), device.type],
        # one process needs no network, and finds none on some machines
        env={
            **environ,
            "PYTHONPATH": root,
            "OMP_NUM_THREADS": "1",
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode not in (0, -9):
        pytest.fail(f"{scenario} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.returncode


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Two tables of tensors have the same names, and numbers that differ by no more than the tolerance."""
    assert found.keys() == expected.keys()
    off = {name: float((found[name].double() - expected[name].double()).abs().max()) for name in expected}
    assert {name: by for name, by in off.items() if not by <= tolerance} == {}


def weights(out: Path, *versions: str) -> Iterator[dict[str, Tensor]]:
    """The saved weights of a run, on the CPU: "model", and "ema_model" where there is an average."""
    saved = torch.load(out / "last.pt", weights_only=True, map_location="cpu")
    for version in versions:
        yield saved[version]
