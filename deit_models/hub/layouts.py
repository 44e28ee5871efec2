"""Tensor names, every way: the authors' (native) and those of other libraries, read and written.

What a name is called elsewhere is the family's to say, see `families/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .families import layouts_of
from .families.contract import Naming


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
