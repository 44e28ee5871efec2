"""The one loop: an epoch of training. Everything that trains goes through here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import TrainingError
from ..models.layers import ImageClassifier
from .learner import Learner
from .loading import Batch, DamageCount, Watch, plain_watch
from .optim import clip_gradients, learning_rate, set_learning_rate
from .passes import forward_backward, in_parts
from .rehearsal import CompileChoice, fit_into_memory


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
    if isinstance(learner.bare.model, ImageClassifier):
        learner.bare.model.begin_epoch(epoch)
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
