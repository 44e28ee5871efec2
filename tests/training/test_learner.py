"""Making a learner: what the recipe sets in it, and what does not fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from fake_gpu import GPU, fake_gpu
from torch import Tensor, nn

from deit_models import adapt_head
from deit_models.batches.loading import DamageCount
from deit_models.distributed import Process
from deit_models.errors import ConfigError, DataError, TrainingError
from deit_models.recipes.recipe import Recipe
from deit_models.training.engine import train_epoch
from deit_models.training.learner import make_learner


def test_patch_dropout_of_the_recipe_reaches_the_model() -> None:
    learner = tiny.learner(tiny.model(), tiny.recipe(patch_drop_rate=0.5))
    seen = []
    learner.bare.model.blocks.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    batch = (torch.randn(8, 3, tiny.SIZE, tiny.SIZE), torch.zeros(8, dtype=torch.long), torch.full((8,), -1))
    train_epoch(learner, [batch], steps=1, epoch=0, damage=DamageCount(tiny.Pictures(1), 0.01))
    assert seen == [3]  # the class token and two of four patches


def test_versions_are_the_weights_and_their_average() -> None:
    alone, averaged = (tiny.learner(tiny.model(), tiny.recipe(ema_decay=decay)) for decay in (0.0, 0.5))
    assert alone.versions() == {"": alone.bare}
    assert averaged.versions() == {"": averaged.bare, "ema_": averaged.average.module}


@pytest.mark.parametrize(
    ("device", "choice", "open_"),
    [(GPU, "auto", True), (GPU, "off", False), (torch.device("cpu"), "auto", False)],
    ids=str,
)
def test_only_a_gpu_leaves_it_open_and_has_its_memory_tried(
    device: torch.device, choice: Any, open_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Recipe(**{**tiny.PLAIN, "compile": choice})
    with fake_gpu(monkeypatch):
        process = Process(0, 1, device)
        learner = make_learner(tiny.model(), settings, num_classes=3, process=process, preprocessing=tiny.PREPROCESSING)
    assert learner.undecided is open_
    assert learner.fitted is (device.type == "cpu")
    assert learner.heads is learner.bare


def teacher(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


def fifteen(images: Tensor) -> Tensor:
    return torch.zeros(len(images), 15)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: tiny.learner(tiny.model(num_classes=4), tiny.recipe()), DataError, "has 3 classes, the model 4; .*=3"),
        (lambda: tiny.learner(tiny.model(), tiny.recipe(img_size=16)), ConfigError, r"img_size=16, .*\(8, 8\)"),
        (lambda: tiny.learner(nn.Linear(3, 3), tiny.recipe(img_size=16)), ConfigError, r"img_size=16, .*\(8, 8\)"),
        (lambda: tiny.learner(tiny.model(), tiny.recipe(distillation="hard")), TrainingError, "needs a teacher"),
        (lambda: tiny.learner(tiny.model(), tiny.recipe(), teacher=teacher), TrainingError, "distillation='none'"),
        (
            lambda: tiny.learner(tiny.model(distilled=True), tiny.recipe(distillation="hard"), teacher=fifteen),
            TrainingError,
            "teacher has 15 classes, the student's data 3",
        ),
        (lambda: tiny.learner(nn.Linear(3, 3), tiny.recipe(patch_drop_rate=0.5)), ConfigError, "patch_drop_rate=0.5"),
        (
            lambda: tiny.learner(tiny.model(distilled=True), tiny.recipe(cosub=True, drop_path_rate=0.1)),
            ConfigError,
            "cosub trains one head",
        ),
        (lambda: tiny.learner(tiny.model().requires_grad_(False), tiny.recipe()), ConfigError, "nothing to train"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    make: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_model_of_another_problem_is_not_trained_until_it_has_new_heads(problem: str) -> None:
    model = tiny.model()
    model.origin = replace(model.origin, problem_type=problem)
    with pytest.raises(ConfigError, match=f"{problem}, training needs one class"):
        tiny.learner(model, tiny.recipe())
    tiny.learner(adapt_head(model, num_classes=model.num_classes), tiny.recipe())
