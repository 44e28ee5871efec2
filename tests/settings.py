"""Settings of training that tests of several folders begin with."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 8,
    "lr": 0.01,
    "lr_batch": 0,
    "warmup_epochs": 1,
    "schedule": "step",
    "ema_decay": 0.0,
    "drop_path_rate": 0.0,
    "crop": "none",
    "augment": "none",
    "color_jitter": 0.0,
    "erase": 0.0,
    "hflip": 0.0,
    "repeats": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "precision": "float32",
}
"""Nothing random but the order of the images."""
RANDOM: dict[str, Any] = {
    "ema_decay": 0.8,
    "drop_path_rate": 0.3,
    "drop_rate": 0.1,
    "crop": "random_resized",
    "crop_scale": 0.5,
    "augment": "rand-m9-mstd0.5-inc1",
    "erase": 0.5,
    "hflip": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "accumulate": 2,
    "clip_grad": 1.0,
}
"""What draws random numbers or keeps a state, switched on."""
