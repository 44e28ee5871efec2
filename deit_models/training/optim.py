"""The optimiser as the authors set it up: weight-decay groups, learning-rate schedule, clipping, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError
from ..models.layers import ImageClassifier
from ..recipes.recipe import Recipe


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, or two for each layer: decayed, and not.

    With a `layer_decay` below 1, layer i of n, the head being the last, gets an `lr_scale` of layer_decay ** (n - i);
    see `set_learning_rate`. Source: Clark et al., ELECTRA, 2020; for vision transformers Bao et al., BEiT, 2021.

    Not decayed: vectors and scalars, biases, and the names `model.no_weight_decay()` lists. DeiT's list holds the
    positions and the class token but not the distillation token, which therefore is decayed.
    Source: the authors' scripts, through timm 0.3.2's optimiser factory.

    Raises: ConfigError: a `layer_decay` for a model of another package, whose layers are unknown.
    """
    listed: set[str] = getattr(model, "no_weight_decay", set)()
    layers: list[dict[str, float]] = [{}]
    layered = model if isinstance(model, ImageClassifier) and layer_decay != 1.0 else None
    if layered is not None:
        last = layer_count(layered)
        layers = [{"lr_scale": layer_decay ** (last - layer)} for layer in range(last + 1)]
    elif layer_decay != 1.0:
        raise ConfigError(f"layer_decay={layer_decay}: {type(model).__name__} does not tell its layers; use 1")
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, **layer} for layer in layers for decay in (weight_decay, 0.0)
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = 0 if layered is None else layer_of_parameter(layered, name)
            free = parameter.ndim <= 1 or name.endswith(".bias") or name in listed
            groups[2 * layer + free]["params"].append(parameter)
    return groups


def layer_count(model: ImageClassifier) -> int:
    """Number of the last layer, see `layer_of_parameter`: the number of blocks and one."""
    return len(model.all_blocks) + 1


def layer_of_parameter(model: ImageClassifier, name: str) -> int:
    """Layer of a parameter: 0 up to the first block, then one a block, then one for the final norm and the heads."""
    if (block := model.block_of(name)) is not None:
        return 1 + block
    return layer_count(model) if name.partition(".")[0] in ("norm", *model.head_names) else 0


def make_optimizer(model: nn.Module, recipe: Recipe, *, extra: nn.Module | None = None) -> torch.optim.Optimizer:
    """The recipe's optimiser over the groups; the learning rate is set before every step, see `learning_rate`.

    `extra` is a head beside the model, with weights and biases; it learns as the model's own heads do.

    AdamW and SGD are torch's fused kernels: one pass over memory instead of a dozen, with the same arithmetic. SGD's
    kernel does not take divided parameters.
    """
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    for parameter in () if extra is None else extra.parameters():
        groups[-1 if parameter.ndim == 1 else -2]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer in ("sgd", "nesterov"):
        divided = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        nesterov = recipe.optimizer == "nesterov"
        return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.beta1, nesterov=nesterov, fused=not divided)
    betas = recipe.beta1, recipe.beta2
    if recipe.optimizer == "lamb":
        return Lamb(groups, lr=recipe.peak_lr, betas=betas, eps=recipe.eps)
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=betas, eps=recipe.eps, fused=True)


