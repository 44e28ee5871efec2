"""Shared by all model families: the base class, stochastic depth, grids, initialisation, position resizing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import FrozenInstanceError, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..checkpoint import Layout
from ..config import MOST, check_fields, override
from ..errors import ConfigError, first_line, shown
from ..registry import meta_model
from .features import LayerFeatures

if TYPE_CHECKING:
    from ..checkpoint import Origin


MOST_PIXELS = 1 << 26
"""Pixels of an input image, at most: 8192x8192."""


class HeadLogits(NamedTuple):
    """The logits of each head, (B, num_classes); `dist` is None where the model has no distillation head."""

    cls: Tensor
    dist: Tensor | None

    @property
    def mean(self) -> Tensor:
        """The answer in eval mode: the mean of both heads' logits, as in the authors' code; with one head its own."""
        return self.cls if self.dist is None else (self.cls + self.dist) / 2


class ImageSize:
    """Input size of a config: every family's has the field `img_size`."""

    img_size: int | tuple[int, int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Other libraries put attributes of their own on `model.config`: allow them; fields stay frozen."""
        super().__init_subclass__(**kwargs)
        if "__setattr__" in vars(cls):  # the dataclass's; with slots it fails with a TypeError for other names
            cls.__setattr__ = ImageSize._set_foreign  # type: ignore[method-assign, assignment]

    def _set_foreign(self, name: str, value: Any) -> None:
        if name in (field.name for field in fields(self)):  # type: ignore[arg-type]
            raise FrozenInstanceError(f"cannot assign to field {name!r}; build or load the model with {name}=...")
        object.__setattr__(self, name, value)

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def check_fields(self) -> None:
        """Check flags and numbers, see `config.check_fields`; a list as `img_size` becomes a tuple."""
        if isinstance(self.img_size, list):
            object.__setattr__(self, "img_size", tuple(self.img_size))
        check_fields(self)


class GridConfig(ImageSize):
    """Config of a network with one grid of tokens, each for a square of `patch_size` pixels."""

    patch_size: int
    embed_dim: int

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the input in tokens."""
        return patch_grid(self.image_hw, self.patch_size)

    def check_fields(self) -> None:
        """Check also that heads divide the width, and tokens the image. Raises: ConfigError: naming both numbers."""
        super().check_fields()
        if self.embed_dim % (heads := getattr(self, "num_heads", 1)):
            raise ConfigError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={heads}")
        patch_grid(self.image_hw, self.patch_size)


def check_device(device: torch.device | str | None) -> None:
    """Raise ConfigError for a device that does not exist here."""
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each device's own code looks for it
        raise ConfigError(f"device={shown(device)} cannot be used here: {first_line(error)}") from error


def float_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type by its name. Raises: ConfigError: none of those a model may have."""
    known = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
    named = known.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if named is not None and named not in known.values():
        raise ConfigError(f"dtype={shown(dtype)}; expected {', '.join(known)}")
    return named


def is_symbolic(x: object) -> bool:
    """Whether `torch.fx` records the call: x has no shape then, and the graph is made for the model's own size."""
    return isinstance(x, torch.fx.Proxy)


def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), of which x alone is stored; the backward pass computes the rest again, with the same random numbers.

    Source: Chen et al., Training deep nets with sublinear memory cost, 2016, arXiv:1604.06174.
    """
    if torch.compiler.is_compiling():  # the compiler repeats no change of statistics
        return cast(Tensor, checkpoint(layer, x, use_reentrant=False))
    contexts = nullcontext(), _without_statistics(layer.modules())
    return cast(Tensor, checkpoint(layer, x, use_reentrant=False, context_fn=lambda: contexts))


@contextmanager
def _without_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """BatchNorms keep their running statistics inside the `with` block."""
    norms = [module for module in modules if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class ImageClassifier(LayerFeatures):
    """Base of every model family: holds the config and the origin of the weights, and saves the model.

    `config` is the family's frozen dataclass. `origin` holds the name of the registered model and the facts that belong
    to its weights (evaluation transform, class names, licence); None for a model that was built from its class.
    """

    family: ClassVar[str]
    """Name of the file under `models/`; tensor-name tables and configs are kept by family."""
    global_pool: ClassVar[str] = "token"
    """timm's name for `pool`."""

    grad_checkpointing = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.origin: Origin | None = None

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return int(self.config.num_classes)

    @classmethod
    def describe_state(cls, state: Mapping[str, Tensor], config: Any) -> Any:
        """The config of a bare native state dict: `config` with the classes and the size its tensors were made for."""
        raise NotImplementedError(f"{cls.__name__} does not define describe_state")

    def fit_state(self, state: Mapping[str, Tensor], made_for: Any) -> dict[str, Tensor]:
        """A native state dict made for the config `made_for`, fitted to this model's size, as a new dict."""
        raise NotImplementedError(f"{type(self).__name__} does not define fit_state")

    def reset_heads(self) -> None:
        """Give the heads fresh weights, in place; also brings them from the meta device to the CPU."""
        for name in self.head_names:
            head = getattr(self, name)
            if head is not None:
                if any(parameter.is_meta for parameter in head.parameters()):
                    head.to_empty(device="cpu")
                init_vit_weights(head)

    def set_drop_rates(self, **rates: float) -> None:
        """Change dropout and stochastic depth in place, as if the model had been built with these rates.

        Args:
            **rates: fields of the config, such as drop_rate and drop_path_rate.

        Raises: ConfigError: no such field, or a rate that is no probability below 1.
        """
        self.config = override(self.config, rates)
        own = dict(self.named_modules())
        for name, wanted in meta_model(type(self), self.config).named_modules():
            # of nn.Dropout; of DropPath and PatchDropout; not of parts that were exchanged for others
            for field in {"p", "rate"} & vars(wanted).keys() & vars(own.get(name, self)).keys():
                setattr(own[name], field, getattr(wanted, field))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In passes with gradients, store the input of each layer of `blocks` alone, and compute the rest again.

        It takes less memory and more time; gradients and BatchNorm statistics stay the same.
        """
        self.grad_checkpointing = enable

    def run_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x), perhaps with gradient checkpointing."""
        return recomputed(layer, x) if self._recomputes(x) else layer(x)

    def run_blocks(self, tokens: Tensor) -> Tensor:
        """All of `blocks`, perhaps with gradient checkpointing."""
        if not self._recomputes(tokens):
            return self.blocks(tokens)
        for layer in self.blocks:
            tokens = recomputed(layer, tokens)
        return tokens

    def _recomputes(self, x: Tensor) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled() and not is_symbolic(x)

    def check_input(self, x: Tensor) -> None:
        """Raise ConfigError unless x is a batch of images of the config's channels and size, (B, C, H, W)."""
        expected = (self.config.in_chans, *self.config.image_hw)
        if is_symbolic(x):
            return
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ConfigError(
                f"input of shape {tuple(x.shape)}; this model takes (B, {', '.join(map(str, expected))}). "
                f"Pass img_size=... when building or loading it"
            )

    def pool(self, features: Tensor) -> Tensor:
        """One vector an image from the result of `forward_features`, (B, P + N, D) -> (B, D).

        It is the class token; in distilled models the mean of both tokens, as in timm; in LeViT, which has neither, the
        mean of all.
        """
        prefix = self.num_prefix_tokens
        return (features[:, :prefix] if prefix else features).mean(dim=1)

    def classify(self, features: Tensor) -> HeadLogits:
        """Logits of each head in any mode from the result of `forward_features`."""
        raise NotImplementedError(f"{type(self).__name__} does not define classify")

    @property
    def patch_classifier(self) -> nn.Module | None:
        """The family's own head on patch tokens; None: there is none."""
        return None

    def classify_prefix(self, features: Tensor) -> HeadLogits:
        """As `classify`, without the share of a head on patch tokens."""
        return self.classify(features)

    def classify_patches(self, features: Tensor) -> Tensor:
        """Logits of each patch from the result of `forward_features`: (B, P + N, D) -> (B, N, num_classes).

        By the head on patch tokens; without one, by the heads of the image on each patch alone, of two by their mean.
        """
        patches, prefix = features[:, self.num_prefix_tokens :], max(self.num_prefix_tokens, 1)
        if self.patch_classifier is not None:
            return cast(Tensor, self.patch_classifier(patches))
        logits = self.classify(patches.flatten(0, 1)[:, None].expand(-1, prefix, -1))
        return logits.mean.reshape(*patches.shape[:2], -1)

    def embed(self, x: Tensor) -> Tensor:
        """One vector an image, (B, C, H, W) -> (B, D), see `pool`."""
        return self.pool(self.forward_features(x))

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """Logits of each head in any mode; x is (B, C, H, W)."""
        return self.classify(self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classify x, (B, C, H, W) -> (B, num_classes).

        Models with a distillation head return (class logits, distillation logits) in training mode, and their mean in
        eval mode. The DeiT paper adds softmax outputs; the authors' code averages logits, and the published accuracies
        come from the code.
        """
        return self._joined(self.forward_heads(x))

    def _joined(self, logits: HeadLogits) -> Tensor | tuple[Tensor, Tensor]:
        cls, dist = logits
        return (cls, dist) if self.training and dist is not None else logits.mean

    # timm's surface, beside that of `LayerFeatures`

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """From the result of `forward_features` to that of `forward`; with `pre_logits` to that of `embed`."""
        return self.pool(features) if pre_logits else self._joined(self.classify(features))

    def get_classifier(self) -> Any:
        """The head, or a tuple of the heads."""
        heads = tuple(head for name in self.head_names if (head := getattr(self, name)) is not None)
        return heads if len(heads) > 1 else heads[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put fresh heads for other classes in place of the heads; with 0 classes the model gives features.

        What `origin` says of the old classes goes. `adapt_head` takes names and keeps rows, too.

        Raises: ConfigError: no such number, or another pooling than the family's.
        """
        if global_pool not in (None, self.global_pool):
            raise ConfigError(f"global_pool={shown(global_pool)}; a {type(self).__name__} has {self.global_pool!r}")
        before, some = self.num_classes, next(self.parameters())
        fresh = meta_model(type(self), override(self.config, {"num_classes": num_classes}))
        fresh.reset_heads()
        self.config = fresh.config
        for name in self.head_names:
            head = getattr(fresh, name)
            setattr(self, name, head and head.to(device=some.device, dtype=some.dtype).train(self.training))
        if self.origin is not None:
            # with as many logits as before, or none, the old data set would give them its names
            dataset = None if before in (num_classes, 0) else self.origin.dataset
            size = self.config.image_hw
            self.origin = self.origin.adapted(size, class_names=None, dataset=dataset, new_heads=True)

    def save_pretrained(self, save_directory: str | PathLike[str], *, layout: Layout = "native") -> None:
        """Write config.json, model.safetensors and a model card; see `formats.publish.save_pretrained`."""
        from ..formats import publish

        publish.save_pretrained(self, save_directory, layout=layout)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        layout: Layout = "native",
        token: str | None = None,
        private: bool | None = None,
        onnx: bool = False,
    ) -> str:
        """Upload the folder `save_pretrained` writes; see `formats.publish.push_to_hub`."""
        from ..formats import publish

        return publish.push_to_hub(self, repo_id, layout=layout, token=token, private=private, onnx=onnx)


