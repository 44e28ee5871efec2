"""What learns: a model with its optimiser, averaged weights, mixing, loss and teacher, on its device."""
# MERGED """One forward and backward pass: of a step, or of the part of it that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..augmentation.mixing import Mixing
from ..checkpoint import Preprocessing
from ..data.loading import Batch
from ..distributed import Process, Shard, copy_from_first, shard_parameters, spread
from ..errors import ConfigError, DataError
from ..evaluation import Heads, autocast
from ..models.layers import ImageClassifier
from .losses import DistillationLoss, ExtraHeads, HasExtraHeads
from .optim import WeightAverage, make_optimizer
from .recipe import Precision, Recipe
from .teacher import Teacher, TeacherSpec, load_teacher

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


class AllHeads(Heads):
    """`Heads` with the logits of extra heads after the others."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """(B, 3, H, W) -> see `HasExtraHeads.forward_training`."""
        return cast(HasExtraHeads, self.model).forward_training(x)


@dataclass(slots=True)
class Learner:
    """All that changes while training, and the functions it is trained with.

    Attributes:
        divided: whether each process holds but a part of the parameters (FSDP).
        bare: the model behind its heads, neither compiled nor wrapped.
        heads: what is called in training: `bare`, perhaps distributed, perhaps compiled.
        scaler: scales the loss under fp16, does nothing otherwise.
        average: the moving average of `bare`, or None.
        parts: how many passes the model needs for a batch of the loader, because of the device's memory.
        fitted: whether `parts` is known to be enough.
        undecided: whether it is open if `heads` is to be compiled.
    """

    recipe: Recipe
    process: Process
    divided: bool
    bare: Heads
    heads: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    mixing: Mixing
    loss: DistillationLoss
    teacher: Teacher | None = None
    parts: int = 1
    fitted: bool = True
    undecided: bool = False

    def versions(self) -> dict[str, Heads]:
        """The weights there are, by the prefix of their figures in logs: the learning ones, and their average."""
        return {"": self.bare} if self.average is None else {"": self.bare, "ema_": cast(Heads, self.average.module)}


def make_learner(
    model: nn.Module,
    recipe: Recipe,
    *,
    num_classes: int,
    process: Process,
    preprocessing: Preprocessing,
    teacher: Teacher | TeacherSpec | None = None,
    shard: Shard = "ddp",
) -> Learner:
    """Get a model ready to learn: on its device, in place.

    Args:
        model: any module that turns (B, 3, H, W) into (B, K) logits.
        recipe: the settings.
        num_classes: of the training set.
        process: this one.
        preprocessing: what the input looks like, for the teacher's sake.
        teacher: see `load_teacher`.
        shard: see `spread`.

    Raises: ConfigError: the recipe's size is not the model's. DataError: another number of classes. TrainingError: the
        teacher does not fit.
    """
    _check_fit(model, recipe, num_classes, preprocessing)
    extra = extra_heads_of(model, recipe)
    if isinstance(model, ImageClassifier):
        _set_drop_rates(model, recipe)
    device = process.device
    bare = Heads(model.to(device)) if extra is None else AllHeads(model.to(device))
    copy_from_first(bare, process)  # before the average is made of it; DDP would do so after, FSDP not at all
    average = WeightAverage(bare, recipe.ema_decay) if recipe.ema_decay else None
    divided = shard == "fsdp" and process.world > 1
    heads = spread(bare, process, shard, unused=_has_idle_head(model, recipe))
    if divided and average is not None:
        shard_parameters(average.module)
    if teacher is not None:
        teacher = load_teacher(
            teacher, num_classes=num_classes, student=preprocessing, device=device, precision=recipe.precision
        )
    return Learner(
        recipe=recipe,
        process=process,
        divided=divided,
        bare=bare,
        heads=compiled(heads) if recipe.compile == "on" else heads,
        optimizer=make_optimizer(model, recipe),
        scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
        average=average,
        mixing=Mixing(recipe, num_classes, own=None if extra is None else extra.mix),
        loss=DistillationLoss(recipe, teacher=teacher, extra=extra),
        teacher=teacher,
        # parts of a divided model cannot be tried out by one process, nor are they compiled unless that is asked for
        fitted=device.type != "cuda" or divided,
        undecided=device.type == "cuda" and not divided and recipe.compile == "auto",
    )


def extra_heads_of(model: nn.Module, recipe: Recipe) -> ExtraHeads | None:
    """The model's own extra heads, if it has any. Raises: ConfigError: the recipe's `mix_mode` needs them, or more."""
    extra = None
    if isinstance(model, HasExtraHeads):
        extra = model.extra_heads(mix_mode=recipe.mix_mode, mixup=recipe.mixup, cutmix=recipe.cutmix)
    if recipe.mix_mode == "patch" and extra is None:
        raise ConfigError("mix_mode='patch' needs a model with a patch head, such as vit_resnas_tiny; pass 'batch'")
    return extra


def _set_drop_rates(model: ImageClassifier, recipe: Recipe) -> None:
    rates = {"drop_rate": recipe.drop_rate, "drop_path_rate": recipe.drop_path_rate}
    if hasattr(model.config, "patch_drop_rate"):
        rates["patch_drop_rate"] = recipe.patch_drop_rate
    model.set_drop_rates(**rates)


def compiled(heads: nn.Module) -> nn.Module:
    """The same by torch.compile, for batches of one size: another size is compiled anew, and not for any size."""
    return cast(nn.Module, torch.compile(heads, dynamic=False))


def _has_idle_head(model: nn.Module, recipe: Recipe) -> bool:
    """Whether the recipe's loss leaves out one of the model's heads."""
    config = getattr(model, "config", None)
    taught = recipe.distill_on == "token" if recipe.distillation != "none" else recipe.label_heads == "both"
    # extra heads are used in training mode only
    extra_idle = not recipe.train_mode and extra_heads_of(model, recipe) is not None
    return (getattr(config, "distilled", False) and not taught) or extra_idle


def _check_fit(model: nn.Module, recipe: Recipe, num_classes: int, preprocessing: Preprocessing) -> None:
    if isinstance(model, ImageClassifier) and model.num_classes != num_classes:
        raise DataError(
            f"the training set has {num_classes} classes, the model {model.num_classes}; build or load it with "
            f"num_classes={num_classes}"
        )
    size = model.config.image_hw if isinstance(model, ImageClassifier) else preprocessing.crop
    if recipe.img_size and size != (recipe.img_size, recipe.img_size):
        raise ConfigError(
            f"the recipe's img_size={recipe.img_size}, the model takes {size}; build or load it with "
            f"img_size={recipe.img_size}"
        )
    if recipe.patch_drop_rate and not hasattr(getattr(model, "config", None), "patch_drop_rate"):
        raise ConfigError(
            f"patch_drop_rate={recipe.patch_drop_rate:g} is of DeiT models, this is a {type(model).__name__}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter of the model requires a gradient, so there is nothing to train")
