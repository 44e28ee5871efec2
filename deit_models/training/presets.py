"""Named settings: what differs from the defaults of `Recipe`, which are the DeiT paper's, and where it comes from."""

from __future__ import annotations

from typing import Any

_FINETUNE_384 = {
    "epochs": 30,
    "batch_size": 512,
    "lr": 5e-6,
    "min_lr": 5e-6,
    "weight_decay": 1e-8,
    "img_size": 384,
    "train_mode": False,
}
_CIFAR = {
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
# What the authors answered in issue 45 of their repository; its moving average is off, since it was never the result
_FINETUNE_SGD = {
    "epochs": 1000,
    "batch_size": 768,
    "optimizer": "sgd",
    "lr": 0.01,
    "lr_batch": 768,
    "weight_decay": 1e-4,
    "ema_decay": 0.0,
    "drop_path_rate": 0.0,
    "erase": 0.0,
    "label_heads": "both",
}
_FINETUNE_INATURALIST = {
    "epochs": 100,
    "batch_size": 768,
    "lr": 7.5e-5,
    "min_lr": 1e-6,
    "ema_decay": 0.0,
    "label_heads": "both",
}
_FINETUNE = {
    "epochs": 30,
    "batch_size": 64,
    "lr": 5e-4,
    "lr_batch": 64,
    "warmup_lr": 1e-6,
    "min_lr": 1e-6,
    "warmup_epochs": 3,
    "schedule": "step",
    "layer_decay": 0.75,
    "clip_grad": 1.0,
    "ema_decay": 0.0,
    "crop_scale": 0.5,
    "augment": "none",
    "color_jitter": 0.2,
    "erase": 0.0,
    "repeats": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_heads": "both",
    "patience": 10,
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit_300e": ("DeiT from scratch: DeiT, table 9", {}),
    "deit_distill_300e": ("hard distillation through the token: DeiT, section 4", {"distillation": "hard"}),
    "deit_finetune_384": ("DeiT at a higher resolution: the authors' README", _FINETUNE_384),
    "deit_finetune_384_distill": (
        "the same with a teacher, which the authors' script refuses: DeiT, section 4",
        {**_FINETUNE_384, "distillation": "hard"},
    ),
    "cifar_scratch": ("32-pixel images from scratch, light augmentation, one step schedule: ours", _CIFAR),
    "cifar_distill": ("the same with a teacher: ours", {**_CIFAR, "distillation": "hard"}),
    "finetune": ("a pretrained model on other classes: ours", _FINETUNE),
    "finetune_sgd": ("CIFAR, Cars, Flowers, at length: the authors, issue 45", _FINETUNE_SGD),
    "finetune_inaturalist": ("their AdamW variant; rate and length ours", _FINETUNE_INATURALIST),
}
"""Name to (what it is and where it comes from, what differs from the defaults)."""