def check_has_classes(model: Any) -> None:
    """Raise ConfigError for a model with num_classes=0, such as a backbone of DINO."""
    if not model.num_classes:
        name = type(model).__name__ if model.origin is None else model.origin.name
        raise ConfigError(
            f"{name} has num_classes=0, no head and no classes: embed gives its features, evaluate --knn "
            f"(evaluate_knn) scores them; finetune, or num_classes=N when it is loaded, gives it a head"
        )


def linear_head(width: int, num_classes: int) -> nn.Module:
    """A linear head; without classes the features pass through it, as in timm."""
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def fit_channels(weight: Tensor, in_chans: int) -> Tensor:
    """The weight of a first layer, (D, C, ...), for images of other channels: (D, in_chans, ...), same dtype.

    For one channel the weights of all are summed; for more they are repeated, and scaled to the same total.
    Source: `adapt_input_conv` of timm.
    """
    before = weight.shape[1]
    if before == in_chans:
        return weight
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    order = torch.arange(in_chans, device=weight.device) % before
    return (weight.float().index_select(1, order) * (before / in_chans)).to(weight.dtype)


def described(
    config: Any,
    *,
    head: Tensor | None,
    first: Tensor | None,
    positions: Tensor | None,
    prefix: int,
    grid: tuple[int, int],
    step: int,
) -> Any:
    """The config of a bare state dict: `config` with the classes, channels and size of its tensors.

    Args:
        config: of the model that the tensors are said to be of.
        head: weight of the head.
        first: weight of the first convolution.
        positions: (1, prefix + patches, ...); another number of patches than in `grid` must be a square.
        prefix: positions that are not of patches.
        grid: the config's (height, width) in patches.
        step: pixels of a patch's side.

    Raises: ConfigError: neither the expected grid nor a square.
    """
    if head is not None and head.ndim == 2 and len(head):
        config = replace(config, num_classes=head.shape[0])
    if first is not None and first.ndim == 4:
        config = replace(config, in_chans=first.shape[1])
    count = grid[0] * grid[1] if positions is None or positions.ndim < 2 else max(positions.shape[1] - prefix, 1)
    if count == grid[0] * grid[1]:
        return config
    side = math.isqrt(count)
    if side * side != count:
        made = f"{count} patch positions fill neither a square nor {grid[0]}x{grid[1]}"
        raise ConfigError(f"{made}; say the size that they were made for: img_size=(height, width)")
    return replace(config, img_size=side * step)


