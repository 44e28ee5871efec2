"""No training step makes the CPU wait for the GPU, or the GPU would run dry: counted on a GPU that is not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from fake_gpu import GPU, FakeGpu, fake_gpu
from nas.toy import supernet, toy_space
from torch import nn

import deit_models
from deit_models.batches.loading import FINE, Batch, DamageCount
from deit_models.distributed import Process
from deit_models.training.engine import train_epoch
from deit_models.training.learner import make_learner

LIVELY = {**tiny.LIVELY, "precision": "bf16", "accumulate": 1, "compile": "off"}
SMALL_LEVIT = {"embed_dim": (16, 16), "depth": (1, 1), "num_heads": (2, 2), "key_dim": 8}


def deit() -> nn.Module:
    return tiny.model(distilled=True)


def levit() -> nn.Module:
    return deit_models.create_model("levit_128s", img_size=32, num_classes=3, **SMALL_LEVIT)


def t2t() -> nn.Module:
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "token_dim": 8}
    return deit_models.create_model("t2t_vit_7", img_size=32, num_classes=3, **options)


def vit_resnas() -> nn.Module:
    return deit_models.create_model("vit_res_micro_patch4_32", num_classes=3, patch_head=True)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "deit": (deit, {}),
    "deit, hard": (deit, {"distillation": "hard"}),
    "deit, soft, sgd": (deit, {"distillation": "soft", "optimizer": "sgd"}),
    "levit": (levit, {"clip_grad": 0.01, "clip_mode": "agc"}),
    "t2t_vit": (t2t, {}),
    "vit_resnas": (vit_resnas, {"mix_mode": "patch"}),
    "super-network": (lambda: supernet(toy_space(), images=2), {"ema_decay": 0.0}),
}


class Bar(list[Batch]):
    """Batches behind a progress bar, as the engine knows it; it notes the losses that it is given."""

    told: ClassVar[list[float]] = []

    def set_postfix(self, *, loss: float, refresh: bool) -> None:
        assert not refresh
        self.told.append(loss)


def epoch_of(gpu: FakeGpu, model: nn.Module, settings: dict[str, Any], steps: int, **changes: Any) -> None:
    """An epoch of a learner, some fields of which are changed, behind a bar that shows the loss."""
    recipe = tiny.recipe(LIVELY, **settings)
    with torch.random.fork_rng(devices=[]):
        learner = make_learner(
            model,
            recipe,
            num_classes=3,
            process=Process(0, 1, GPU),
            preprocessing=tiny.PREPROCESSING,
            teacher=None if recipe.distillation == "none" else tiny.model(seed=1),
        )
    learner = replace(learner, fitted=True, **changes)  # trying is done once, before the first step
    gpu.waits.clear()
    data = [batch_for(gpu, model) for _ in range(steps)]
    damage = DamageCount(tiny.Pictures(8), 0.0)
    train_epoch(learner, data, steps=steps, epoch=2, damage=damage, watch=lambda batches, _: Bar(batches))


def batch_for(gpu: FakeGpu, model: nn.Module) -> Batch:
    """As a loader that pins its memory gives it, the images on the GPU already."""
    height, width = model.config.image_hw
    labels = gpu.pin(torch.zeros(8, dtype=torch.int64))
    return torch.zeros(8, 3, height, width, device=GPU), labels, torch.full((8,), FINE)


def waits(case: str, steps: int, patch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    build, settings = CASES[case]
    model = build()
    with fake_gpu(patch, model) as gpu:
        epoch_of(gpu, model, settings, steps=steps, **changes)
    return gpu.waits


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the end of an epoch reads the loss, the largest weight, the mean loss and the number of images, which goes there
    once = waits(case, 1, monkeypatch)
    assert len(once) <= 5
    assert waits(case, 3, monkeypatch) == once


def test_loss_is_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    few, *more = (len(waits("deit", steps, monkeypatch, look_every=3)) for steps in (2, 3, 4, 7))
    assert [count - few for count in more] == [0, 1, 2]
    Bar.told.clear()
    waits("deit", 7, monkeypatch, look_every=3)
    assert len(Bar.told) == 3, "after steps 3, 6 and 7: a bar is given what was read anyway"
