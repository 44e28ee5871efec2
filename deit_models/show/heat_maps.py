"""Heat maps: the parts of an image that a model's attention leads from its answer back to.

Each layer that mixes positions gives a matrix with a row for each of its outputs and a column for each of its inputs.
A row vector begins at the classified token and passes through these matrices from the last layer to the first:

- A block: its attention, and the identity for its residual step.
- LeViT's attention between stages: its attention alone, since it has no residual step. LeViT has no class token: the
  mean over all positions is classified, so that the vector begins with equal shares.
- ViT-ResNAS's reduction between stages: each new patch takes half of its share from the 3x3 patches that its
  convolution covers, and half from the 2x2 patches that its residual path averages.
- T2T-ViT's tokens-to-token module is left out: the map stops at its 16x16 pixel tokens.
- CaiT's class blocks: a row for the class token; the patches stay as they are. Before these blocks there is no class
  token, so what remains on it leads no further. "gradient" takes the attention after the second mixing of the heads.

Sources: Abnar and Zuidema, Quantifying attention flow in transformers, 2020, arXiv:2005.00928 ("rollout"); Chefer, Gur
and Wolf, Generic attention-model explainability, 2021, arXiv:2103.15679 ("gradient").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import check_choice, is_finite
from ..errors import ConfigError, shown
from ..models.cait import ClassBlock, TalkingHeadAttention
from ..models.layers import ImageClassifier
from ..models.levit import Residual, ScoredAttention, ShrinkAttention
from ..models.transformer import Attention, Block
from ..models.vit_resnas import SpatialReduction
from ..predict import attention_maps
from ..registry import own_model
from ..scoring.evaluation import eval_mode

Method = Literal["rollout", "last", "gradient"]
METHODS: tuple[Method, ...] = get_args(Method)
HeadFusion = Literal["mean", "max", "min"]
Token = Literal["class", "distillation", "mean"]
_FLAT = 1e-6  # a map whose values differ by a smaller share is constant up to rounding


def heat_maps(
    model: ImageClassifier,
    images: Tensor,
    *,
    method: Method = "rollout",
    target: int | Sequence[int] | None = None,
    head_fusion: HeadFusion = "mean",
    discard: float = 0.0,
    token: Token = "mean",
) -> Tensor:
    """A heat map of each image, from 0 (coldest) to 1 (hottest), of the input's size.

    The map has one value a patch, enlarged bilinearly, and is stretched to 0..1 for each image by itself; a constant
    map becomes all zeros. The model computes in eval mode; its mode and its gradients are left as they were. It works
    inside `torch.no_grad()` and `torch.inference_mode()`, too.

    Args:
        model: a DeiT, DeiT III, T2T-ViT, LeViT, ViT-ResNAS or CaiT; not the result of `optimize`.
        images: normalised images, as `transform_for(model)` gives them.
        method: "rollout" multiplies the attention of all blocks, each averaged with the identity; "last" is the
            attention of the last block alone; "gradient" weights the attention by the gradient of a class's logit, and
            is the only one that differs from class to class.
        target: of "gradient" the class, one for all images or one for each; default: the likeliest of each image.
        head_fusion: of "rollout" and "last", how the heads of a block become one.
        discard: of "rollout", share of each row of a block's attention that is set to zero, the lowest first.
        token: the token to begin at. Of "gradient" it also chooses the head whose logit counts. Models without a class
            token, such as LeViT, have "mean" alone: the mean over all positions.

    Shape: (B, C, H, W) -> (B, H, W) float32, on the device of `images`.
    Raises: ConfigError: a model without attention maps; an option that does not belong to the method or the model;
        images of pixels, or of another size than the model takes; attention that is not finite.
    """
    model = own_model(model, others=True)
    start = _checked_start(model, images, method, head_fusion, discard, token)
    classes = _checked_classes(model, images, method, target)
    weight = next(model.parameters())
    fuse = _fusion(head_fusion, discard)
    # inference mode off: tensors made in it cannot take part in a backward pass; autocast off: maps are float32
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(method == "gradient"),
        torch.autocast(weight.device.type, enabled=False),
        eval_mode(model),
    ):
        x = images.detach().to(weight.device, weight.dtype, copy=True)
        if method == "gradient":
            matrices = _transitions(model, _relevance(model, x.requires_grad_(), classes, token), normalise=False)
        elif method == "rollout":
            matrices = _transitions(model, map(fuse, attention_maps(model, x)), normalise=True)
        else:
            matrices = [fuse(attention_maps(model, x)[-1])]
        # "last" stays on the grid of the last stage
        grid = model.level_grid(x, len(model.feature_levels) - 1 if method == "last" else 0)
        row = start(matrices[-1].shape[-2]).to(weight.device)
        for matrix in reversed(matrices):
            # a token that joined after this layer stands in front, and leads no further back
            row = row[:, :, -matrix.shape[-2] :] @ matrix.detach()
        heat = row[:, :, -grid[0] * grid[1] :].reshape(-1, 1, *grid)
        if not heat.isfinite().all():
            raise ConfigError("the attention of these images is not finite; check the images and the weights for NaN")
        return _stretched(F.interpolate(heat, images.shape[-2:], mode="bilinear")[:, 0]).to(images.device)


def _stretched(heat: Tensor) -> Tensor:
    """Maps (B, H, W) from 0 to 1, each by itself; constant ones become zeros."""
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    flat = high - low <= _FLAT * high.abs()
    return torch.where(flat, 0.0, (heat - low) / torch.where(flat, 1.0, high - low))


def _checked_start(
    model: ImageClassifier, images: Tensor, method: str, head_fusion: str, discard: float, token: str
) -> Callable[[int], Tensor]:
    """Check the options; gives the row vector to begin with, (1, 1, P + N), for a number of tokens."""
    check_choice("method", method, Method)
    check_choice("head_fusion", head_fusion, HeadFusion)
    check_choice("token", token, Token)
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        given = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else shown(images)
        raise ConfigError(f"images: {given}; expected normalised floats (B, C, H, W), see transform_for")
    if not hasattr(model, "attention_maps") or not isinstance(model, ImageClassifier):
        raise ConfigError(
            f"{type(model).__name__} has no attention maps to draw; use DeiT, T2T-ViT, LeViT, ViT-ResNAS or CaiT, "
            f"as it was before `optimize`"
        )
    if not is_finite(discard) or not 0 <= discard < 1:
        raise ConfigError(f"discard={shown(discard)}; expected a share, 0 <= discard < 1")
    if discard and method != "rollout":
        raise ConfigError(f"discard={discard}: only method='rollout' discards attention")
    if head_fusion != "mean" and method == "gradient":
        raise ConfigError(f"head_fusion={head_fusion!r}: method='gradient' always averages the heads")
    prefix = model.num_prefix_tokens
    tokens = {"class": 0, "distillation": 1, "mean": -1}
    if token != "mean" and tokens[token] >= prefix:
        raise ConfigError(f"token={token!r}: this {type(model).__name__} has no {token} token; use token='mean'")

    def start(count: int) -> Tensor:
        row = torch.zeros(1, 1, count)
        row[..., : prefix or count] = 1 / (prefix or count)
        return row if token == "mean" else torch.eye(count)[tokens[token]].view(1, 1, -1)

    return start


def _checked_classes(
    model: ImageClassifier, images: Tensor, method: str, target: int | Sequence[int] | None
) -> list[int] | None:
    """The class of each image; None: its likeliest."""
    if method != "gradient":
        if target is not None:
            raise ConfigError(f"target={shown(target)}: only method='gradient' differs from class to class")
        return None
    if not model.num_classes:
        raise ConfigError("method='gradient' needs a class, and this model has num_classes=0; use method='rollout'")
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        raise ConfigError("method='gradient' needs weights that were loaded outside torch.inference_mode()")
    if target is None:
        return None
    classes = [target] * len(images) if isinstance(target, int) else list(target)
    known = all(type(number) is int and 0 <= number < model.num_classes for number in classes)
    if len(classes) != len(images) or not known:
        expected = f"a class from 0 to {model.num_classes - 1}, or one for each of {len(images)} images"
        raise ConfigError(f"target={shown(target)}; expected {expected}")
    return classes


# The layers of the families


def _attention_of(layer: nn.Module) -> Attention | ScoredAttention | None:
    """The attention in one of a model's `blocks`; None: it mixes no positions, or is a SpatialReduction."""
    if isinstance(layer, (SpatialReduction, ScoredAttention)):
        return layer if isinstance(layer, ScoredAttention) else None
    if isinstance(layer, Residual):
        return layer.m if isinstance(layer.m, ScoredAttention) else None
    if isinstance(layer, Block):
        return layer.attn
    raise ConfigError(f"heat maps are not known for a model with a {type(layer).__name__} among its blocks")


