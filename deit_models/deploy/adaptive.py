"""A model that measures itself, and goes on as `optimize` makes it once that pays for the images to come."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import DeitModelsError
from ..models.layers import HeadLogits, ImageClassifier
from .optimize import FLOAT32_TOLERANCE, is_kept, optimize

logger = logging.getLogger(__name__)

_BATCHES = 3
"""Batches that are timed; the first one before them is not."""
_GAIN = 1.3
"""The speed of float32 networks of OpenVINO relative to the model, the least that was measured on two cores: 1.37."""
_COST, _KEPT_COST = (10.0, 100), (3.0, 40)
"""Seconds, and images that the model could classify in the meantime, to prepare a network; and one that is kept."""
_BUSY = 0.8
"""A GPU that computes for a smaller share of the time waits for images, which no other network changes."""


class AdaptiveClassifier(ImageClassifier):
    """A model, until its speed on the first batches shows that `optimize` pays; then the optimised network.

    Results change by rounding only: the network computes in float32, and is compared on the images at hand. If it is
    not faster, the model goes on. `network` is what computes, the given model at first.
    """

    def __init__(
        self,
        model: ImageClassifier,
        *,
        images: int,
        cache_dir: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        make: Callable[..., ImageClassifier] = optimize,
        kept: Callable[..., bool] = is_kept,
    ) -> None:
        """Take a model on its device, and the number of images to classify in all.

        `cache_dir` is that of `optimize`. `clock`, `make` and `kept`, like `is_kept`, may be replaced.
        """
        super().__init__(model.config)
        self.origin, self.model, self.network = model.origin, model, model
        self.images, self._clock, self._make, self._kept = images, clock, make, kept
        self._options: dict[str, Any] = {"precision": "float32", "cache_dir": cache_dir}
        self._seen, self._starts, self._times = 0, list[float](), list[tuple[float, int]]()
        self._rate = 0.0  # of the model, once it is replaced
        self._settled = any(parameter.dtype != torch.float32 for parameter in model.parameters())
        self.eval()

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """The logits of x, (B, C, H, W) -> (B, num_classes) float32."""
        if self._settled or not len(x):
            return self.network.forward_heads(x)
        self._starts.append(self._clock())
        heads = self.network.forward_heads(x)
        heads.cls.cpu()  # on a GPU, the batch is computed once it is here
        self._times.append((self._clock() - self._starts[-1], len(x)))
        self._seen += len(x)
        if len(self._times) > _BATCHES:
            with torch.inference_mode(False), torch.no_grad():
                self._decide(x.clone())
        return heads

    def _decide(self, x: Tensor) -> None:
        seconds, images = (sum(column) for column in zip(*self._times[1:], strict=True))
        rate, left = images / seconds, self.images - self._seen
        self._settled = True
        if self._rate:
            if rate < self._rate:
                logger.warning("the optimised network is not faster here; going on with the model")
                self.network = self.model
            return
        cpu, saved = x.device.type == "cpu", left / rate * (1 - 1 / _GAIN)
        backend = "openvino" if cpu and importlib.util.find_spec("openvino") else "eager"
        self._options |= {"sample": len(x), "backend": backend}
        waits = not cpu and seconds < _BUSY * (self._clock() - self._starts[1])
        least, cost = (fixed + meanwhile / rate for fixed, meanwhile in (_KEPT_COST, _COST))
        if waits or saved <= least:
            return
        cost = least if self._kept(self.model, **self._options) else cost
        if saved > cost:
            about = f"{left} images to come, about {left / rate:.0f} s at {rate:.0f} images/s"
            logger.warning("%s: optimising the network, about %.0f s (--no-optimize: not)", about, cost)
            self._replace(x, rate)

    def _replace(self, x: Tensor, rate: float) -> None:
        """Put the optimised network in place, to be timed, if it agrees on the images at hand."""
        try:
            network = self._make(self.model, **self._options)
            difference = float((network(x) - self.model(x)).abs().max())
        except DeitModelsError as error:
            logger.warning("going on with the model: %s", error)
            return
        if not difference <= FLOAT32_TOLERANCE:
            logger.warning("going on with the model: logits would change by %.2g", difference)
            return
        self.network, self._rate, self._settled = network, rate, False
        self._starts, self._times = [], []
