"""A model in training: with its optimiser, averaged weights, mixing, loss and teacher, on its device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..augmentation.label_maps import LabelMaps
from ..augmentation.mixing import Mixing, TokenLabels
from ..checkpoint import Preprocessing
from ..distributed import Process, Shard, copy_from_first, shard_parameters, spread
from ..errors import ConfigError, DataError
from ..models.layers import HeadLogits, ImageClassifier, init_vit_weights, linear_head
from ..recipes.recipe import Recipe
from ..scoring.evaluation import Heads, resolved_precision
from .losses import DistillationLoss, ExtraHeads, HasExtraHeads, PatchLoss
from .optim import WeightAverage, make_optimizer
from .teacher import Teacher, TeacherSpec, default_teacher, load_teacher

logger = logging.getLogger(__name__)

_LOOK_EVERY = 25


class AllHeads(Heads):
    """`Heads` with the logits of extra heads after the others."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """(B, 3, H, W) -> see `HasExtraHeads.forward_training`."""
        return cast(HasExtraHeads, self.model).forward_training(x)


class TokenHeads(Heads):
    """`Heads` that in training mode give the logits of every patch, too.

    They are those of the model's own head on patches or, where it has none, of the linear layer `extra`, which is
    trained, averaged and saved with a run's state, and is no part of the model.
    """

    def __init__(self, model: ImageClassifier, extra: nn.Module | None) -> None:
        super().__init__(model)
        self.extra = extra

    def forward(self, x: Tensor, exchanged: Tensor | None = None) -> HeadLogits | tuple[Any, ...]:
        """(B, 3, H, W) -> the heads' logits; in training mode then those of the patches, (B, N, K).

        `exchanged`, (T,) bool: the patch tokens in front of the first block that are taken from the image at the
        mirrored place of the batch, see `TokenTargets`.
        """
        if not self.training:
            return super().forward(x)
        model = cast(ImageClassifier, self.model)
        if exchanged is None:
            features = model.forward_features(x)
        else:
            tokens = model.forward_tokens(x)
            taken = F.pad(exchanged, (tokens.shape[1] - len(exchanged), 0))[:, None]
            features = model.finish(model.run_blocks(torch.where(taken, tokens.flip(0), tokens)))
        head = cast(nn.Module, model.patch_classifier if self.extra is None else self.extra)
        return (*model.classify_prefix(features), head(features[:, model.num_prefix_tokens :]))


def compiled(heads: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """The module with torch.compile, for batches of one size: each other size is compiled anew."""
    return cast(nn.Module, torch.compile(heads, dynamic=False, backend=backend))


@dataclass(slots=True)
class Learner:
    """Everything that changes while training, and the functions it is trained with.

    Attributes:
        divided: whether each process holds only a part of the parameters (FSDP).
        bare: the model behind its heads, neither compiled nor wrapped.
        heads: the module called in training: `bare`, perhaps distributed, perhaps compiled.
        scaler: scales the loss under fp16, does nothing otherwise.
        average: the moving average of `bare`, or None.
        parts: number of passes for a batch of the loader, because of the device's memory.
        fitted: whether `parts` is known to be enough.
        undecided: whether `heads` may still be compiled.
        look_every: steps between readings of the loss; on a GPU each waits until all queued work is done.
        clock: seconds, to measure steps with.
        compile: compiles `heads`.
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
    look_every: int = 1
    clock: Callable[[], float] = time.perf_counter
    compile: Callable[[nn.Module], nn.Module] = compiled

    @property
    def batch_size(self) -> int:
        """Images in a batch of this process's loader; a step has `recipe.accumulate` batches."""
        return self.recipe.batch_size // (self.process.world * self.recipe.accumulate)

    def versions(self) -> dict[str, Heads]:
        """The weights in training and their average, by the prefix of their figures in logs."""
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
    weights: Tensor | None = None,
    multi_label: bool = False,
    label_maps: LabelMaps | None = None,
) -> Learner:
    """Get a model ready to learn: on its device, in place.

    The model is any module that turns (B, 3, H, W) into (B, K) logits; `num_classes` and `preprocessing` are those of
    the training set, `teacher` is as in `load_teacher` (where the recipe distils, the papers' by default), `shard` as
    in `spread`, the others as in `DistillationLoss`. `label_maps` of the training set go with `token_labels`.

    Raises: ConfigError: the recipe does not fit the model. DataError: another number of classes. TrainingError: the
        teacher does not fit.
    """
    if recipe.precision == "auto":
        recipe = replace(recipe, precision=resolved_precision(recipe.precision, process))
        logger.info("precision='auto' is %s on %s", recipe.precision, process.device)
    _check_fit(model, recipe, num_classes, preprocessing, multi_label=multi_label)
    if recipe.batch_size % (process.world * recipe.accumulate):
        raise ConfigError(
            f"batch_size={recipe.batch_size} cannot be shared evenly by {process.world} processes with "
            f"{recipe.accumulate} accumulation steps each"
        )
    tokens = _token_labels(model, recipe, label_maps, shard)
    extra = extra_heads_of(model, recipe)
    if isinstance(model, ImageClassifier):
        _set_drop_rates(model, recipe)
    if recipe.grad_checkpointing:
        _store_less(model)
    device = process.device
    bare = _heads(model, recipe, None if tokens is None else num_classes, extra).to(device)
    copy_from_first(bare, process)  # before the average is made of it; DDP would do so after, FSDP not at all
    average = WeightAverage(bare, recipe.ema_decay) if recipe.ema_decay else None
    divided = shard == "fsdp" and process.world > 1
    heads = spread(bare, process, shard, unused=_has_idle_head(model, recipe))
    if divided and average is not None:
        shard_parameters(average.module)
    if teacher is None and recipe.distillation != "none":
        teacher = default_teacher(num_classes)
    if teacher is not None:
        teacher = load_teacher(
            teacher, num_classes=num_classes, student=preprocessing, device=device, precision=recipe.precision
        )
    on_gpu = device.type == "cuda"
    return Learner(
        recipe=recipe,
        process=process,
        divided=divided,
        bare=bare,
        heads=compiled(heads) if recipe.compile == "on" else heads,
        optimizer=make_optimizer(model, recipe, extra=bare.extra if isinstance(bare, TokenHeads) else None),
        scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
        average=average,
        mixing=Mixing(recipe, num_classes, own=None if extra is None else extra.mix, tokens=tokens),
        loss=DistillationLoss(
            recipe,
            teacher=teacher,
            extra=extra,
            weights=None if weights is None else weights.to(device),
            multi_label=multi_label,
        ),
        teacher=teacher,
        # one process alone cannot try parts of a divided model; that is compiled only on request, too
        fitted=not on_gpu or divided,
        undecided=on_gpu and not divided and recipe.compile == "auto",
        look_every=_LOOK_EVERY if on_gpu else 1,
    )