def _transitions(model: ImageClassifier, shares: Iterable[Tensor], *, normalise: bool) -> list[Tensor]:
    """A matrix (B or 1, outputs, inputs) for each layer that mixes positions, in order, from the attention of each.

    The identity is added for a residual step; with `normalise` each row then sums to 1.
    """
    waiting, found = iter(shares), []
    for layer in model.all_blocks:
        if isinstance(layer, SpatialReduction):
            found.append(_reduction(layer))
        elif _attention_of(layer) is not None:
            step = next(waiting)
            if isinstance(layer, ClassBlock):  # the patches ask nothing
                step = F.pad(step, (0, 0, 0, step.shape[-1] - 1))
            if not isinstance(layer, ShrinkAttention):
                step = step + torch.eye(step.shape[-1], device=step.device)
            found.append(step / step.sum(-1, keepdim=True).clamp(min=1e-12) if normalise else step)
    return found


def _reduction(layer: SpatialReduction) -> Tensor:
    """The shares of a SpatialReduction, (1, P + h * w / 4, P + h * w); each row sums to 1."""
    device, (height, width) = layer.pos_embed.device, layer.grid
    each = torch.eye(height * width, device=device).view(-1, 1, height, width)  # one image for each input patch
    covered = F.avg_pool2d(each, 3, stride=2, padding=1, count_include_pad=False)
    share = (covered + F.avg_pool2d(each, 2)) / 2
    prefix = torch.eye(layer.prefix, device=device)
    return torch.block_diag(prefix, share.flatten(1).T)[None]  # type: ignore[no-untyped-call]


