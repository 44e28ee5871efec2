"""Recorded logits: a fixed input, and the comparison that vouches for weights no digest is known of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.layers import ImageClassifier

REFERENCE_TOLERANCE = 1e-3


def reference_input(config: Any) -> Tensor:
    """The fixed image batch recorded logits belong to: waves of different length per channel, (1, C, H, W) float32."""
    height, width = config.image_hw
    rows, columns = torch.arange(height).float()[:, None], torch.arange(width).float()[None, :]
    return torch.stack([torch.sin(rows * (0.05 + 0.03 * c) + columns * 0.07 + c) for c in range(config.in_chans)])[None]


@torch.inference_mode()
def reference_logits(model: ImageClassifier, count: int) -> Tensor:
    """The first `count` logits for `reference_input`, in eval mode; the model's mode is left as it was."""
    training = model.training
    logits: Tensor = model.eval()(reference_input(model.config).to(next(model.parameters())))[0, :count]
    model.train(training)
    return logits.float().cpu()


def check_reference(model: ImageClassifier, expected: tuple[float, ...]) -> None:
    """Compare the first logits for `reference_input` with recorded ones.

    Raises: CheckpointError: they differ by more than REFERENCE_TOLERANCE; the weights are not the published ones.
    """
    difference = float((reference_logits(model, len(expected)) - torch.tensor(expected)).abs().max())
    if not difference <= REFERENCE_TOLERANCE:
        raise CheckpointError(f"logits differ from the recorded ones by {difference:.3g}; not the published weights")
