"""Which part of a model learns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ConfigError
from ..models.layers import ImageClassifier

_LAST = re.compile(r"last-(\d+)")


def first_trained_layer(mode: str, model: ImageClassifier) -> int:
    """The lowest layer, as `model.layer_of` counts them, that learns in a mode.

    "full": all. "last-N": the last N blocks, the final norm and the heads; "last-0" trains the heads and the norm
    before them alone, with augmentation. "head": the heads and nothing else, see `finetune`.

    Raises: ConfigError: an unknown mode, or more blocks than there are.
    """
    if mode == "full":
        return 0
    if mode == "head":
        return model.num_layers
    match = _LAST.fullmatch(mode)
    if match is None:
        raise ConfigError(f"mode={mode!r}; expected 'full', 'head', or 'last-N' with a number of blocks")
    blocks = int(match[1])
    if blocks >= model.num_layers:
        raise ConfigError(f"mode={mode!r}: the model has {model.num_layers - 1} blocks; 'full' trains everything")
    return model.num_layers - blocks


@contextmanager
def only_from_layer(model: ImageClassifier, layer: int) -> Iterator[None]:
    """Freeze everything below a layer for a while."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            # what the model keeps fixed, as T2T-ViT its positions, stays so
            parameter.requires_grad_(before[name] and model.layer_of(name) >= layer)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))
