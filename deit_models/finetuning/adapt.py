"""New heads and another input size for a trained model, and the part of it that learns in each mode."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..config import override
from ..errors import ConfigError, shown
from ..formats.layouts import known_origin
from ..models.layers import ImageClassifier
from ..registry import meta_model, own_model
from ..scoring.evaluation import class_names_of
from ..training.optim import layer_count, layer_of_parameter


def check_mode(mode: str, unfit: Iterable[str] = ()) -> None:
    """Raise ConfigError unless this is a mode of fine-tuning, and not "head" with options `unfit` for it."""
    if not isinstance(mode, str) or not re.fullmatch(r"full|head|attention|last-\d{1,4}", mode, re.ASCII):
        raise ConfigError(
            f"mode={shown(mode)}; expected 'full', 'head', 'attention', or 'last-N' with a number of blocks"
        )
    if mode == "head" and (names := " and ".join(unfit)):
        raise ConfigError(
            f"mode='head' learns from the labels alone, without {names}; use 'last-0', 'last-N' or 'full'"
        )


def trained_names(mode: str, model: ImageClassifier) -> set[str]:
    """Names of the parameters that learn in a mode.

    "full": everything. "last-N": the last N blocks, the final norm and the heads. "head": the heads alone. "attention":
    the attention of all blocks, the positions and the heads.

    Raises: ConfigError: an unknown mode, more blocks than the model has, or attention in a family without that name.
    Source: "attention": Touvron et al., Three things everyone should know about Vision Transformers, 2022, section 4.
    Differs from the authors' script: a distillation head learns, too, as it may be new.
    """
    check_mode(mode)
    names, last = [name for name, _ in model.named_parameters()], layer_count(model)
    if mode == "attention":
        if not any(_ATTENTION.search(name) for name in names):
            raise ConfigError(
                f"mode='attention': the parameters of {type(model).__name__} name no attention; use 'full'"
            )
        heads = set(model.head_names)
        return {n for n in names if _ATTENTION.search(n) or n == "pos_embed" or n.partition(".")[0] in heads}
    blocks = {"full": last, "head": 0}.get(mode, -1)
    if blocks < 0 and (blocks := int(mode.removeprefix("last-"))) >= last:
        raise ConfigError(f"mode={mode!r}: the model has {last - 1} blocks; 'full' trains everything")
    return {name for name in names if layer_of_parameter(model, name) >= last - blocks}


_ATTENTION = re.compile(r"\.attn\.")


@contextmanager
def only_trained(model: ImageClassifier, names: Set[str]) -> Iterator[None]:
    """Freeze all other parameters inside the `with` block; parameters that were fixed before stay fixed."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name] and name in names)
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
    """Fit a model to other classes, and perhaps another input size, in place; returns the model.

    Every head gets new weights. If the model has the same class names already, in any order, the heads keep their
    weights, with the rows in the new order. Parameters may become new objects: build the optimiser afterwards.

    Args:
        model: from `create_model` or `from_pretrained`.
        num_classes: logits of each head; may be left out with `class_names`.
        class_names: a name for each logit, kept in the model's config.json. Default: no names.
        img_size: another input size in pixels, one number or (height, width); positions are interpolated.
        warm_start: copy the rows of classes whose name the model has already. One of several synonyms is enough
            ("tench" matches ImageNet's "tench, Tinca tinca"); case, hyphens and underscores are ignored.

    Raises: ConfigError: names that do not fit the number, a name twice, no names to start warm from, an impossible
        size.
    """
    model = own_model(model)
    origin = known_origin(model)
    old_names, names = class_names_of(model), None if class_names is None else tuple(class_names)
    _check_names(names, num_classes)
    if warm_start and (names is None or old_names is None):
        raise ConfigError("warm_start goes by names: pass class_names, for a model that has class names")
    count = num_classes if names is None else len(names)
    if count is None and img_size is None:
        raise ConfigError("nothing to adapt to; pass num_classes, class_names or img_size")
    rows, old_count = _rows(old_names, names, warm_start=warm_start), model.num_classes
    changes: dict[str, Any] = {} if count is None else {"num_classes": count}
    if img_size is not None:
        changes["img_size"] = img_size
    _rebuild(model, changes, rows=rows, new_heads=count is not None)
    model.origin = origin.adapted(
        model.config.image_hw,
        class_names=origin.class_names if count is None else names,
        # with as many logits as before, or none, the old dataset would give new classes the names of the old ones
        dataset=None if not old_count or (count == old_count and len(rows) < old_count) else origin.dataset,
        new_heads=count is not None and not len(rows) == count == old_count,
    )
    return model


def _check_names(names: tuple[str, ...] | None, num_classes: int | None) -> None:
    if num_classes == 0:
        raise ConfigError(
            "num_classes=0 is not a whole number above 0; from_pretrained(..., num_classes=0) drops heads"
        )
    if names is None:
        return
    if num_classes not in (None, len(names)):
        raise ConfigError(f"num_classes={num_classes}, but {len(names)} class_names")
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"class_names has {name!r} twice; each logit needs a name of its own")


def _rows(old: Sequence[str] | None, new: Sequence[str] | None, *, warm_start: bool) -> dict[int, int]:
    """Number of each row of the new heads that is copied, to the number of the old row."""
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
    """Change the config in place and fit the tensors to it; new heads begin with `rows` of the old ones."""
    fresh = meta_model(type(model), override(model.config, changes))
    state = fresh.fit_state(model.state_dict(), model.config)
    if new_heads:
        fresh.reset_heads()
        state |= _new_heads(fresh, state, rows)
    fresh.load_state_dict(state, assign=True)
    some = next(model.parameters())
    fresh.to(device=some.device, dtype=some.dtype).train(model.training)
    model.config = fresh.config
    parts = (fresh.named_children(), fresh.named_parameters(recurse=False), fresh.named_buffers(recurse=False))
    for name, part in chain.from_iterable(parts):
        setattr(model, name, part)


@torch.no_grad()
def _new_heads(model: ImageClassifier, old: Mapping[str, Tensor], rows: dict[int, int]) -> dict[str, Tensor]:
    """Tensors of the heads, by name in the state dict.

    With `rows`, those rows of the linear layers come from the old heads; so does a BatchNorm before them, as in LeViT.
    """
    heads = {name: tensor for name, tensor in model.state_dict().items() if name.partition(".")[0] in model.head_names}
    targets, sources = list(rows), list(rows.values())
    for name, tensor in heads.items() if rows else ():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
            tensor[targets] = old[name][sources].to(tensor)
        else:
            tensor.copy_(old[name])
    return heads
