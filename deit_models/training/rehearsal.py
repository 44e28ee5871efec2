"""What a GPU is tried out for: how much of a step fits into its memory, and whether compiling the model pays.

Trying is a whole forward and backward pass that leaves no trace in weights, statistics or random numbers.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import nn

from ..errors import TrainingError
from ..hub.fetch import first_line
from .learner import Learner, compiled
from .loading import Batch
from .passes import forward_backward, in_parts

logger = logging.getLogger(__name__)

COMPILING_S = 60.0
"""Time torch.compile takes for the forward and backward pass of a transformer of a dozen blocks, in seconds."""
COMPILED_SAVES = 0.25
"""Part of a step's time that a compiled model saves at least."""


def fit_into_memory(learner: Learner, batch: Batch) -> None:
    """Find in how many parts a batch of the loader must be done, and note it in the learner.

    The parts are halved until one fits. Each is mixed and passed through the model by itself, so the result is that of
    a recipe with `accumulate` as many times larger. All processes use the same number.

    Raises: TrainingError: a part does not fit and cannot be halved.
    """
    if learner.fitted:
        return
    size, before = len(batch[1]), learner.parts
    while not all(learner.process.gather(_fits(learner, batch))):
        if size // learner.parts % 2:
            raise TrainingError(
                f"the GPU has too little memory for {size // learner.parts} images at once, which cannot be halved; "
                f"use a smaller model or image, or a batch_size that is a multiple of a larger power of two"
            )
        learner.parts *= 2
        torch.cuda.empty_cache()
    learner.fitted = True
    if learner.parts > before and learner.process.is_main:
        logger.warning(
            "%d images at once do not fit into the GPU's memory; going on in parts of %d, as with accumulate=%d",
            size // before,
            size // learner.parts,
            learner.recipe.accumulate * learner.parts,
        )


def _fits(learner: Learner, batch: Batch) -> bool:
    parameters = [parameter for parameter in learner.bare.parameters() if parameter.requires_grad]
    # DDP meets the other processes in its forward pass, and a process that fails there would leave them waiting
    heads = learner.heads if learner.process.world == 1 else learner.bare
    try:
        # the optimiser takes as much at its first step
        reserved = [] if learner.optimizer.state else [torch.empty_like(p) for p in parameters for _ in range(2)]
        rehearse(learner, in_parts(batch, learner.parts)[0], heads)
    except torch.OutOfMemoryError:
        return False
    del reserved  # not before the pass is over
    return True


def rehearse(learner: Learner, batch: Batch, heads: nn.Module) -> None:
    """A forward and backward pass that leaves everything as it was."""
    device, buffers = learner.process.device, list(learner.bare.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            forward_backward(learner, (batch[0].clone(), *batch[1:]), exchange=False, heads=heads)
    finally:
        learner.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


class CompileChoice:
    """Decides, where a run leaves it open, whether to compile: once, by the time that its steps take without.

    Args:
        learner: its `heads` may be replaced.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._since: tuple[int, float] | None = None  # a step of this epoch and when it ended

    def consider(self, batch: Batch, *, step: int, steps_left: int) -> None:
        """Look at the clock after a step whose work is done, and decide at the second look."""
        learner, now = self.learner, time.perf_counter()
        if not learner.undecided:
            return
        if self._since is None:
            self._since = (step, now)
            return
        seconds_left = (now - self._since[1]) / (step - self._since[0]) * steps_left
        learner.undecided = False
        if pays(max(learner.process.gather(seconds_left))):
            _compile(learner, batch, seconds_left)


def pays(seconds_left: float) -> bool:
    """Whether what compiling saves in so much training, measured without it, is more than the time it takes."""
    return seconds_left * COMPILED_SAVES > COMPILING_S


def _compile(learner: Learner, batch: Batch, seconds_left: float) -> None:
    """Compile the learner's model if that works here, and log it in one line."""
    heads, reason = compiled(learner.heads), ""
    try:
        rehearse(learner, in_parts(batch, learner.parts)[0], heads)
    except RuntimeError as error:
        reason = first_line(error)
    reasons = [reason for reason in learner.process.gather(reason) if reason]
    if not reasons:
        learner.heads = heads
    if learner.process.is_main:
        outcome = f"failed, so it goes on without ({reasons[0]})" if reasons else "has compiled the model"
        logger.warning(
            "about %.0f minutes of training are left: torch.compile %s; compile='off' (--compile off) leaves it out",
            seconds_left / 60,
            outcome,
        )
