"""New heads for other classes, and positions for another size, on a model that is trained already."""
# MERGED """Which part of a model learns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..config import override
from ..errors import ConfigError
from ..hub.weights import meta_model
from ..models.layers import ImageClassifier
from ..predict import class_names_of

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


def adapt_head(
    model: ImageClassifier,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    img_size: int | tuple[int, int] | None = None,
    warm_start: bool = False,
) -> ImageClassifier:
    """Fit a model to other classes, and perhaps another input size, in place; gives the model.

    Both heads of a distilled model are made anew. Where the model has the very same class names already, in whatever
    order, its heads are kept, their rows in the new order. All parameters may become new objects: build an optimiser
    afterwards.

    Args:
        model: from `create_model` or `from_pretrained`.
        num_classes: logits of each head; may be left out with `class_names`.
        class_names: a name for each logit, kept in the model's config.json. Default: none, with `num_classes` given.
        img_size: another input size in pixels, one number or (height, width); positions are interpolated.
        warm_start: begin the row of a class with that of the model's class of the same name. One of the synonyms is
            enough ("tench" meets ImageNet's "tench, Tinca tinca"); case, hyphens and underscores do not count.

    Raises: ConfigError: names and number that do not fit together, names twice, nothing known to start warm from, an
        impossible size.
    """
    origin = model.origin
    if origin is None:
        raise ConfigError("this model has no origin; build it with create_model or load it with from_pretrained")
    old_names, names = class_names_of(model), None if class_names is None else tuple(class_names)
    _check_names(names, num_classes)
    if warm_start and (names is None or old_names is None):
        raise ConfigError("warm_start goes by names: pass class_names, for a model that knows the names of its classes")
    count = num_classes if names is None else len(names)
    if count is None and img_size is None:
        raise ConfigError("nothing to adapt to; pass num_classes, class_names or img_size")
    rows, old_count = _rows(old_names, names, warm_start=warm_start), model.num_classes
    changes: dict[str, Any] = {} if count is None else {"num_classes": count}
    if img_size is not None:
        changes["img_size"] = img_size
    _rebuild(model, changes, rows=rows, new_heads=count is not None)
    model.origin = origin.adapted(
        origin.preprocessing.at_size(model.config.image_hw),
        class_names=origin.class_names if count is None else names,
        # as many logits that mean something else: by its dataset they would be taken for those of the old classes
        dataset=None if count == old_count and len(rows) < old_count else origin.dataset,
    )
    return model


def _check_names(names: tuple[str, ...] | None, num_classes: int | None) -> None:
    if names is None:
        return
    if num_classes not in (None, len(names)):
        raise ConfigError(f"num_classes={num_classes}, but {len(names)} class_names")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ConfigError(f"class_names has {twice!r} twice; each logit needs a name of its own")


def _rows(old: Sequence[str] | None, new: Sequence[str] | None, *, warm_start: bool) -> dict[int, int]:
    """Which row of the new heads begins as which row of the old ones."""
    if old is None or new is None:
        return {}
    if len(set(old)) == len(old) and set(old) == set(new):
        place = {name: number for number, name in enumerate(old)}
        return {number: place[name] for number, name in enumerate(new)}
    if not warm_start:
        return {}
    spelt: dict[str, int] = {}
    for number, name in enumerate(old):
        for synonym in (name, *name.split(",")):
            spelt.setdefault(_plain(synonym), number)
    return {number: spelt[_plain(name)] for number, name in enumerate(new) if _plain(name) in spelt}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _rebuild(model: ImageClassifier, changes: dict[str, Any], *, rows: dict[int, int], new_heads: bool) -> None:
    """In place: the config with `changes`, the tensors fitted to it, and heads that begin with `rows` of the old."""
    before = model.config
    fresh = meta_model(type(model), override(before, changes))
    state = fresh.fit_state(model.state_dict(), before)
    heads = {name: tensor for name, tensor in state.items() if name.partition(".")[0] in model.head_names}
    if new_heads:
        state = {name: tensor for name, tensor in state.items() if name not in heads}
    fresh.load_state_dict(state, strict=not new_heads, assign=True)
    if new_heads:
        fresh.reset_heads()
    some = next(model.parameters())
    fresh.to(device=some.device, dtype=some.dtype).train(model.training)
    if new_heads:
        _copy_rows(fresh, heads, rows)
    model.config = fresh.config
    # a module's contents are these three tables; the model itself stays the object that its owner holds
    model._modules, model._parameters, model._buffers = fresh._modules, fresh._parameters, fresh._buffers


@torch.no_grad()
def _copy_rows(model: ImageClassifier, old: dict[str, torch.Tensor], rows: dict[int, int]) -> None:
    if rows:
        targets = torch.tensor(list(rows))
        sources = torch.tensor(list(rows.values()))
        state = model.state_dict()
        for name, tensor in old.items():
            state[name][targets] = tensor[sources].to(state[name])
