"""The settings of a training run: a frozen record, with the papers' settings as named presets.

Every field can be overridden from Python (`recipe_named("deit_300e", epochs=100)`), from a TOML file (`read_recipe`)
and on the command line (one option per field). No field is ever None: 0 or "none" means off, so that a recipe can be
written to TOML and read back unchanged.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ..config import check_choice, nearest, override
from ..errors import ConfigError, shown
from ..files import parse_toml, read_text, toml_lines
from .presets import PRESETS

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bf16", "fp16"]
Compile = Literal["auto", "on", "off"]
CUSTOM = "custom"
"""The label of a recipe without a preset."""


def _option(default: Any, text: str) -> Any:
    """A field with its explanation for the command line and the documentation."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of a training run; the defaults are the DeiT paper's for training from scratch (table 9).

    Raises: ConfigError: a value that cannot work, with its name and what is accepted.
    """

    preset: str = _option(CUSTOM, "name of the preset this recipe began as; a label only")

    epochs: int = _option(300, "length of the cosine; passes over the training set")
    cooldown_epochs: int = _option(0, "epochs after the cosine, at min_lr (T2T-ViT: 10)")
    batch_size: int = _option(1024, "images in one optimiser step, over all processes and accumulation steps")
    accumulate: int = _option(1, "split each step into this many forward and backward passes")
    optimizer: Literal["adamw", "sgd", "nesterov", "lamb"] = _option(
        "adamw",
        "adamw; sgd with momentum; nesterov: with Nesterov's, as timm's sgd; lamb: scaled tensor by tensor (DeiT III)",
    )
    lr: float = _option(5e-4, "peak learning rate, for a batch of lr_batch images")
    lr_batch: int = _option(512, "scale lr by batch_size / lr_batch; 0: use lr as given")
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up; never scaled")
    min_lr: float = _option(1e-5, "learning rate at the end of the cosine; never scaled")
    warmup_epochs: int = _option(5, "epochs of linear warm-up")
    schedule: Literal["epoch", "epoch_delayed", "step", "constant"] = _option(
        "epoch_delayed",
        "epoch: one value an epoch; epoch_delayed: an epoch late, as the DeiT and LeViT scripts do, so that epochs 0 "
        "and 1 both run at warmup_lr; step: interpolated at every step; constant: after the warm-up, always lr",
    )
    weight_decay: float = _option(0.05, "on every parameter but vectors, biases and model.no_weight_decay()")
    layer_decay: float = _option(
        1.0, "the learning rate of each layer as a fraction of the next one's; the head learns at the full rate"
    )
    beta1: float = _option(0.9, "first beta of AdamW and LAMB, or SGD's momentum")
    beta2: float = _option(0.999, "second beta of AdamW and LAMB")
    eps: float = _option(1e-8, "epsilon of AdamW and LAMB")
    clip_grad: float = _option(0.0, "gradient clipping; 0: none")
    clip_mode: Literal["norm", "agc"] = _option(
        "norm", "norm: of all gradients together; agc: adaptive, unit by unit (LeViT)"
    )
    ema_decay: float = _option(0.99996, "moving average of the weights; 0: none")
    best_of: Literal["model", "ema"] = _option(
        "model", "weights that best/ holds, of their best epoch: the model's, or their moving average (T2T-ViT)"
    )
    drop_path_rate: float = _option(0.1, "stochastic depth of the last block")
    drop_rate: float = _option(0.0, "dropout")
    patch_drop_rate: float = _option(0.0, "share of an image's patches left out while training (DeiT, DeiT III)")
    train_mode: bool = _option(True, "train with dropout and stochastic depth on; DeiT fine-tuned with them off")

    img_size: int = _option(0, "pixels; 0: the model's own")
    crop: Literal["random_resized", "pad", "simple", "none"] = _option(
        "random_resized",
        "random_resized: a random area and aspect; pad: pad by 1/8 and cut out img_size (CIFAR); simple: shorter side "
        "to img_size, reflect-pad 4, random crop (DeiT III); none: the evaluation transform's crop",
    )
    crop_scale: float = _option(0.08, "smallest area of a random_resized crop, as a fraction of the image")
    interpolation: Literal["bicubic", "bilinear", "random"] = _option(
        "bicubic", "of crops and geometric operations; random: bilinear or bicubic"
    )
    hflip: float = _option(0.5, "probability of mirroring")
    augment: str = _option(
        "rand-m9-mstd0.5-inc1", "none; 3-augment (DeiT III); or rand-mM-mstdS-inc1: RandAugment of magnitude M, noise S"
    )
    color_jitter: float = _option(0.3, "of brightness, contrast and saturation; ignored with RandAugment, as in timm")
    erase: float = _option(0.25, "probability of random erasing, pixel by pixel")
    erase_after_mixing: bool = _option(False, "erase mixed images (T2T-ViT); else before they are mixed (DeiT)")
    repeats: int = _option(3, "repeated augmentation: times each image is drawn in its epoch; 1: off")

    mixup: float = _option(0.8, "alpha of mixup; 0: none")
    cutmix: float = _option(1.0, "alpha of CutMix; 0: none")
    mix_prob: float = _option(1.0, "probability that a batch is mixed at all")
    mix_switch: float = _option(0.5, "probability of CutMix where both are on")
    mix_mode: Literal["batch", "patch"] = _option(
        "batch",
        "batch: each with its reverse, one draw for all; patch: shifted patch-token mixup, which needs a patch head",
    )
    mix_size: int = _option(
        0, "images that share one draw of mixing; 0: those of one pass. The authors': those of one of their GPUs"
    )
    label_smoothing: float = _option(0.1, "mass spread over all classes")
    loss: Literal["ce", "bce"] = _option(
        "ce",
        "ce: cross-entropy with soft targets; bce: binary, every mixed class a positive; several labels an image: "
        "always binary, mixed labels by their shares",
    )
    class_weights: Literal["none", "balanced"] = _option(
        "none", "balanced: each class adds as much to the loss, however few its images"
    )
    sampling: Literal["all", "balanced"] = _option(
        "all", "all: each image once an epoch; balanced: each class as often, images of small ones repeatedly"
    )

    cosub: bool = _option(
        False,
        "co-training of submodels: each image passes twice, with other blocks dropped, and either pass learns from the "
        "labels and from the other (binary cross-entropy)",
    )
    token_labels: float = _option(
        0.0,
        "token labelling (Jiang et al. 2021: 0.5): weight of the loss of each patch by a teacher's label maps; 0: none",
    )
    class_target: Literal["map", "label"] = _option(
        "map", "with token labels the class head learns: map: the mean of an image's map; label: the image's label"
    )
    mix_token: bool = _option(
        False, "with token labels: paste a box of another image's tokens, in the place of mixup and CutMix (MixToken)"
    )
    label_heads: Literal["class", "both"] = _option(
        "class",
        "which heads of a distilled model learn from the labels where there is no teacher; both: each alone",
    )
    distillation: Literal["none", "soft", "hard"] = _option(
        "none", "none, soft (KL to the teacher) or hard (the teacher's decision)"
    )
    distill_on: Literal["token", "class"] = _option(
        "token", "head that learns from the teacher: token (distillation head) or class"
    )
    alpha: float = _option(0.5, "weight of the teacher's loss; the labels get 1 - alpha")
    tau: float = _option(1.0, "temperature of soft distillation")

    precision: Precision = _option(
        "auto",
        "auto: bf16 where the device computes in it, else float32; bf16 and fp16 use autocast, fp16 scales the loss",
    )
    grad_checkpointing: bool = _option(
        False, "store less for the backward pass, and compute it again there: less memory, more time"
    )
    compile: Compile = _option(
        "auto",
        "torch.compile the model; auto: on a GPU, if the run is long enough to gain by it; true is on, false is off",
    )
    seed: int = _option(0, "of weights, order and augmentation")
    eval_every: int = _option(1, "epochs between evaluations; the last epoch is always evaluated")
    save_every: int = _option(1, "epochs between saved states, from which a run goes on; the last is always saved")
    patience: int = _option(0, "epochs without a better validation accuracy after which the run ends; 0: never")

    def __post_init__(self) -> None:
        """Check types, choices, ranges and relations; whole numbers are accepted where a float is meant."""
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        if self.preset != CUSTOM and self.preset not in PRESETS:
            raise ConfigError(f"unknown recipe {self.preset!r}{nearest(self.preset, PRESETS)}")
        for impossible, why in (
            (
                self.loss == "bce" and self.label_smoothing,
                "loss='bce' needs label_smoothing=0: smoothing would make every class a positive",
            ),
            (
                self.batch_size % self.accumulate,
                f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}",
            ),
            (
                self.warmup_epochs and self.warmup_epochs >= self.epochs,
                f"warmup_epochs={self.warmup_epochs} leaves none of epochs={self.epochs} to train",
            ),
            (self.best_of == "ema" and not self.ema_decay, "best_of='ema' needs an average; pass an ema_decay above 0"),
            (
                self.cosub and not self.drop_path_rate,
                "cosub needs drop_path_rate above 0: both passes would be the same",
            ),
            (self.cosub and not self.train_mode, "cosub needs train_mode=true: both passes would be the same"),
            (
                self.cosub and self.distillation != "none",
                "cosub takes the place of a teacher; pass distillation='none'",
            ),
            (self.cosub and self.class_weights != "none", "cosub has a loss of its own, without class_weights"),
            (self.cosub and self.mix_mode != "batch", "cosub has a loss of its own, without that of mix_mode='patch'"),
            *self._misfits_of_token_labels(),
        ):
            if impossible:
                raise ConfigError(why)

    def _misfits_of_token_labels(self) -> Iterator[tuple[bool, str]]:
        """Settings that cannot work, and why."""
        yield self.mix_token and not self.token_labels, "mix_token mixes labels of patches; pass token_labels above 0"
        if self.token_labels:
            mixes, taught = bool(self.mixup or self.cutmix or self.mix_size), self.distillation != "none"
            yield self.mix_token and mixes, "mix_token takes the place of mixup, cutmix and mix_size; pass 0 for each"
            yield self.mix_token and taught, "mix_token mixes no images that a teacher could see; pass mix_token=false"
            yield self.loss != "ce", "token_labels are probabilities, which loss='bce' takes for yes or no; pass 'ce'"
            yield self.cosub, "cosub has a loss of its own, without token_labels"
            yield self.mix_mode != "batch", "token_labels have a loss of their own; pass mix_mode='batch'"
            yield self.patch_drop_rate > 0, "token_labels need every patch; pass patch_drop_rate=0"
            yield not self.train_mode, "token_labels train in training mode; pass train_mode=true"

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up, scaled linearly with the batch. Source: DeiT, section 6."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr

    @property
    def total_epochs(self) -> int:
        """Epochs run: the cosine's and the cool-down's."""
        return self.epochs + self.cooldown_epochs

    @property
    def balanced(self) -> bool:
        """Whether classes count alike, however many images they have: in training, and in the choice of weights."""
        return "balanced" in (self.class_weights, self.sampling)

    def for_several_labels(self) -> Recipe:
        """The same settings for images with several labels: a binary loss, without smoothing; a line says so.

        Raises: ConfigError: it distils, or has token labels.
        """
        if self.distillation != "none":
            raise ConfigError(
                f"distillation={self.distillation!r} needs one class for each image, these have several labels; train "
                "without a teacher, with distillation='none'"
            )
        if self.token_labels:
            raise ConfigError("token_labels are of one class for each image, these have several; pass token_labels=0")
        changed = replace(self, loss="bce", label_smoothing=0.0)
        if changed != self:
            logger.info("several labels an image: the loss is binary, each label for itself, without smoothing")
        return changed

    def in_words(self) -> str:
        """The main settings, for a model card or a report."""
        names = ["epochs", "batch_size", "optimizer", "weight_decay", "layer_decay", "augment", "mixup", "cutmix"]
        names += [name for name in ("class_weights", "sampling") if getattr(self, name) == "balanced"]
        names += ["token_labels", "class_target", "mix_token"] * bool(self.token_labels)
        settings = ", ".join(f"{name} {getattr(self, name)}" for name in (*names, "seed"))
        return f"recipe {self.preset}: learning rate {self.peak_lr:g}, {settings}; the rest in recipe.toml"

    def to_toml(self) -> str:
        """All fields as TOML, one line each, in order."""
        return toml_lines({item.name: getattr(self, item.name) for item in fields(self)})


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value of a field, in the type that is meant. Raises: ConfigError: another type, or out of range."""
    if kind is float and type(value) is int:
        value = float(value)
    if kind is Compile and isinstance(value, bool):
        value = "on" if value else "off"
    if get_args(kind):
        check_choice(name, value, kind)
    elif type(value) is not kind:
        raise ConfigError(f"{name}={value!r} is not of type {kind.__name__}")
    if name == "augment" and not _AUGMENT.fullmatch(value):
        raise ConfigError(f"augment={shown(value)}; expected none, 3-augment or for example rand-m9-mstd0.5-inc1")
    for names, fits, expected in _RANGES:
        if name in names and not fits(value):
            raise ConfigError(f"{name}={value!r}; expected {expected}")
    return value


