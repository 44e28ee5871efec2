"""The training loop: one epoch of steps. Everything that trains goes through here.

On a GPU trial passes find the part of a batch that fits into memory, and whether compiling the model pays. A trial is a
whole forward and backward pass that leaves no trace in weights, statistics or random numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..augmentation.mixing import TokenTargets
from ..batches.loading import Batch, DamageCount, Watch, plain_watch
from ..errors import ConfigError, TrainingError, first_line
from ..recipes.recipe import Precision
from ..scoring.evaluation import autocast
from .learner import Learner
from .optim import clip_gradients, learning_rate, set_learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EpochLoss:
    """One epoch of training: the mean loss over all processes, the last learning rate, images and time."""

    loss: float
    lr: float
    images: int
    seconds: float


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
        watch: wraps the batches, for a progress bar, which is given the loss, see `Watch`.
        kept: end of the message if the loss diverges: the weights that are left of earlier epochs.

    Raises:
        TrainingError: the loss or, after the last step, a weight is no longer a number; the step and the learning rate
            are named. Or the GPU's memory is too small for a single image. All processes raise it together.
        DataError: too many images cannot be read.
    """
    recipe, process = learner.recipe, learner.process
    learner.heads.train(recipe.train_mode)
    _rest_frozen_parts(learner.bare)
    start, images, rate = learner.clock(), 0, 0.0
    total = torch.zeros((), device=process.device)
    first_look: tuple[int, float] | None = None
    watched = watch(batches, steps * recipe.accumulate)
    show = getattr(watched, "set_postfix", lambda **_: None)
    for number, batch in enumerate(watched):
        step, part = divmod(number, recipe.accumulate)
        if part == 0:
            rate = learning_rate(recipe, epoch, step / steps)
            set_learning_rate(learner.optimizer, rate)
        damage.add(batch[2])
        fit_into_memory(learner, batch)
        last = part == recipe.accumulate - 1
        for place, piece in enumerate(in_parts(batch, learner.parts), start=1):
            first, exchange = part == 0 and place == 1, last and place == learner.parts
            total += forward_backward(learner, piece, first=first, exchange=exchange)
        images += len(batch[1])
        if last:
            look = (step + 1) % learner.look_every == 0 or step + 1 == steps or (step == 0 and learner.undecided)
            if look:
                so_far = float(process.total(total.clone())) / (process.world * (step + 1))
                _check_finite("the loss is", so_far, f"at step {step + 1} of", epoch, rate, kept)
                show(loss=so_far, refresh=False)  # read for the check anyway: showing it waits for no GPU
            _apply_gradients(learner)
            if look and learner.undecided:
                steps_left = steps * (recipe.total_epochs - epoch) - step - 1
                first_look = _consider_compiling(learner, batch, first_look, step=step, steps_left=steps_left)
    learner.optimizer.zero_grad(set_to_none=True)
    # a state is saved next: weights that the last step has spoiled would spoil it, and every start from it
    _check_finite("the weights are", float(process.total(_largest_weight(learner.bare))), "after", epoch, rate, kept)
    mean = process.total(total) / (process.world * steps)
    count = int(process.total(torch.tensor(images, device=process.device)))
    return EpochLoss(float(mean), rate, count, learner.clock() - start)


def _rest_frozen_parts(model: nn.Module) -> None:
    """In place: eval mode for modules whose parameters are all frozen, with neither dropout nor moving statistics."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def in_parts(batch: Batch, count: int) -> list[Batch]:
    """A batch cut into `count` batches of one size, in order; views of it. `count` must divide its size."""
    return list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))


def forward_backward(
    learner: Learner, batch: Batch, *, exchange: bool, first: bool = False, heads: nn.Module | None = None
) -> Tensor:
    """Add the gradients of one part of a step; gives the part's share of the step's loss, detached.

    The batch's images are mixed in place. `exchange`: the processes exchange gradients, in the last part of a step.
    `first`: those of the step before are removed. `heads`: the module to call, by default the learner's.
    """
    recipe, device = learner.recipe, learner.process.device
    heads = learner.heads if heads is None else heads
    images, targets = learner.mixing(batch[0].to(device, non_blocking=True), batch[1], *batch[3:])
    exchanged = targets.exchanged if isinstance(targets, TokenTargets) else None
    teacher_logits = None if learner.teacher is None else learner.teacher(images)
    images = torch.cat([images, images]) if recipe.cosub else images
    # DDP exchanges gradients in the last backward pass of a step only; other modules have no such mode
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(heads, "no_sync", nullcontext)
    with nullcontext() if exchange else no_sync():
        # around the backward pass too: gradient checkpointing computes attention there again
        with attention_for_training(device, images, recipe.precision):
            with autocast(device, recipe.precision):
                output = _training_pass(heads, images, exchanged)
            loss: Tensor = learner.loss(output, targets, teacher_logits) / (recipe.accumulate * learner.parts)
            if first:
                learner.optimizer.zero_grad(set_to_none=True)
            learner.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _training_pass(heads: nn.Module, images: Tensor, exchanged: Tensor | None) -> Any:
    """The heads' logits. Raises: ConfigError: one image alone, for a model that normalises over the batch."""
    try:
        return heads(images) if exchanged is None else heads(images, exchanged)
    except ValueError as error:
        if len(images) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            "the model has BatchNorm, which cannot train on one image at once; each pass has batch_size / (accumulate "
            "* processes) images: raise batch_size or lower accumulate"
        ) from error


