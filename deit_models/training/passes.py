"""One forward and backward pass: of a step, or of the part of it that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .learner import Learner, autocast
from .loading import Batch
from .recipe import Precision

_UNFUSED_UP_TO = 256
"""Image side in pixels; the score matrix that unfused attention keeps grows with its fourth power."""


@contextmanager
def attention_for_training(device: torch.device, images: Tensor, precision: Precision) -> Iterator[None]:
    """Which of torch's attention kernels to train with; (B, 3, H, W) tells how many tokens there will be.

    On a CPU the fused kernel's backward pass is slow: forward and backward of (16, 6, 197, 64) took 62 ms, unfused
    attention 62 ms, and 28 ms when it may keep its scores in bfloat16, as attention written out under autocast does.
    Against float32 the gradients of DeiT-Ti were off by 1.0 % either way.
    """
    if device.type != "cpu" or precision == "float32" or max(images.shape[-2:]) > _UNFUSED_UP_TO:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # the name says cuda; it rules the CPU too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def in_parts(batch: Batch, count: int) -> list[Batch]:
    """A batch cut into `count` batches of one size, in order; views of it. `count` must divide its size."""
    return list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))


def forward_backward(learner: Learner, batch: Batch, *, exchange: bool, heads: nn.Module | None = None) -> Tensor:
    """Add the gradients of one part of a step; gives the part's share of the step's loss, detached.

    Args:
        learner: gradients of its model are changed in place.
        batch: its images are changed in place by mixing.
        exchange: whether the processes exchange gradients; needed in the last part of a step.
        heads: what is called; default: the learner's.
    """
    recipe, device = learner.recipe, learner.process.device
    heads = learner.heads if heads is None else heads
    images, targets = learner.mixing(batch[0].to(device, non_blocking=True), batch[1])
    teacher_logits = None if learner.teacher is None else learner.teacher(images)
    # DDP exchanges gradients in the last backward pass of a step only; other modules know no such mode
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(heads, "no_sync", nullcontext)
    with nullcontext() if exchange else no_sync():
        with autocast(device, recipe.precision), attention_for_training(device, images, recipe.precision):
            output = heads(images)
        loss: Tensor = learner.loss(output, targets, teacher_logits) / (recipe.accumulate * learner.parts)
        learner.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