@torch.fx.wrap  # one node in a graph of torch.fx, which cannot follow a number of dimensions
def drop_samples(x: Tensor, rate: float) -> Tensor:
    """Set samples of x, (B, ...), to zero with probability `rate`; the others are scaled by 1 / (1 - rate)."""
    keep = 1.0 - rate
    return x * x.new_empty(x.shape[0], *([1] * (x.ndim - 1))).bernoulli_(keep).div_(keep)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole residual branch of a sample with probability `rate`.

    Shape: any (B, ...), unchanged. Kept branches are scaled by 1 / (1 - rate).
    Source: Huang et al. 2016, used by DeiT with a rate growing linearly over the blocks (table 9).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop or scale each sample of x."""
        return drop_samples(x, self.rate) if self.rate and self.training else x

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate:g}"


def patch_grid(image_hw: tuple[int, int], patch_size: int, *, name: str = "patch_size") -> tuple[int, int]:
    """Patches along (height, width); errors call the side of a patch by `name`.

    Raises: ConfigError: a side is not a positive multiple of the patch, or the image is larger than any is.
    """
    if len(image_hw) != 2 or not all(type(side) is int for side in image_hw):
        raise ConfigError(f"img_size={shown(image_hw)} is neither a whole number nor (height, width)")
    if max(image_hw) > MOST or image_hw[0] * image_hw[1] > MOST_PIXELS:
        raise ConfigError(f"img_size={shown(image_hw)} is too large; expected {MOST_PIXELS} pixels at most")
    for side in image_hw:
        if side < patch_size or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            raise ConfigError(
                f"img_size={side} is not a multiple of {name}={patch_size}; use {below} or {below + patch_size}"
            )
    return image_hw[0] // patch_size, image_hw[1] // patch_size


def init_vit_weights(model: nn.Module) -> None:
    """Initialise linear layers with a truncated normal of std 0.02 and zero biases, in place.

    Other layers keep torch's default, as the authors' do; each model fills its own tokens and positions.
    Source: DeiT, section 6; the authors' `_init_weights`.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resize_pos_embed(
    pos_embed: Tensor, *, num_prefix: int, grid: tuple[int, int], source_grid: tuple[int, int] | None = None
) -> Tensor:
    """Fit position embeddings to another patch grid; the prefix tokens' positions stay as they are.

    Args:
        pos_embed: the embeddings, prefix positions first.
        num_prefix: number of prefix positions (class token, distillation token).
        grid: the wanted (h, w) in patches.
        source_grid: the (h, w) they were made for; default: a square.

    Shape: (1, P + N, D) float -> (1, P + h * w, D), same dtype.
    Raises: ConfigError: the source grid does not hold N patches.
    Source: DeiT section 3 (fine-tuning at higher resolution); bicubic, align_corners=False, no antialiasing, as in
        the authors' script.
    """
    num_patches = pos_embed.shape[1] - num_prefix
    if source_grid is None:
        side = round(max(num_patches, 0) ** 0.5)
        source_grid = (side, side)
    if source_grid[0] * source_grid[1] != num_patches:
        raise ConfigError(
            f"{num_patches} patch positions do not fill a grid of {source_grid[0]}x{source_grid[1]}; "
            f"pass the grid the checkpoint was trained with"
        )
    if source_grid == grid:
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    # (1, N, D) -> (1, D, h, w); in float32, because bicubic sums of half-precision values lose digits
    image = patches.float().reshape(1, *source_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    patches = image.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)