_UNFUSED_UP_TO = 256
"""Image side in pixels; the score matrix of unfused attention grows with its fourth power."""


@contextmanager
def attention_for_training(device: torch.device, images: Tensor, precision: Precision) -> Iterator[None]:
    """Choice of torch's attention kernel for training on (B, 3, H, W), which decides the number of tokens.

    On a CPU the fused kernel's backward pass is slow: forward and backward of (16, 6, 197, 64) took 62 ms, unfused
    attention 62 ms, and 28 ms with its scores in bfloat16, as attention written out under autocast has them.
    Against float32 the gradients of DeiT-Ti were off by 1.0 % either way.
    """
    if device.type != "cpu" or precision == "float32" or max(images.shape[-2:]) > _UNFUSED_UP_TO:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name it holds for the CPU too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def _apply_gradients(learner: Learner) -> None:
    if learner.recipe.clip_grad:
        learner.scaler.unscale_(learner.optimizer)
        clip_gradients(learner.bare, learner.recipe)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    # On a CPU they go before the next backward pass: till then they lie above the freed activations, whose pages the
    # C library would else give back and fetch anew at every step, in a tenth of a small model's time.
    if learner.process.device.type != "cpu":
        learner.optimizer.zero_grad(set_to_none=True)
    if learner.average is not None:
        learner.average.update_parameters(learner.bare)


def _check_finite(what: str, value: float, when: str, epoch: int, rate: float, kept: str) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"{what} no longer a number {when} epoch {epoch} (learning rate {rate:.3g}); try a lower lr, a longer "
            f"warm-up, clip_grad=1, or precision float32{kept}"
        )


def _largest_weight(model: nn.Module) -> Tensor:
    """The largest magnitude in this process's parameters, or NaN; a scalar."""
    weights = [parameter.detach() for parameter in model.parameters()]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return torch.stack([part.abs().max().float() for part in local if part.numel()]).max()


def fit_into_memory(learner: Learner, batch: Batch) -> None:
    """Find the number of parts that a batch of the loader must be done in, and note it in the learner.

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
        _rehearse(learner, in_parts(batch, learner.parts)[0], heads)
    except torch.OutOfMemoryError:
        return False
    del reserved  # not before the pass is over
    return True


def _rehearse(learner: Learner, batch: Batch, heads: nn.Module) -> None:
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


COMPILING_S = 60.0
"""Time of torch.compile for the forward and backward pass of a transformer of a dozen blocks, in seconds."""
COMPILED_SAVES = 0.25
"""Part of a step's time that a compiled model saves at least."""


def pays(seconds_left: float) -> bool:
    """Whether compiling takes less time than it saves in so much training, measured without it."""
    return seconds_left * COMPILED_SAVES > COMPILING_S


def _consider_compiling(
    learner: Learner, batch: Batch, first_look: tuple[int, float] | None, *, step: int, steps_left: int
) -> tuple[int, float]:
    """Decide after two looks at the clock whether to compile; gives the step and time of the first look."""
    now = learner.clock()
    if first_look is None:
        return step, now
    seconds_left = (now - first_look[1]) / (step - first_look[0]) * steps_left
    learner.undecided = False
    if pays(max(learner.process.gather(seconds_left))):
        _compile(learner, batch, seconds_left)
    return first_look


def _compile(learner: Learner, batch: Batch, seconds_left: float) -> None:
    """Compile the learner's model if that works here, and log it in one line."""
    heads, reason = learner.compile(learner.heads), ""
    try:
        _rehearse(learner, in_parts(batch, learner.parts)[0], heads)
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
