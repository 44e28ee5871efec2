"""Tensor names, every way: the authors' (native) and those of other libraries, read and written.

What a name is called elsewhere is the family's to say, see `families/`.
"""
# MERGED """T2T-ViT elsewhere: nowhere. Neither timm nor transformers has it, and its authors' names are the native ones."""
# MERGED """ViT-ResNAS elsewhere: nowhere. Neither timm nor transformers has it, and its authors' names are the native ones."""
# MERGED """The families whose layouts are known: one import and one entry each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .deit import DeiTLayouts
from .family import FamilyLayouts, Naming
from .levit import LeViTLayouts


class T2TViTLayouts(FamilyLayouts):
    """See the module docstring."""

    family = "t2t_vit"


class ViTResNASLayouts(FamilyLayouts):
    """See the module docstring."""

    family = "vit_resnas"


_LAYOUTS: tuple[FamilyLayouts, ...] = (DeiTLayouts(), LeViTLayouts(), T2TViTLayouts(), ViTResNASLayouts())
FAMILIES = {layouts.family: layouts for layouts in _LAYOUTS}


def layouts_of(family: str) -> FamilyLayouts:
    """The layouts of a family; of one that is registered at run time, the native one alone."""
    if family in FAMILIES:
        return FAMILIES[family]
    layouts = FamilyLayouts()
    layouts.family = family  # type: ignore[misc]
    return layouts


class Mapped(NamedTuple):
    """A file's tensors under native names, and what did not fit: the lists are in the file's own names.

    `uneven` tells of parts of one native tensor (query, key, value) that differ in shape.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    uneven: list[str]


def to_native(
    tensors: Mapping[str, Tensor],
    native_names: Iterable[str],
    *,
    family: str,
    config: Any,
    naming: Naming | None = None,
) -> Mapped:
    """Give a file's tensors their native names.

    Args:
        tensors: as read from the file.
        native_names: what the model needs.
        family: the model's family, which has its own tables.
        config: the model's config: some tables hang on depths, or on whether there is a distillation head.
        naming: how the file names them; told from the names if not given.

    Raises: CheckpointError: names of no known layout.
    """
    layouts = layouts_of(family)
    naming = naming or layouts.tell_naming(tensors)
    bare = {layouts.bare_name(name): name for name in tensors}
    if layouts.ignored is not None:
        bare = {short: name for short, name in bare.items() if not re.match(layouts.ignored, short)}
    native: dict[str, Tensor] = {}
    missing: list[str] = []
    uneven: list[str] = []
    for name in native_names:
        parts = layouts.other_names(name, naming, config)
        absent = [part for part in parts if part not in bare]
        missing += absent
        found = [tensors[bare[part]] for part in parts if part in bare]
        if len({tensor.shape for tensor in found}) > 1:
            uneven.append(", ".join(f"{bare[part]} is {tuple(tensors[bare[part]].shape)}" for part in parts))
        elif not absent:
            native[name] = layouts.read_tensor(name, found[0] if len(found) == 1 else torch.cat(found))
        for part in parts:
            bare.pop(part, None)
    return Mapped(native, missing, sorted(bare.values()), uneven)


def from_native(tensors: Mapping[str, Tensor], *, family: str, config: Any, naming: Naming) -> dict[str, Tensor]:
    """Give native tensors another layout's names; the inverse of `to_native`.

    Args:
        tensors: a model's state dict.
        family: the model's family.
        config: the model's config.
        naming: the wanted names.

    Raises: ConfigError: the family has no such layout.
    """
    layouts = layouts_of(family)
    body = layouts.body_prefix(naming, config)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = layouts.write_tensor(name, tensor, naming)
        parts = layouts.other_names(name, naming, config)
        rows = tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,)
        for part, values in zip(parts, rows, strict=True):
            prefix = body if layouts.bare_name(body + part) == part else ""
            renamed[prefix + part] = values.contiguous()
    return renamed
