"""A family in other libraries: tensor names and config.json. Each family overrides where they differ from native."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import Layout, Origin, load_manifest
from ..errors import CheckpointError, ConfigError
from ..registry import model_spec

Naming = Literal["native", "timm", "timm-conv", "transformers", "transformers-5"]
"""Tensor names of a file. Published transformers files keep the classic names; "transformers-5" are the names of
transformers' own modules since version 5, which some tools save as they are. "timm-conv" are timm's names with 1x1
convolutions in the place of linear layers."""

# Libraries whose names are not read, by the start of some tensor's name behind any prefix.
_FOREIGN = {
    r"(?:.*\.)?layers\.0\.(?:ln1|ffn\.)": "mmpretrain",
    r"(?:.*\.)?encoder\.layers\.encoder_layer_0\.": "torchvision",
    r"(?:.*\.)?transformer\.resblocks\.0\.": "open_clip",
    r"(?:.*\.)?Transformer/encoderblock_0": "JAX",
}
_COUNTER_BESIDE = ("num_batches_tracked", "running_var")
# What a counter of operations (thop) leaves in each module.
_COUNTERS = re.compile(r"(?:.*\.)?total_(?:ops|params)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The model to build for a weights file, and the facts about its weights.

    `layout` is None for a bare weights file, of which only the model's name is known. `backbone`: the config promises
    no classifier, so that the file may be without heads. `new_heads`: the reason why the file's heads cannot be used.
    """

    config: Any
    origin: Origin
    family: str
    layout: Layout | None = None
    backbone: bool = False
    new_heads: str | None = None


class Mapped(NamedTuple):
    """A file's tensors under native names, and what did not fit: the lists are in the file's own names.

    `uneven` lists parts of one native tensor (query, key, value) that differ in shape.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    uneven: list[str]


class FamilyLayouts:
    """The layouts of one family beside the native one; stateless. This base class is a family without others.

    Attributes:
        family: name of the file under `models/`.
        signs: for each naming, a pattern that matches the start of some tensor's name in this naming alone; the first
            that is found tells a file's naming. Empty: every file is native.
        body: matches the prefix under which transformers puts the body; it is taken off before names are looked up.
        ignored: matches names (without prefix) that are in published files and in no model.
        timm_options: fields of the config that timm's class takes, under the same name or that of `timm_names`.
        timm_names: timm's names of options that are called otherwise here, by our names.
        timm_ignored: options of timm's class that change no weight and no output in eval mode.
        timm_fixed: options of timm's class that have one value here, and that value.
        model_types: transformers' `model_type`s of this family.
    """

    signs: ClassVar[Mapping[Naming, str]] = {}
    body: ClassVar[str | None] = None
    ignored: ClassVar[str | None] = None
    timm_options: ClassVar[tuple[str, ...]] = ()
    timm_names: ClassVar[Mapping[str, str]] = {}
    timm_ignored: ClassVar[frozenset[str]] = frozenset({"drop_rate", "drop_path_rate", "num_classes"})
    timm_fixed: ClassVar[Mapping[str, Any]] = {}
    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, family: str) -> None:
        self.family = family

    # Tensors

    def to_native(
        self, tensors: Mapping[str, Tensor], native_names: Iterable[str], *, config: Any, naming: Naming | None = None
    ) -> Mapped:
        """Give a file's tensors their native names.

        Args:
            tensors: as read from the file.
            native_names: the names of the model's tensors.
            config: the model's config: some names depend on depths, or on whether there is a distillation head.
            naming: the file's tensor names; told from the names if not given.

        Raises: CheckpointError: names of no known layout, two names of one tensor, or parts of one tensor of two kinds.
        """
        naming = naming or self.tell_naming(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if not _COUNTERS.fullmatch(name)}
        bare = {self._bare_name(name): name for name in tensors}
        if len(bare) < len(tensors):
            twice = next(name for name in tensors if bare[self._bare_name(name)] != name)
            raise CheckpointError(f"{twice!a} and {bare[self._bare_name(twice)]!a} are two names of one tensor")
        if self.ignored is not None:
            bare = {short: name for short, name in bare.items() if not re.match(self.ignored, short)}
        native: dict[str, Tensor] = {}
        missing: list[str] = []
        uneven: list[str] = []
        for name in native_names:
            parts = (name,) if naming == "native" else self.other_names(name, naming, config)
            absent = [part for part in parts if part not in bare]
            missing += absent
            found = [tensors[bare[part]] for part in parts if part in bare]
            if len({tensor.shape for tensor in found}) > 1:
                uneven.append(", ".join(f"{bare[part]} is {tuple(tensors[bare[part]].shape)}" for part in parts))
            elif len({tensor.is_floating_point() for tensor in found}) > 1:  # a concatenation would convert them
                odd = next(part for part in parts if not tensors[bare[part]].is_floating_point())
                raise CheckpointError(f"{bare[odd]} is {tensors[bare[odd]].dtype}, not floating point")
            elif name.endswith("num_batches_tracked") and (found or name.replace(*_COUNTER_BESIDE) in native):
                # torch, too, does without it; eval mode never uses it
                missing = missing[: len(missing) - len(absent)]
                native[name] = found[0].reshape(()) if found and found[0].numel() == 1 else [*found, torch.tensor(0)][0]
            elif not absent:
                tensor = found[0] if len(found) == 1 else torch.cat(found)
                native[name] = tensor if naming == "native" else self.read_tensor(name, tensor)
            for part in parts:
                bare.pop(part, None)
        return Mapped(native, missing, sorted(bare.values()), uneven)

    def from_native(self, tensors: Mapping[str, Tensor], *, config: Any, naming: Naming) -> dict[str, Tensor]:
        """Give a model's tensors another layout's names; the inverse of `to_native`.

        Raises: ConfigError: the family has no such layout.
        """
        if naming == "native":
            return {name: tensor.contiguous() for name, tensor in tensors.items()}
        body = self.body_prefix(config) if naming.startswith("transformers") else ""
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            tensor = self.write_tensor(name, tensor, naming)
            parts = self.other_names(name, naming, config)
            for part, values in zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True):
                prefix = body if self._bare_name(body + part) == part else ""
                renamed[prefix + part] = values.contiguous()
        return renamed

    def tell_naming(self, names: Collection[str]) -> Naming:
        """The naming of a file, told from its tensor names. Raises: CheckpointError: none of the known ones."""
        bare = {self._bare_name(name) for name in names}
        for naming, sign in self.signs.items():
            if any(re.match(sign, name) for name in bare):
                return naming
        if not self.signs:
            return "native"
        library = next((found for sign, found in _FOREIGN.items() if any(re.match(sign, name) for name in names)), None)
        known = f"tensor names of {library}; give them those of timm" if library else "unknown tensor names"
        raise CheckpointError(f"{known}, such as {', '.join(sorted(names)[:3]) or 'none at all'}")

    def read_heads(self, names: Collection[str], config: Any, *, bare: bool) -> Any:
        """The config with the tokens and heads that a file has by its tensor names, `bare` if it has no config."""
        del names, bare
        return config

    def _bare_name(self, name: str) -> str:
        """A tensor's name without the prefix of the body."""
        return name if self.body is None else re.sub(f"^(?:{self.body})", "", name)

    def body_prefix(self, config: Any) -> str:
        """Prefix of all names outside the heads in transformers."""
        del config
        return ""

    def other_names(self, name: str, naming: Naming, config: Any) -> tuple[str, ...]:
        """Names of a native tensor in another naming, without prefix; with several, its rows are divided among them.

        Raises: CheckpointError: the naming has no place for it.
        """
        del naming, config
        return (name,)

    def read_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A file's tensor in the native shape; `name` is the native one."""
        del name
        return tensor

    def write_tensor(self, name: str, tensor: Tensor, naming: Naming) -> Tensor:
        """A native tensor in the shape of a naming; the inverse of `read_tensor`. `name` is the native one."""
        del name
        if naming == "timm-conv":
            raise ConfigError(f"{self.family} has no layout 'timm-conv'; use 'timm'")
        return tensor

    # config.json of timm

    def from_timm_name(self, architecture: str, tag: str | None) -> str:
        """The registered name that corresponds to timm's; the manifest may lack it."""
        del tag
        return architecture

    def timm_shape(self, architecture: str) -> Mapping[str, Any]:
        """Options of an architecture of timm's whose `from_timm_name` may have another shape; else none."""
        del architecture
        return {}

    def write_timm(self, name: str, config: Any) -> tuple[str, dict[str, Any]]:
        """The model of timm's to start from; `num_features`, `pool_size`, `first_conv`, `classifier` of the shape.

        The options that differ from that model's are written besides. `name` is the nearest registered model.
        Raises: ConfigError: timm has no such model.
        """
        del config
        raise ConfigError(f"timm has no model like {name}; save it with layout='native'")

    # config.json of transformers

    def read_transformers(self, data: Mapping[str, Any]) -> Any:
        """The config described by a transformers config.json of one of the `model_types`; without `num_classes`.

        Raises: ConfigError: values this package cannot build. LookupError, TypeError, ValueError: missing or misused
            fields, which the caller turns into one message.
        """
        raise NotImplementedError(f"{self.family} has no model_types")

    def write_transformers(self, config: Any) -> dict[str, Any]:
        """Fields of a transformers config.json for the model's config.

        Raises: ConfigError: transformers cannot build such a model.
        """
        del config
        raise ConfigError(f"transformers has no {self.family} models; save it with layout='native'")


