"""Which settings to fine-tune with: the facts for data sets known by name, a sound default for all others."""

from __future__ import annotations

from typing import Any

from ..models.layers import ImageClassifier
from ..training.recipe import Recipe, recipe_named

DEFAULT = "finetune"
PRESET_OF = {
    "cifar10": "finetune_sgd",
    "cifar100": "finetune_sgd",
    "stanford_cars": "finetune_sgd",
    "flowers102": "finetune_sgd",
    "inaturalist-2018": "finetune_inaturalist",
    "inaturalist-2019": "finetune_inaturalist",
    "inaturalist-2021": "finetune_inaturalist",
    "imagenet": "deit_finetune_384",
}
"""A data set's name to the preset that is chosen for it."""
_STEPS, _MOST_EPOCHS = 1500, 150
_SMALL_SIDE = 32


def preset_for(data: str) -> str:
    """The preset for a data set's name, which may ask for coarser classes ("inaturalist-2018:genus")."""
    return PRESET_OF.get(data.partition(":")[0], DEFAULT)


def recipe_for(data: str, model: ImageClassifier, *, images: int, teacher: bool, **overrides: Any) -> Recipe:
    """The recipe for a data set and a model, where none is chosen; `overrides` go before everything.

    Args:
        data: the data set's name.
        model: at an input of 32 pixels or less images are padded and cut out rather than magnified, as the authors'
            loader does.
        images: for training; the default preset gives few of them more epochs, for about 1500 steps.
        teacher: whether there is one, which speaks to the distillation head if the model has it.
        **overrides: fields of the recipe.

    Raises: ConfigError: an unknown field, or a value that cannot work.
    """
    preset = recipe_named(preset_for(data))
    changes: dict[str, Any] = {}
    if teacher:
        distilled = getattr(model.config, "distilled", False)
        changes = {"distillation": "hard", "distill_on": "token" if distilled else "class"}
    if max(model.config.image_hw) <= _SMALL_SIDE and not overrides.get("img_size", preset.img_size):
        changes["crop"] = "pad"
    if preset.preset == DEFAULT:
        steps = max(images // overrides.get("batch_size", preset.batch_size), 1)
        changes["epochs"] = min(max(preset.epochs, -(-_STEPS // steps)), _MOST_EPOCHS)
    if "epochs" in overrides:  # a short run has a short warm-up
        changes["warmup_epochs"] = min(preset.warmup_epochs, max(overrides["epochs"] - 1, 0))
    return recipe_named(preset.preset, **{**changes, **overrides})
