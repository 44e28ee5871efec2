"""Fine-tuning in every mode on a folder of images: it learns them, and what it writes loads."""

from pathlib import Path
from typing import Any

import gpu_toys
import pytest
import torch

import deit_models

pytestmark = pytest.mark.gpu

RECIPE: dict[str, Any] = {"epochs": 3, "warmup_epochs": 0, "batch_size": 6, "patience": 0, "lr_batch": 0, "lr": 2e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_toys.save_folders(tmp_path_factory.mktemp("toy") / "train", 10)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("mode", ["full", "last-1", "head"])
def test_it_learns_in_every_mode(mode: str, precision: str, folder: Path, device: torch.device, tmp_path: Path) -> None:
    model = gpu_toys.small("distilled")
    gpu_toys.as_trained(model, gpu_toys.random_images(model, 16))
    result = deit_models.finetune(
        model,
        train=folder,
        out=tmp_path / "out",
        mode=mode,
        recipe=deit_models.recipe_named("finetune", **RECIPE, precision=precision),
        device=device,
        workers=0,
    )
    assert {parameter.device.type for parameter in result.model.parameters()} == {device.type}
    assert result.metrics["val"]["top1"] >= 50
    loaded = deit_models.from_pretrained(tmp_path / "out" / "best", device=device)
    assert loaded.origin.class_names == gpu_toys.CLASSES
    assert deit_models.Classifier(loaded)(gpu_toys.files(folder)[0]).error is None
