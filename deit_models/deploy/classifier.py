"""What `optimize` gives: a model for inference that is called like any other, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.layers import HeadLogits, ImageClassifier
from .backends import BackendName, Precision
from .decisions import Timing
from .formats import Runner


class Agreement(NamedTuple):
    """How well a network's answers are those of the model in float32.

    Attributes:
        top1: share of the images with the same likeliest class.
        max_abs_diff: the largest difference of a logit.
        images: how many were compared.
    """

    top1: float
    max_abs_diff: float
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What `optimize` chose.

    Attributes:
        backend: what computes.
        precision: in what.
        agreement: with the model in float32; if tokens are merged, with the merged network in torch's float32.
        timings: all that was timed, fastest first.
        token_merging: the tokens that each block merges; empty if none does.
        merging_agreement: of the merged network, in torch's float32, with the model; None if nothing is merged.
    """

    backend: BackendName
    precision: Precision
    agreement: Agreement
    timings: tuple[Timing, ...] = ()
    token_merging: tuple[int, ...] = ()
    merging_agreement: Agreement | None = None


class OptimizedClassifier(ImageClassifier):
    """A model for inference that another backend may compute; called as the model it was made from.

    `choice` says what computes, `device` where, `takes_pixels` whether uint8 pixels are taken. `config`, `origin` and
    `num_classes` are the model's. `forward_heads` gives the final logits as `cls`. It cannot be trained or saved.
    """

    def __init__(
        self, model: ImageClassifier, run: Runner, choice: Choice, *, device: torch.device, pixels: bool
    ) -> None:
        super().__init__(model.config)
        self.origin, self.choice, self.takes_pixels = model.origin, choice, pixels
        self._run, self.device = run, device
        self.eval()

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """The logits of x, (B, C, H, W) -> (B, num_classes) float32. Raises: ConfigError: x is no such batch."""
        self.check_input(x)
        if self.takes_pixels != (x.dtype == torch.uint8):
            wanted = "uint8 pixels" if self.takes_pixels else "normalised floats"
            raise ConfigError(f"input of type {x.dtype}; this model was optimised for {wanted}")
        if not len(x):
            return HeadLogits(torch.empty(0, self.num_classes, device=self.device), None)
        with torch.no_grad():
            return HeadLogits(self._run(x.to(self.device, None if self.takes_pixels else torch.float32)), None)

    def train(self, mode: bool = True) -> OptimizedClassifier:
        """Stay in eval mode. Raises: ConfigError: training an optimised model."""
        if mode:
            raise ConfigError("an optimised model cannot be trained; train the model it was made from")
        super().train(False)
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Not possible. Raises: ConfigError: always."""
        raise ConfigError("an optimised model cannot be saved; save the model it was made from, or use export")

    push_to_hub = save_pretrained