_AUGMENT = re.compile(r"none|3-augment|rand(-[a-z]+[0-9.]+)+")
"""The parts of RandAugment are checked where they are read, in `RandAugment.parse`."""
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("epochs", "batch_size", "accumulate", "repeats", "eval_every", "save_every"), lambda v: v >= 1, "1 or more"),
    (
        ("cooldown_epochs", "lr_batch", "warmup_epochs", "img_size", "patience", "mix_size"),
        lambda v: v >= 0,
        "0 or more",
    ),
    (("epochs", "cooldown_epochs", "batch_size", "repeats", "img_size"), lambda v: v < 2**31, "less than 2**31"),
    (("lr", "warmup_lr", "min_lr", "weight_decay", "clip_grad"), lambda v: 0 <= v < math.inf, "0 or more"),
    (("color_jitter", "mixup", "cutmix", "token_labels"), lambda v: 0 <= v < math.inf, "0 or more"),
    (("eps", "tau"), lambda v: 0 < v < math.inf, "more than 0"),
    (("hflip", "erase", "mix_prob", "mix_switch", "label_smoothing", "alpha"), lambda v: 0 <= v <= 1, "0 to 1"),
    (("beta1", "beta2", "ema_decay"), lambda v: 0 <= v < 1, "0 or more and less than 1"),
    (("drop_path_rate", "drop_rate", "patch_drop_rate"), lambda v: 0 <= v < 1, "0 or more and less than 1"),
    (("crop_scale", "layer_decay"), lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    (("seed",), lambda v: 0 <= v < 2**63, "0 or more, less than 2**63"),
)
"""Ranges of all numbers among the fields: names, test, and text of the error."""


