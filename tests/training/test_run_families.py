"""Every family trains, learns from a teacher, and is written so that it loads."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import deit_models
from deit_models.models.layers import ImageClassifier
from deit_models.scoring.evaluation import evaluate
from deit_models.training.run import train

SHAPES: dict[str, dict[str, Any]] = {
    "deit3_small_patch16_224": {"patch_size": 8},
    "t2t_vit_7": {"token_dim": 16},
    "t2t_vit_t_14": {"token_dim": 16},
    "t2t_vit_24_token_labeling": {"token_dim": 16},
}


def small(name: str) -> ImageClassifier:
    torch.manual_seed(0)
    shape = {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return deit_models.create_model(name, **shape, **SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_family_learns_from_labels_and_teacher_and_loads_again(name: str, tmp_path: Path) -> None:
    model, pictures = small(name), tiny.Pictures(24)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    settings = {"distillation": "hard", "distill_on": "class", "ema_decay": 0.9, "precision": "bf16", "epochs": 6}
    result = train(
        model,
        recipe=tiny.recipe(tiny.LIVELY, **{"repeats": 1, **settings}),
        train=pictures,
        val=pictures,
        teacher=tiny.model(seed=1),
        out=tmp_path,
        workers=0,
        device="cpu",
    )
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in result.log)
    after = model.state_dict()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in before if not torch.equal(before[key], after[key])} == trained
    for folder in ("model", "ema"):
        loaded = deit_models.from_pretrained(tmp_path / folder)
        assert loaded.config.image_hw == (16, 16)
        assert loaded.origin.name == name
        assert evaluate(loaded, pictures, workers=0, device="cpu").images == 24
    assert deit_models.Classifier(loaded)(pictures[0][0]).predictions[0].label.startswith("kind")


@pytest.mark.parametrize("name", SHAPES)
def test_family_can_fit_a_handful_of_pictures(name: str, tmp_path: Path) -> None:
    pictures = tiny.Pictures(8)
    result = train(
        small(name),
        recipe=tiny.recipe(epochs=60, lr=3e-3),
        train=pictures,
        val=pictures,
        out=tmp_path,
        workers=0,
        device="cpu",
    )
    assert result.log[-1]["loss"] < 0.7 * result.log[0]["loss"]
