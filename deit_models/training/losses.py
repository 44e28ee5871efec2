"""Losses of a training step: on the labels and, with a teacher, on the teacher's logits.

Source: DeiT, section 3 (losses) and the authors' script (normalisation of the soft form); DeiT III, section 3.3
(binary cross-entropy). All losses are computed in float32, whatever the logits' type.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TrainingError
from ..models.layers import ImageClassifier
from ..recipes.recipe import Recipe
from .teacher import Teacher

logger = logging.getLogger(__name__)


def soft_target_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy with a distribution as target, averaged over the batch: -(1/B) sum_bk w_k y_bk log softmax(z_b)_k.

    Shape: logits (B, K) float, targets (B, K) float with rows that sum to 1, weights (K,) -> scalar float32.
    Source: the loss of DeiT's training on mixed and smoothed labels.
    """
    return F.cross_entropy(logits.float(), targets.float(), weight=weights)


def several_labels(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """One yes-or-no question a class, answered by shares from 0 to 1, averaged over all B * K entries.

    Shape: logits (B, K) float, targets (B, K) float, weights (2, K) of yes and of no -> scalar float32.
    """
    if weights is None:
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float())
    yes, no = weights
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), weight=no, pos_weight=yes / no)


def binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """One yes-or-no question a class: every class in the mixture counts as present, averaged over all B * K entries.

    Targets above 0 become 1, so that the weights of mixup and CutMix are forgotten; label smoothing must be off.

    Shape: logits (B, K) float, targets (B, K) float, weights (2, K) of yes and of no -> scalar float32.
    Source: DeiT III, section 3.3, after Wightman et al., ResNet strikes back, 2021.
    """
    return several_labels(logits, targets.gt(0), weights)


def soft_distillation(
    student_logits: Tensor, teacher_logits: Tensor, tau: float, images: Tensor | float = 1.0
) -> Tensor:
    """Divergence of the student's softened distribution from the teacher's, KL(teacher || student).

    tau^2 / (B * K) * sum_bk p_bk (log p_bk - log q_bk), p = softmax(teacher / tau), q = softmax(student / tau).
    The authors divide by all B * K entries: this is 1/K of the usual mean over the batch, and alpha has to be read with
    that in mind. No gradient reaches the teacher; a class to which the teacher gives -inf adds nothing.

    Shape: both logits (B, K) float, weights of the `images` (B,) -> scalar float32.
    Source: DeiT, equation 2; the normalisation is the authors' script's.
    """
    with torch.no_grad():
        wanted = (teacher_logits.float() / tau).softmax(dim=-1)
    given = (student_logits.float() / tau).log_softmax(dim=-1)
    each = F.kl_div(given, wanted, reduction="none").sum(dim=-1)
    return (each * images).sum() * (tau**2 / student_logits.numel())


def hard_distillation(student_logits: Tensor, teacher_logits: Tensor, images: Tensor | float = 1.0) -> Tensor:
    """Cross-entropy with the teacher's decision as the label, neither smoothed nor mixed, averaged over the batch.

    Shape: both logits (B, K) float, weights of the `images` (B,) -> scalar float32.
    Source: DeiT, equation 3.
    """
    each = F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1), reduction="none")
    return (each * images).mean()


def cosub(logits: Tensor, targets: Tensor) -> Tensor:
    """Co-training of submodels: both passes of the same images learn from the labels, and each from the other.

    A quarter each of the binary cross-entropy of either pass with the targets, and with the probabilities of the other
    pass, through which no gradient flows.

    Shape: logits (2 * B, K) float, first pass first; targets (B, K) float -> scalar float32.
    Source: Touvron et al., Co-training 2^L Submodels for Visual Recognition, 2022; the weights are the authors' code's.
    """
    first, second = logits.float().chunk(2)
    wanted = (targets, targets, second.detach().sigmoid(), first.detach().sigmoid())
    pairs = zip((first, second, first, second), wanted, strict=True)
    return torch.stack([several_labels(given, target) for given, target in pairs]).mean()