def recipe_named(name: str, /, **overrides: Any) -> Recipe:
    """A preset, with some fields replaced.

    Raises: ConfigError: no such preset or field (the nearest are named), or a value that cannot work.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, PRESETS)}")
    return override(Recipe(), {"preset": name, **PRESETS[name][1], **overrides})


def recipe_of(given: Recipe | str | PathLike[str], /, **overrides: Any) -> Recipe:
    """A recipe, a preset's name or a TOML file as a recipe, with some fields replaced.

    Raises: ConfigError: it is none of them, or see `recipe_named` and `read_recipe`.
    """
    if isinstance(given, Recipe):
        changed: Recipe = override(given, overrides)
        return changed
    if not isinstance(given, (str, PathLike)):
        raise ConfigError(f"recipe={shown(given)}; expected a Recipe, the name of a preset or a TOML file")
    if fspath(given) not in PRESETS and (Path(given).suffix == ".toml" or Path(given).is_file()):
        return read_recipe(given, **overrides)
    return recipe_named(fspath(given), **overrides)


def recipe_from_toml(text: str, /, **overrides: Any) -> Recipe:
    """A recipe from TOML: `preset` names what it starts from, the other keys replace fields.

    Raises: ConfigError: not TOML, no such preset or field, or a value that cannot work.
    """
    settings = parse_toml(text)
    preset = settings.pop("preset", CUSTOM)
    if preset == CUSTOM:
        return override(Recipe(), {**settings, **overrides})
    return recipe_named(str(preset), **{**settings, **overrides})


def read_recipe(path: str | PathLike[str], /, **overrides: Any) -> Recipe:
    """A recipe from a TOML file, see `recipe_from_toml`.

    Raises: ConfigError: the file cannot be read, or `recipe_from_toml` refuses it; the file is named.
    """
    text = read_text(path)
    try:
        return recipe_from_toml(text, **overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
