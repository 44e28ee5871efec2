"""A few steps of training in every way there is: the loss is a number and falls; float32 learns what a CPU learns."""

from pathlib import Path
from typing import Any

import gpu_toys
import pytest
import torch
from torch import Tensor

import deit_models
from deit_models.training.run import TrainResult

pytestmark = pytest.mark.gpu

LOGIT_TOLERANCE = 1e-3
"""Of a float32 run after 12 steps, TF32 off, between a GPU and a CPU: sums are added up in another order."""
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "average": {"precision": "bf16", "ema_decay": 0.8},
    "accumulated": {"precision": "bf16", "accumulate": 2, "clip_grad": 1.0},
    "soft teacher": {"precision": "bf16", "distillation": "soft"},
    "hard teacher": {"precision": "bf16", "distillation": "hard"},
    "mixed": {"precision": "bf16", "mixup": 0.2, "cutmix": 0.2, "mix_prob": 0.3, "erase": 0.2, "drop_path_rate": 0.1},
    "compiled": {"precision": "bf16", "compile": True},
}


def teacher(images: Tensor) -> Tensor:
    """Knows the colours: the mean of each channel says which."""
    return images.mean(dim=(2, 3)) * 5


def learn(family: str, out: Path, device: torch.device | str, **changes: Any) -> tuple[Any, TrainResult]:
    model = gpu_toys.small(family, num_classes=3)
    result = deit_models.train(
        model,
        recipe=gpu_toys.recipe(**changes),
        train=gpu_toys.Colours(36),
        val=gpu_toys.Colours(12, seed=100),
        out=out,
        teacher=teacher if changes.get("distillation", "none") != "none" else None,
        device=device,
        workers=0,
    )
    return model, result


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_falls(way: str, device: torch.device, tmp_path: Path) -> None:
    if way == "compiled" and device.type != "cuda":
        pytest.skip("in the rehearsal on the CPU: compiling takes too long")
    model, result = learn("distilled", tmp_path, device, epochs=6, **WAYS[way])
    losses = [row["loss"] for row in result.log]
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < 0.8 * losses[0], losses
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    if way == "average":
        assert result.log[-1]["ema_top1"] >= 0
        assert (tmp_path / "ema" / "model.safetensors").exists()


@pytest.mark.parametrize("family", ["levit", "t2t_vit", "vit_resnas", "deit3"])
def test_other_families_learn_in_bf16(family: str, device: torch.device, tmp_path: Path) -> None:
    _, result = learn(family, tmp_path, device, epochs=4, precision="bf16", ema_decay=0.5)
    losses = [row["loss"] for row in result.log]
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0], losses


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_float32_learns_what_the_cpu_learns(optimizer: str, device: torch.device, tmp_path: Path) -> None:
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in gpu_toys.Colours(12, seed=100).images])
    found = []
    for where in (device, "cpu"):
        model, result = learn("distilled", tmp_path / str(where)[:3], where, optimizer=optimizer, lr=1e-3)
        x = (images.to(next(model.parameters()).device) / 255 - 0.45) / 0.23
        with torch.inference_mode():
            found.append(([row["loss"] for row in result.log], model(x).cpu()))
        if device.type == "cpu":
            break
    (losses, logits), (expected_losses, expected) = found[0], found[-1]
    assert losses == pytest.approx(expected_losses, abs=LOGIT_TOLERANCE)
    assert float((logits - expected).abs().max()) <= LOGIT_TOLERANCE


def test_a_killed_run_goes_on_to_the_same_weights(device: torch.device, tmp_path: Path) -> None:
    import gpu_worker

    assert gpu_toys.run_worker("killed", tmp_path, device) == -9
    assert gpu_toys.run_worker("resumed", tmp_path, device) == 0
    alone = gpu_worker.lively(tmp_path / "alone", device)
    assert len(alone.log) == 4
    # a GPU may add up gradients in another order in each run
    tolerance = 0.0 if device.type == "cpu" else 1e-4
    for found, expected in zip(
        gpu_toys.weights(tmp_path / "killed", "model", "ema_model"),
        gpu_toys.weights(tmp_path / "alone", "model", "ema_model"),
        strict=True,
    ):
        gpu_toys.close(found, expected, tolerance)