class ExtraHeads(Protocol):
    """Heads of one model family only: their loss, and perhaps their own way to mix batches."""

    @property
    def mix(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Any]] | None:
        """Mixes images (B, 3, H, W) and soft labels (B, K); gives both, labels first in a tuple. None: as usual."""

    def loss(self, logits: Any, targets: Any, label_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Their loss, a scalar: from the result of `forward_training`, and the labels or the result of `mix`."""


@runtime_checkable
class HasExtraHeads(Protocol):
    """A model with `ExtraHeads`."""

    def forward_training(self, x: Tensor) -> tuple[Any, ...]:
        """Logits of class head, distillation head or None, then of the extra heads, for training mode."""

    def extra_heads(self, *, mix_mode: str, mixup: float, cutmix: float) -> ExtraHeads | None:
        """The extra heads for a recipe with these settings; None: this model has none."""


class PatchLoss:
    """`ExtraHeads` of token labelling: the cross-entropy of each patch with its label, averaged over all patches.

    A patch without a label, outside of its image, adds nothing to the sum.
    Source: Jiang et al., All Tokens Matter, 2021, equation 3; `weight` is beta.
    """

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Any]] | None = None

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, logits: Any, targets: Any, label_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """See `ExtraHeads`; logits are those of `TokenHeads`, targets `TokenTargets`."""
        return self.weight * label_loss(logits[2].flatten(0, 1), targets[1].flatten(0, 1))


class DistillationLoss:
    """The loss of a recipe: (1 - alpha) * labels' loss + alpha * teacher's loss, or the labels' alone.

    The class head learns from the labels, and so do extra heads, with equal weight. The distillation head learns from
    the teacher (distill_on="token", as in the paper), or the class head does (distill_on="class"). Without a teacher,
    label_heads="both" lets both heads learn from the labels, each by its own loss. A head without a loss stays
    untrained, as in the authors' code; this is logged once, because evaluation takes the mean of both heads.

    `weights` of the classes, see `ClassCounts.weights`, count in every head's loss; in the teacher's an image has those
    of its labels. With `multi_label` an image has several labels, see `several_labels`.

    Raises: TrainingError: the recipe distils and there is no teacher, or the other way round.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        teacher: Teacher | None,
        extra: ExtraHeads | None = None,
        weights: Tensor | None = None,
        multi_label: bool = False,
    ) -> None:
        if recipe.distillation != "none" and teacher is None:
            raise TrainingError(
                f"distillation={recipe.distillation!r} needs a teacher; pass teacher=..., or distillation='none'"
            )
        if recipe.distillation == "none" and teacher is not None:
            raise TrainingError("a teacher is given, but distillation='none'; pass distillation='hard' or 'soft'")
        self.recipe = recipe
        self.extra = extra
        loss = soft_target_cross_entropy if recipe.loss == "ce" else binary_cross_entropy
        self.weights = weights
        self._base = partial(several_labels if multi_label else loss, weights=weights)
        self._warned = False

    def __call__(
        self,
        output: Tensor | tuple[Any, ...],
        targets: Tensor | tuple[Tensor, Any],
        teacher_logits: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, a float32 scalar.

        Args:
            output: the student's logits: (B, K) of one head, or a pair of them, class head first, then those of extra
                heads; `forward_heads` gives the pair in every mode.
            targets: the labels as distributions, (B, K), or these and targets of the extra heads.
            teacher_logits: the teacher's for the same images, (B, K); needed if the recipe distils.

        Raises: TrainingError: logits and targets of different shapes, no teacher logits, or no distillation head.
        """
        cls, dist, *_ = (output, None) if isinstance(output, Tensor) else output
        wanted = targets if isinstance(targets, Tensor) else targets[0]
        if self.recipe.cosub:
            return cosub(cls, wanted.gt(0).float() if self.recipe.loss == "bce" else wanted)
        self._check_shape("targets", wanted, cls)
        base = self._base(cls, wanted)
        if self.extra is not None:
            base = base + self.extra.loss(output, targets, self._base)
        if self.recipe.distillation == "none":
            if dist is not None and self.recipe.label_heads == "both":
                return (base + self._base(dist, wanted)) / 2
            self._warn_untrained(dist)
            return base
        if teacher_logits is None:
            raise TrainingError(f"distillation={self.recipe.distillation!r} needs the teacher's logits for each batch")
        self._check_shape("teacher's logits", teacher_logits, cls)
        taught = self._taught_head(cls, dist)
        if self.recipe.distillation == "soft":
            learned = soft_distillation(taught, teacher_logits, self.recipe.tau, self._of_images(wanted))
        else:
            learned = hard_distillation(taught, teacher_logits, self._of_images(wanted))
        return (1 - self.recipe.alpha) * base + self.recipe.alpha * learned

    def _of_images(self, targets: Tensor) -> Tensor | float:
        """The weights of images, (B,), by their labels' shares."""
        weights = self.weights if self.weights is None or self.weights.ndim == 1 else self.weights[0]
        return 1.0 if weights is None else targets @ weights / targets.sum(dim=1)

    def _taught_head(self, cls: Tensor, dist: Tensor | None) -> Tensor:
        if self.recipe.distill_on == "class":
            self._warn_untrained(dist)
            return cls
        if dist is None:
            raise TrainingError(
                "distill_on='token' needs a distillation head, but the model gives one output; train a distilled "
                "variant (distilled=True, or a name with 'distilled'), or pass distill_on='class'"
            )
        return dist

    def _warn_untrained(self, dist: Tensor | None) -> None:
        if dist is None or self._warned:
            return
        self._warned = True
        logger.warning(
            "the distillation head is not trained (distillation=%r, distill_on=%r), yet evaluation takes the mean of "
            "both heads: train a variant without that token, distil on the token, or set label_heads='both'",
            self.recipe.distillation,
            self.recipe.distill_on,
        )

    @staticmethod
    def _check_shape(what: str, given: Tensor, logits: Tensor) -> None:
        if given.shape != logits.shape:
            raise TrainingError(
                f"the {what} have shape {tuple(given.shape)}, the student's logits {tuple(logits.shape)}; "
                f"both must be (images, classes)"
            )


class WithLoss(nn.Module):
    """A model that takes `pixel_values` and `labels` and gives a dict, as `transformers.Trainer` expects.

    The loss follows the model's `problem_type`: cross-entropy by default, one yes-or-no question a class for
    "multi_label_classification" or a single logit, the squared error for "regression". Both heads of a distilled model
    learn, each by its own loss. What the trainer saves loads with `from_pretrained(folder, model=name)`; `self.model`
    saves its config and class names, too.
    """

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The logits that the model gives in eval mode, (B, num_classes); with labels also the loss, a scalar.

        Labels are class numbers (B,), or one number a class (B, num_classes).
        """
        heads = self.model.forward_heads(pixel_values)
        found = {"logits": heads.mean}
        if labels is not None:
            losses = [self._loss(logits.float(), labels) for logits in heads if logits is not None]
            found["loss"] = torch.stack(losses).mean()
        return found

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.model.origin and self.model.origin.problem_type
        if problem == "regression":
            return F.mse_loss(logits, labels.float().view_as(logits))
        if problem == "multi_label_classification" or logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits, labels.float().view_as(logits))
        return F.cross_entropy(logits, labels)
