"""The one loop: an epoch of training. Everything that trains goes through here."""
# MERGED """What a GPU is tried out for: how much of a step fits into its memory, and whether compiling the model pays. Trying is a whole forward and backward pass that leaves no trace in weights, statistics or random numbers. """

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data.loading import Batch, DamageCount, Watch, plain_watch
from ..errors import TrainingError, first_line
from .learner import Learner, compiled, forward_backward, in_parts
from .optim import clip_gradients, learning_rate, set_learning_rate

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


@dataclass(frozen=True, slots=True)
class EpochLoss:
    """One epoch of training: the mean loss over all processes, the last learning rate, and the speed."""

    loss: float
    lr: float
    images: int
    seconds: float


_LOOK_EVERY = 25
"""Steps on a GPU between readings of the loss, each of which waits until the GPU has done all that is queued."""


def train_epoch(
    learner: Learner,
    batches: Iterable[Batch],
    *,
    steps: int,
    epoch: int,
    damage: DamageCount,
    watch: Watch = plain_watch,
    kept: str = "",
) -> EpochLoss:
    """One pass over the training set.

    Args:
        learner: changed in place.
        batches: `steps * recipe.accumulate` of them.
        steps: optimiser steps in this epoch.
        epoch: from 0; decides the learning rate.
        damage: counts images that could not be read.
        watch: wraps the batches, for a progress bar.
        kept: what is left of earlier epochs, for the message should the loss diverge.

    Raises:
        TrainingError: the loss or, after the last step, a weight is no longer a number; the step and the learning rate
            are named. Or the GPU's memory is too small for a single image. All processes raise it together.
        DataError: too many images cannot be read.
    """
    recipe, process = learner.recipe, learner.process
    learner.heads.train(recipe.train_mode)
    _rest_frozen_parts(learner.bare)
    start, images, rate = time.perf_counter(), 0, 0.0
    total = torch.zeros((), device=process.device)
    # On a CPU nothing is lost by looking at every step
    look_every = _LOOK_EVERY if process.device.type == "cuda" else 1
    choice = CompileChoice(learner)
    for number, batch in enumerate(watch(batches, steps * recipe.accumulate)):
        step, part = divmod(number, recipe.accumulate)
        if part == 0:
            rate = learning_rate(recipe, epoch, step / steps)
            set_learning_rate(learner.optimizer, rate)
        damage.add(batch[2])
        fit_into_memory(learner, batch)
        last = part == recipe.accumulate - 1
        for place, piece in enumerate(in_parts(batch, learner.parts), start=1):
            total += forward_backward(learner, piece, exchange=last and place == learner.parts)
        images += len(batch[1])
        if last:
            look = (step + 1) % look_every == 0 or step + 1 == steps or (step == 0 and learner.undecided)
            if look:
                _check_finite("the loss is", process.total(total.clone()), f"at step {step + 1} of", epoch, rate, kept)
            _apply_gradients(learner)
            if look:
                choice.consider(batch, step=step, steps_left=steps * (recipe.total_epochs - epoch) - step - 1)
    # a state is saved next: weights spoiled by the last step would spoil it, and every start from it
    _check_finite("the weights are", process.total(_largest_weight(learner.bare)), "after", epoch, rate, kept)
    mean = process.total(total) / (process.world * steps)
    count = int(process.total(torch.tensor(images, device=process.device)))
    return EpochLoss(float(mean), rate, count, time.perf_counter() - start)


def _rest_frozen_parts(model: nn.Module) -> None:
    """In place: eval mode for modules whose parameters are all frozen, with neither dropout nor moving statistics."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _apply_gradients(learner: Learner) -> None:
    if learner.recipe.clip_grad:
        learner.scaler.unscale_(learner.optimizer)
        clip_gradients(learner.bare, learner.recipe)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.average is not None:
        learner.average.update_parameters(learner.bare)


def _check_finite(what: str, value: Tensor, when: str, epoch: int, rate: float, kept: str) -> None:
    if not math.isfinite(float(value)):
        raise TrainingError(
            f"{what} no longer a number {when} epoch {epoch} (learning rate {rate:.3g}); try a lower lr, a longer "
            f"warm-up, clip_grad=1, or precision float32{kept}"
        )


def _largest_weight(model: nn.Module) -> Tensor:
    """The largest magnitude in this process's parameters, or NaN; a scalar."""
    weights = [parameter.detach() for parameter in model.parameters()]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return torch.stack([part.abs().max().float() for part in local if part.numel()]).max()