def extra_heads_of(model: nn.Module, recipe: Recipe) -> ExtraHeads | None:
    """Extra heads for token labels, or the model's own ones, if it has any.

    Raises: ConfigError: the recipe's `mix_mode` needs the model's own, or more.
    """
    extra: ExtraHeads | None = None
    if recipe.token_labels:
        return PatchLoss(recipe.token_labels)
    if isinstance(model, HasExtraHeads):
        extra = model.extra_heads(mix_mode=recipe.mix_mode, mixup=recipe.mixup, cutmix=recipe.cutmix)
    if recipe.mix_mode == "patch" and extra is None:
        raise ConfigError("mix_mode='patch' needs a model with a patch head, such as vit_resnas_tiny; pass 'batch'")
    return extra


def _heads(model: nn.Module, recipe: Recipe, patch_classes: int | None, extra: ExtraHeads | None) -> Heads:
    """The model behind its heads; with `patch_classes` for token labelling, with a fresh head unless it has one."""
    if patch_classes is None or not isinstance(model, ImageClassifier):
        return Heads(model) if extra is None else AllHeads(model)
    if model.patch_classifier is not None:
        return TokenHeads(model, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = linear_head(model.num_features, patch_classes)
        init_vit_weights(head)
    return TokenHeads(model, head)


def _token_labels(model: nn.Module, recipe: Recipe, maps: LabelMaps | None, shard: Shard) -> TokenLabels | None:
    """The label maps with the model's grids. Raises: ConfigError: they do not go with recipe, model or `shard`."""
    if maps is None and not recipe.token_labels:
        return None
    if maps is None:
        text = "pass label_maps=FOLDER (--label-maps), which `deit-models label-maps` makes, or token_labels=0"
        raise ConfigError(f"token_labels={recipe.token_labels:g} needs label maps of the training images; {text}")
    if not recipe.token_labels:
        raise ConfigError("label maps are given, but token_labels=0 would not use them; pass token_labels=0.5")
    if not isinstance(model, ImageClassifier):
        raise ConfigError(f"token_labels need a model of this package, this is a {type(model).__name__}")
    if shard == "fsdp":
        raise ConfigError("token_labels train a head beside the model, which shard='fsdp' does not divide; use 'ddp'")
    image, last = torch.empty(1, 1, *model.config.image_hw, device="meta"), len(model.feature_levels) - 1
    image = image.expand(-1, model.config.in_chans, -1, -1)
    return TokenLabels(maps, tokens=model.level_grid(image, 0), patches=model.level_grid(image, last))


def _set_drop_rates(model: ImageClassifier, recipe: Recipe) -> None:
    rates = {"drop_rate": recipe.drop_rate, "drop_path_rate": recipe.drop_path_rate}
    if hasattr(model.config, "patch_drop_rate"):
        rates["patch_drop_rate"] = recipe.patch_drop_rate
    model.set_drop_rates(**rates)


def _store_less(model: nn.Module) -> None:
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(
            f"grad_checkpointing=True: a {type(model).__name__} has no set_grad_checkpointing, which models of this "
            f"package and timm's have; leave it off"
        )
    switch(True)


def _has_idle_head(model: nn.Module, recipe: Recipe) -> bool:
    """Whether the recipe's loss leaves out one of the model's heads."""
    config = getattr(model, "config", None)
    taught = recipe.distill_on == "token" if recipe.distillation != "none" else recipe.label_heads == "both"
    # extra heads are used in training mode only
    extra_idle = not recipe.train_mode and extra_heads_of(model, recipe) is not None
    return (getattr(config, "distilled", False) is True and not taught) or extra_idle


def _check_fit(
    model: nn.Module, recipe: Recipe, num_classes: int, preprocessing: Preprocessing, *, multi_label: bool
) -> None:
    if isinstance(model, ImageClassifier) and model.origin is not None:
        model.origin.check_labels(multi_label, "training", begins=True)
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
    if recipe.cosub and getattr(getattr(model, "config", None), "distilled", False):
        raise ConfigError("cosub trains one head; train a model without a distillation token")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter of the model requires a gradient, so there is nothing to train")