# Attention to shares


def _fusion(head_fusion: str, discard: float) -> Callable[[Tensor], Tensor]:
    """Makes one matrix of a block's heads: (B, heads, queries, keys) -> (B, queries, keys) float32."""

    def fuse(attention: Tensor) -> Tensor:
        heads = attention.float()
        fused = heads.mean(1) if head_fusion == "mean" else heads.amax(1) if head_fusion == "max" else heads.amin(1)
        lowest = fused.topk(int(discard * fused.shape[-1]), dim=-1, largest=False).indices
        return fused.scatter(-1, lowest, 0.0)

    return fuse


def _relevance(model: ImageClassifier, x: Tensor, classes: list[int] | None, token: Token) -> list[Tensor]:
    """For each attention the mean over heads of the positive part of gradient * attention, (B, queries, keys)."""
    layers = [attention for layer in model.all_blocks if (attention := _attention_of(layer)) is not None]
    inputs, mixed = dict[nn.Module, Tensor](), dict[nn.Module, Tensor]()
    handles = []
    try:
        for layer in layers:
            for kept, place in ((inputs, layer), (mixed, layer.proj)):
                handles.append(place.register_forward_pre_hook(_keeper(kept, layer)))
        logits = _logits(model, x, classes, token)
        # The output of a head is attention @ value: the gradient of the attention follows from that of the output, so
        # that the model computes as it always does
        slopes = torch.autograd.grad(logits.sum(), [mixed[layer] for layer in layers])
    finally:
        for handle in handles:
            handle.remove()
    relevance = []
    with torch.no_grad():
        for layer, slope in zip(layers, slopes, strict=True):
            value = layer.heads(inputs[layer])[2].float()
            # (B, queries, heads * width) -> (B, heads, queries, width)
            per_head = slope.float().reshape(*slope.shape[:2], value.shape[1], -1).transpose(1, 2)
            used = layer.shares if isinstance(layer, TalkingHeadAttention) else layer.weights
            relevance.append((per_head @ value.mT * used(inputs[layer])).clamp(min=0).mean(1))
    return relevance


def _keeper(kept: dict[nn.Module, Tensor], layer: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept[layer] = arguments[0]

    return keep


def _logits(model: ImageClassifier, x: Tensor, classes: list[int] | None, token: Token) -> Tensor:
    """The logit of each image's class, (B,)."""
    heads = model.forward_heads(x)
    answer = heads.mean
    chosen = answer.argmax(1) if classes is None else torch.tensor(classes, device=answer.device)
    if heads.dist is not None and token != "mean":
        answer = heads.cls if token == "class" else heads.dist
    return answer.gather(1, chosen[:, None])[:, 0]