# Values of config.json


def nearest_registered(config: Any, family: str) -> str | None:
    """The registered model of the same shape; number of classes, size and epsilon may differ.

    Of several, one that has a head where the config has one, and of the same size, comes first.
    """
    ignored = {
        *("img_size", "num_classes", "norm_eps", "drop_rate", "drop_path_rate", "patch_drop_rate", "dynamic_img_size"),
    }

    def shape(candidate: Any) -> list[Any]:
        values = [getattr(candidate, field.name) for field in fields(candidate) if field.name not in ignored]
        return [True if value == "token" else value for value in values]  # a DeiT with one head less

    def difference(candidate: Any) -> tuple[bool, bool]:
        return bool(candidate.num_classes) != bool(config.num_classes), candidate.image_hw != config.image_hw

    configs = {name: model_spec(name).config for name, info in load_manifest().items() if info.family == family}
    names = [name for name, candidate in configs.items() if shape(candidate) == shape(config)]
    return min(names, key=lambda name: difference(configs[name]), default=None)


def read_class_names(id2label: Any) -> tuple[str, ...] | None:
    """Names in the order of the logits; None where there are none, or only placeholders."""
    if not id2label:
        return None
    by_index = {int(index): str(name) for index, name in id2label.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise CheckpointError(f"config.json names classes {min(by_index)} to {max(by_index)} with gaps")
    names = tuple(by_index[index] for index in range(len(by_index)))
    return None if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def write_class_names(names: tuple[str, ...]) -> dict[str, str]:
    """The inverse of `read_class_names`; JSON has no other keys than strings."""
    return {str(index): name for index, name in enumerate(names)}
