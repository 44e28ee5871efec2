"""Data-efficient image transformers and their weights; begin with `from_pretrained`, `Classifier`, `list_models`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AgreementError,
    CheckpointError,
    ConfigError,
    DataError,
    DeitModelsError,
    FetchError,
    ImageError,
    IntegrityError,
    ManifestError,
    MissingExtraError,
    SaveError,
    TrainingError,
    UnknownModelError,
)
from .registry import count_macs, list_models, model_info, register_model

if TYPE_CHECKING:
    from .data.classes import wrap
    from .deploy.export import export
    from .deploy.optimize import optimize
    from .finetuning.adapt import adapt_head
    from .finetuning.finetune import finetune
    from .formats.publish import push_to_hub, save_pretrained
    from .hub.load import from_pretrained
    from .images.transforms import transform_for
    from .models import create_model
    from .predict import Classifier, attention_maps
    from .recipes.recipe import recipe_named
    from .scoring.evaluation import evaluate
    from .show.heat_maps import heat_maps
    from .training.dense import make_label_maps
    from .training.losses import WithLoss
    from .training.run import train


__version__ = "0.1.0"

__all__ = [
    "AgreementError",
    "CheckpointError",
    "Classifier",
    "ConfigError",
    "DataError",
    "DeitModelsError",
    "FetchError",
    "ImageError",
    "IntegrityError",
    "ManifestError",
    "MissingExtraError",
    "SaveError",
    "TrainingError",
    "UnknownModelError",
    "WithLoss",
    "__version__",
    "adapt_head",
    "attention_maps",
    "count_macs",
    "create_model",
    "evaluate",
    "export",
    "finetune",
    "from_pretrained",
    "heat_maps",
    "list_models",
    "make_label_maps",
    "model_info",
    "optimize",
    "push_to_hub",
    "recipe_named",
    "register_model",
    "save_pretrained",
    "train",
    "transform_for",
    "wrap",
]

# Loaded when first used: each needs torch, torchvision or huggingface_hub, which listing models does not.
_LAZY = {
    "Classifier": ".predict",
    "WithLoss": ".training.losses",
    "adapt_head": ".finetuning.adapt",
    "attention_maps": ".predict",
    "create_model": ".models",
    "evaluate": ".scoring.evaluation",
    "export": ".deploy.export",
    "finetune": ".finetuning.finetune",
    "from_pretrained": ".hub.load",
    "heat_maps": ".show.heat_maps",
    "make_label_maps": ".training.dense",
    "optimize": ".deploy.optimize",
    "push_to_hub": ".formats.publish",
    "recipe_named": ".recipes.recipe",
    "save_pretrained": ".formats.publish",
    "train": ".training.run",
    "transform_for": ".images.transforms",
    "wrap": ".data.classes",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
