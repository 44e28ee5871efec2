"""The papers' recipes by name, a table for each family: what differs from the defaults of `recipe.Recipe`."""

from __future__ import annotations

from typing import Any

_Settings = dict[str, Any]
_Presets = dict[str, tuple[str, _Settings]]

_FINETUNE_384: _Settings = {
    "epochs": 30,
    "batch_size": 512,
    "lr": 5e-6,
    "min_lr": 5e-6,
    "weight_decay": 1e-8,
    "img_size": 384,
    "train_mode": False,
}
_SMALL_IMAGES: _Settings = {
    "epochs": 100,
    "batch_size": 128,
    "lr": 1e-3,
    "lr_batch": 0,
    "warmup_epochs": 5,
    "schedule": "step",
    "crop": "pad",
    "augment": "none",
    "color_jitter": 0.0,
    "erase": 0.0,
    "repeats": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema_decay": 0.0,
    "drop_path_rate": 0.0,
}
_DEIT: _Presets = {
    "deit_300e": ("DeiT from scratch: DeiT, table 9", {}),
    "deit_distill_300e": ("hard distillation through the token: DeiT, section 4", {"distillation": "hard"}),
    "deit_finetune_384": ("DeiT at a higher resolution: the authors' README", _FINETUNE_384),
    "deit_finetune_384_distill": (
        "the same with a teacher, which the authors' script refuses: DeiT, section 4",
        {**_FINETUNE_384, "distillation": "hard"},
    ),
}
_LEVIT_1000E: _Settings = {
    "epochs": 1000,
    "batch_size": 2048,
    "weight_decay": 0.025,
    "clip_grad": 0.01,
    "clip_mode": "agc",
    "drop_path_rate": 0.0,
    "precision": "float32",
    "distillation": "hard",
    "eval_every": 20,
}
_LEVIT: _Presets = {
    "levit_1000e": ("LeViT from scratch, distilled from RegNetY-16GF: LeViT, section 5.1", _LEVIT_1000E),
    "levit_384_1000e": (
        "the same for LeViT-384, with stochastic depth: the authors' code",
        {**_LEVIT_1000E, "drop_path_rate": 0.1},
    ),
}
_CIFAR: _Presets = {
    "cifar_scratch": ("32-pixel images from scratch, light augmentation, one step schedule: ours", _SMALL_IMAGES),
    "cifar_distill": ("the same with a teacher: ours", {**_SMALL_IMAGES, "distillation": "hard"}),
}

PRESETS: _Presets = {**_DEIT, **_LEVIT, **_CIFAR}
"""Name to (what it is and where it comes from, what differs from the defaults)."""
