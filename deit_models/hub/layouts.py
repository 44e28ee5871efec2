"""Tensor names, three ways: the authors' (native), timm's and transformers', read and written.

A rule ties one native name to the names that hold the same numbers elsewhere. Where there are several, the native
tensor is their concatenation along the rows: the authors fuse query, key and value, transformers keeps them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

Naming = Literal["native", "timm", "transformers", "transformers-5"]
"""How a file names its tensors. Published transformers files keep the classic names; "transformers-5" are the names of
transformers' own modules since version 5, which some tools save as they are."""


class Rule(NamedTuple):
    """One line of a table: `{i}` stands for a block index, `{w}` for weight or bias."""

    native: str
    others: tuple[str, ...]


_DEIT_OUTER = (
    Rule("cls_token", ("embeddings.cls_token",)),
    Rule("dist_token", ("embeddings.distillation_token",)),
    Rule("pos_embed", ("embeddings.position_embeddings",)),
    Rule("patch_embed.proj.{w}", ("embeddings.patch_embeddings.projection.{w}",)),
    Rule("norm.{w}", ("layernorm.{w}",)),
)
_DEIT_CLASSIC = (
    *_DEIT_OUTER,
    Rule("blocks.{i}.norm1.{w}", ("encoder.layer.{i}.layernorm_before.{w}",)),
    Rule(
        "blocks.{i}.attn.qkv.{w}",
        tuple(f"encoder.layer.{{i}}.attention.attention.{part}.{{w}}" for part in ("query", "key", "value")),
    ),
    Rule("blocks.{i}.attn.proj.{w}", ("encoder.layer.{i}.attention.output.dense.{w}",)),
    Rule("blocks.{i}.norm2.{w}", ("encoder.layer.{i}.layernorm_after.{w}",)),
    Rule("blocks.{i}.mlp.fc1.{w}", ("encoder.layer.{i}.intermediate.dense.{w}",)),
    Rule("blocks.{i}.mlp.fc2.{w}", ("encoder.layer.{i}.output.dense.{w}",)),
)
_DEIT_V5 = (
    *_DEIT_OUTER,
    Rule("blocks.{i}.norm1.{w}", ("layers.{i}.layernorm_before.{w}",)),
    Rule("blocks.{i}.attn.qkv.{w}", tuple(f"layers.{{i}}.attention.{part}_proj.{{w}}" for part in "qkv")),
    Rule("blocks.{i}.attn.proj.{w}", ("layers.{i}.attention.o_proj.{w}",)),
    Rule("blocks.{i}.norm2.{w}", ("layers.{i}.layernorm_after.{w}",)),
    Rule("blocks.{i}.mlp.fc1.{w}", ("layers.{i}.mlp.fc1.{w}",)),
    Rule("blocks.{i}.mlp.fc2.{w}", ("layers.{i}.mlp.fc2.{w}",)),
)
_PLAIN_HEAD = (Rule("head.{w}", ("classifier.{w}",)),)
_BOTH_HEADS = (Rule("head.{w}", ("cls_classifier.{w}",)), Rule("head_dist.{w}", ("distillation_classifier.{w}",)))

# Keyed by (family, naming, distilled). A missing key means the native names.
_TABLES: dict[tuple[str, Naming, bool], tuple[Rule, ...]] = {
    ("deit", "transformers", False): _DEIT_CLASSIC + _PLAIN_HEAD,
    ("deit", "transformers", True): _DEIT_CLASSIC + _BOTH_HEADS,
    ("deit", "transformers-5", False): _DEIT_V5 + _PLAIN_HEAD,
    ("deit", "transformers-5", True): _DEIT_V5 + _BOTH_HEADS,
}

# transformers puts the body under the model type and leaves the heads bare.
_BODY_PREFIX = re.compile(r"^(?:vit|deit)\.(?=embeddings\.|encoder\.|layers\.|layernorm\.|pooler\.)")
# Parameters of a feature extractor that a classifier never uses.
_IGNORED = re.compile(r"^pooler\.")


class Mapped(NamedTuple):
    """A file's tensors under native names, and what did not fit: the lists are in the file's own names.

    `uneven` tells of parts of one native tensor (query, key, value) that differ in shape.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    uneven: list[str]


def tell_naming(names: Collection[str]) -> Naming:
    """How a file names its tensors, told from the names alone (timm's DeiT names are the native ones).

    Raises: CheckpointError: none of the known ways.
    """
    bare = {_BODY_PREFIX.sub("", name) for name in names}
    if "patch_embed.proj.weight" in bare:
        return "native"
    if "embeddings.cls_token" in bare:
        return "transformers" if any(name.startswith("encoder.layer.") for name in bare) else "transformers-5"
    raise CheckpointError(f"unknown tensor names, such as {', '.join(sorted(names)[:3]) or 'none at all'}")


def to_native(
    tensors: Mapping[str, Tensor], native_names: Iterable[str], *, family: str, naming: Naming, distilled: bool
) -> Mapped:
    """Give a file's tensors their native names.

    Args:
        tensors: as read from the file.
        native_names: what the model needs.
        family: the model's family, which has its own tables.
        naming: from `tell_naming`.
        distilled: whether the model has a distillation head; transformers names the class head after that.
    """
    bare = {_BODY_PREFIX.sub("", name): name for name in tensors if not _IGNORED.match(_BODY_PREFIX.sub("", name))}
    native: dict[str, Tensor] = {}
    missing: list[str] = []
    uneven: list[str] = []
    for name in native_names:
        parts = other_names(name, family=family, naming=naming, distilled=distilled)
        absent = [part for part in parts if part not in bare]
        missing += absent
        found = [tensors[bare[part]] for part in parts if part in bare]
        if len({tensor.shape for tensor in found}) > 1:
            uneven.append(", ".join(f"{bare[part]} is {tuple(tensors[bare[part]].shape)}" for part in parts))
        elif not absent:
            native[name] = found[0] if len(found) == 1 else torch.cat(found)
        for part in parts:
            bare.pop(part, None)
    return Mapped(native, missing, sorted(bare.values()), uneven)


def from_native(
    tensors: Mapping[str, Tensor], *, family: str, naming: Naming, distilled: bool, body_prefix: str = ""
) -> dict[str, Tensor]:
    """Give native tensors another layout's names; the inverse of `to_native`.

    Args:
        tensors: a model's state dict.
        family: the model's family.
        naming: the wanted names.
        distilled: whether the model has a distillation head.
        body_prefix: put before every name outside the heads, e.g. "vit." for transformers.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = other_names(name, family=family, naming=naming, distilled=distilled)
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            prefix = body_prefix if _BODY_PREFIX.match(body_prefix + part) else ""
            renamed[prefix + part] = rows.contiguous()
    return renamed


def other_names(name: str, *, family: str, naming: Naming, distilled: bool) -> tuple[str, ...]:
    """The names that hold a native tensor in another layout, without prefix.

    Raises: CheckpointError: the layout has no place for it.
    """
    table = _TABLES.get((family, naming, distilled))
    if table is None:
        return (name,)
    for rule in table:
        if match := _pattern(rule.native).fullmatch(name):
            return tuple(other.format(**match.groupdict()) for other in rule.others)
    raise CheckpointError(f"the {naming} layout of {family} has no name for {name}")


@cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{w\}", r"(?P<w>weight|bias)"))
