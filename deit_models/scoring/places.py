"""Logits of a classifier at each place of an image, instead of one set of logits for the image.

Source: Jiang et al., All Tokens Matter, 2021, section 3.2; for convnets Yun et al., Re-labeling ImageNet, 2021: the
linear layer is applied to each place of the last map, instead of to the mean over all places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ..errors import ConfigError
from ..models.layers import ImageClassifier

_SAME = 0.02
"""Difference of equal numbers as a part of the largest, at most; bfloat16 keeps three digits."""


class Pooling(NamedTuple):
    """The end of a convnet: the module that gives the map, over whose places a mean or maximum `linear` reads."""

    source: nn.Module
    linear: nn.Linear


def logits_of_places(network: Any, run: Callable[[Tensor], Any], images: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives the logits at each place of a batch, as a map: (B, C, H, W) -> (B, K, h, w).

    Of models of this package: at each patch, see `ImageClassifier.classify_patches`. Of convnets that end in the mean
    or the maximum over the places of a map and a linear layer: of this layer at each place. The layers are found by
    calling `run`, which calls the network, on some `images` that are not of one colour.

    Raises: ConfigError: another network.
    """
    if isinstance(network, ImageClassifier):
        return lambda x: _of_patches(network, x)
    pooling = find_pooling(network, run, images) if isinstance(network, nn.Module) else None
    if pooling is None:
        raise ConfigError(
            f"{type(network).__name__} gives no logits for places of an image of {images.shape[2]}x{images.shape[3]} "
            "pixels; expected a model of this package, or a convnet that ends in the mean or maximum over a map and a "
            "linear layer, such as torchvision's ResNet (a map of one place grows with img_size, --img-size)"
        )
    return lambda x: _of_cells(network, pooling, x)


def find_pooling(network: nn.Module, run: Callable[[Tensor], Any], images: Tensor) -> Pooling | None:
    """The end of a convnet, by a call of `run` on some images; None: it is built otherwise."""
    newest: list[tuple[nn.Module, Tensor]] = []
    found: list[Pooling] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            newest[:] = [(module, output.detach())]

    def look(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        for module, cells in newest:
            for pooled in (cells.mean(dim=(2, 3)), cells.amax(dim=(2, 3))):
                if pooled.shape == inputs[0].shape and (pooled - inputs[0]).abs().max() <= _SAME * pooled.abs().max():
                    found.append(Pooling(module, linear))

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    linears = (module for module in network.modules() if isinstance(module, nn.Linear))
    hooks += [linear.register_forward_pre_hook(look) for linear in linears]
    try:
        run(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1] if found else None


def _of_patches(model: ImageClassifier, x: Tensor) -> Tensor:
    height, width = model.level_grid(x, len(model.feature_levels) - 1)
    return model.classify_patches(model.forward_features(x)).mT.reshape(len(x), -1, height, width)


def _of_cells(network: nn.Module, pooling: Pooling, x: Tensor) -> Tensor:
    """The linear layer, and what follows it, get each place as an image of its own."""
    maps: list[Tensor] = []
    hooks = [
        pooling.source.register_forward_hook(lambda _, __, cells: maps.append(cells)),
        pooling.linear.register_forward_pre_hook(lambda _, __: (maps[-1].permute(0, 2, 3, 1).flatten(0, 2),)),
    ]
    try:
        output = network(x)
    finally:
        for hook in hooks:
            hook.remove()
    logits = cast(Tensor, getattr(output, "logits", output))
    return logits.reshape(len(x), *maps[-1].shape[2:], -1).permute(0, 3, 1, 2)