class Lamb(torch.optim.Optimizer):
    """LAMB as DeiT III was trained with: Adam's step, scaled for each tensor to its weights' norm (the trust ratio).

    All gradients together are first scaled down to a norm of `max_grad_norm`. Groups without weight decay take Adam's
    step as it is, without trust ratio. Divided parameters (FSDP) have the norms of the whole tensors.

    Args:
        params: parameters, or groups with their own `weight_decay`.
        lr: learning rate.
        betas: of the averages of gradients and of their squares.
        eps: added to the root of the squares' average.
        weight_decay: of groups without their own; added to Adam's step before the trust ratio.
        max_grad_norm: limit of the norm of all gradients.

    Source: You et al., Large Batch Optimization for Deep Learning, 2020, in the variant of NVIDIA's FusedLAMB and of
        timm's Lamb, which the authors' commands of DeiT III name.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, in place; gives the closure's result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        learned = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        gradients = [_local(cast(Tensor, parameter.grad)) for parameter in chain(*learned)]
        if gradients:
            norm = torch.linalg.vector_norm(_whole_norms(gradients, next(chain(*learned))))
            excess = (norm / self.max_grad_norm).clamp(min=1)
            for group, parameters in zip(self.param_groups, learned, strict=True):
                if parameters:
                    self._update(group, parameters, excess)
        return result

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter], excess: Tensor) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        steps = [self.state[parameter]["step"] for parameter in parameters]
        torch._foreach_add_(steps, 1)
        first, second = (
            [_local(self.state[parameter][name]) for parameter in parameters] for name in ("exp_avg", "exp_avg_sq")
        )
        weights, (beta1, beta2) = [_local(parameter) for parameter in parameters], group["betas"]
        gradients = torch._foreach_div([_local(cast(Tensor, parameter.grad)) for parameter in parameters], excess)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        # a parameter may have joined later, so that each has its own count of steps
        update = torch._foreach_div(first, [1 - beta1 ** float(step) for step in steps])
        roots = torch._foreach_div(second, [1 - beta2 ** float(step) for step in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(update, roots)
        if group["weight_decay"]:
            torch._foreach_add_(update, weights, alpha=group["weight_decay"])
            ours, theirs = _whole_norms(weights, parameters[0]), _whole_norms(update, parameters[0])
            ratios = torch.where((ours > 0) & (theirs > 0), ours / theirs, 1.0)
            torch._foreach_mul_(update, list(ratios.unbind()))
        torch._foreach_add_(weights, update, alpha=-group["lr"])


def _whole_norms(tensors: Sequence[Tensor], parameter: Tensor) -> Tensor:
    """The norm of each tensor, (n,); of the parts of divided ones, with a `parameter` divided alike, of the whole."""
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    if not isinstance(parameter, DTensor):
        return norms
    squares = norms.square()
    distributed.all_reduce(squares, group=parameter.device_mesh.get_group())
    return squares.sqrt()


def learning_rate(recipe: Recipe, epoch: int, progress: float = 0.0) -> float:
    """The learning rate at one moment of a run.

    Args:
        recipe: its peak, ends, lengths and schedule.
        epoch: from 0.
        progress: the part of the epoch that is done, from 0 to 1; for the schedules "step" and "constant".

    A linear warm-up from `warmup_lr`, then half a cosine from the peak to `min_lr`. The cosine counts from epoch 0, so
    that it meets the end of the warm-up a little below the peak: the authors' schedulers do not shift it.
    Source: DeiT, section 6; the scripts' quirks are named at `Recipe.schedule`.
    """
    time = float(epoch)
    if recipe.schedule == "epoch_delayed":
        time = max(time - 1, 0.0)
    elif recipe.schedule in ("step", "constant"):
        time += progress
    peak = recipe.peak_lr
    if time < recipe.warmup_epochs:
        return recipe.warmup_lr + time * (peak - recipe.warmup_lr) / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return peak
    if time >= recipe.epochs:
        return recipe.min_lr
    return recipe.min_lr + (peak - recipe.min_lr) * (1 + math.cos(math.pi * time / recipe.epochs)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group this rate, times the group's own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def clip_gradients(model: nn.Module, recipe: Recipe) -> None:
    """Limit the gradients, in place, by the recipe's rule."""
    if not recipe.clip_grad:
        return
    if recipe.clip_mode == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
    else:
        clip_adaptively(model.parameters(), recipe.clip_grad)


def clip_adaptively(parameters: Iterable[nn.Parameter], factor: float, *, eps: float = 1e-3) -> None:
    """Scale each unit's gradient, in place, to at most `factor` times the norm of the unit's weights.

    A unit is a row of a matrix, a filter of a convolution, or a vector as a whole; norms below `eps` count as `eps`.
    Source: Brock et al. 2021, section 4.1; LeViT trains with a factor of 0.01.
    """
    learned = [parameter for parameter in parameters if parameter.grad is not None]
    if not learned:
        return
    gradients = [_local(cast(Tensor, parameter.grad)) for parameter in learned]
    # the norms are small and many: one call for all of them, or a GPU would wait for the calls. Operations on lists of
    # tensors have no public names in torch; its optimisers use these, too
    scales = [_unit_norms(parameter.detach()) for parameter in learned]
    norms = [_unit_norms(cast(Tensor, parameter.grad)) for parameter in learned]
    torch._foreach_clamp_min_(scales, eps)
    torch._foreach_mul_(scales, factor)
    torch._foreach_clamp_min_(norms, 1e-6)
    torch._foreach_div_(scales, norms)
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(gradients, scales)


def _unit_norms(tensor: Tensor) -> Tensor:
    """The norm of each unit; of a divided tensor, of the units in this process. A vector has parts in all of them."""
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    norms = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norms.full_tensor() if dims is None and isinstance(norms, DTensor) else _local(norms)


def _local(tensor: Tensor) -> Tensor:
    """The part of a divided tensor that is in this process; every other tensor is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class WeightAverage(nn.Module):
    """Exponential moving average of a model's whole state: ema <- decay * ema + (1 - decay) * model.

    Floating-point parameters and buffers are averaged, in one call for each type; whole numbers are copied. The average
    starts as a copy of the model and moves from the first step on, as in the authors' scripts, so there is no counter.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards a model of the same structure, in place."""
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, theirs in zip(_local_state(self.module), _local_state(model), strict=True):
            averages, values = pairs.setdefault(mine.dtype, ([], []))
            averages.append(mine)
            values.append(theirs)
        for dtype, (averages, values) in pairs.items():
            if dtype.is_floating_point or dtype.is_complex:
                torch._foreach_lerp_(averages, values, 1 - self.decay)
            else:
                torch._foreach_copy_(averages, values)


def _local_state(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, without gradient; of divided ones the part of this process."""
    yield from map(_local, chain(model.parameters(), model.buffers()))
