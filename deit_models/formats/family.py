"""What the hub asks of a family: how other libraries name its tensors, and what they write into its config.json.

A family overrides what it has; what it leaves alone means that only its authors publish it, under the native names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from ..errors import CheckpointError, ConfigError

Naming = Literal["native", "timm", "timm-conv", "transformers", "transformers-5"]
"""How a file names its tensors. Published transformers files keep the classic names; "transformers-5" are the names of
transformers' own modules since version 5, which some tools save as they are. "timm-conv" are timm's names with 1x1
convolutions in the place of linear layers."""


class Rule(NamedTuple):
    """One line of a table of names: `{i}` stands for a block index, `{w}` for weight or bias.

    Where there are several others, the native tensor is their concatenation along the rows: DeiT's authors fuse query,
    key and value, transformers keeps them apart.
    """

    native: str
    others: tuple[str, ...]


class FamilyLayouts:
    """The layouts of one family beside the native one; stateless.

    Attributes:
        family: name of the file under `models/`.
        signs: for each naming, a pattern that the start of some tensor's name has in this naming alone; the first that
            is found tells a file's naming. Empty: every file is native.
        body: matches the prefix under which transformers puts the body; it is taken off before names are looked up.
        ignored: matches names (without prefix) that are in published files and in no model.
        timm_options: fields of the config that timm's class takes under the same name.
        timm_ignored: options of timm's class that change no weight and no output in eval mode.
        timm_fixed: options of timm's class that have one value here, and that value.
        model_types: transformers' `model_type`s that are of this family.
    """

    family: ClassVar[str]
    signs: ClassVar[Mapping[Naming, str]] = {}
    body: ClassVar[str | None] = None
    ignored: ClassVar[str | None] = None
    timm_options: ClassVar[tuple[str, ...]] = ()
    timm_ignored: ClassVar[frozenset[str]] = frozenset({"drop_rate", "drop_path_rate", "num_classes"})
    timm_fixed: ClassVar[Mapping[str, Any]] = {}
    model_types: ClassVar[tuple[str, ...]] = ()

    # Tensors

    def tell_naming(self, names: Collection[str]) -> Naming:
        """How a file names its tensors, told from the names alone.

        Raises: CheckpointError: none of the known ways.
        """
        bare = {self.bare_name(name) for name in names}
        for naming, sign in self.signs.items():
            if any(re.match(sign, name) for name in bare):
                return naming
        if not self.signs:
            return "native"
        raise CheckpointError(f"unknown tensor names, such as {', '.join(sorted(names)[:3]) or 'none at all'}")

    def bare_name(self, name: str) -> str:
        """A tensor's name without the prefix of the body."""
        return name if self.body is None else re.sub(f"^(?:{self.body})", "", name)

    def body_prefix(self, naming: Naming, config: Any) -> str:
        """What is put before every name outside the heads."""
        del naming, config
        return ""

    def rules(self, naming: Naming, config: Any) -> tuple[Rule, ...] | None:
        """The table of a naming for a model of this config; None where the names are the native ones."""
        del naming, config
        return None

    def other_names(self, name: str, naming: Naming, config: Any) -> tuple[str, ...]:
        """The names that hold a native tensor in another naming, without prefix.

        Raises: CheckpointError: the naming has no place for it.
        """
        table = self.rules(naming, config)
        if table is None:
            return (name,)
        for rule in table:
            if match := _pattern(rule.native).fullmatch(name):
                return tuple(other.format(**match.groupdict()) for other in rule.others)
        raise CheckpointError(f"the {naming} layout of {self.family} has no name for {name}")

    def read_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A file's tensor in the native shape; `name` is the native one."""
        del name
        return tensor

    def write_tensor(self, name: str, tensor: Tensor, naming: Naming) -> Tensor:
        """A native tensor in the shape a naming gives it; the inverse of `read_tensor`. `name` is the native one."""
        del name
        if naming == "timm-conv":
            raise ConfigError(f"{self.family} has no layout 'timm-conv'; use 'timm'")
        return tensor

    # config.json of timm

    def from_timm_name(self, architecture: str, tag: str | None) -> str:
        """The registered name that may go with timm's; whether there is such a model is asked of the manifest."""
        del tag
        return architecture

    def timm_architecture(self, name: str, config: Any) -> str:
        """Name of the model timm builds this config from, given the `timm_options` that differ from the registered one.

        Args:
            name: the registered model that the weights are a variant of.
            config: theirs.

        Raises: ConfigError: timm has no such model.
        """
        del config
        raise ConfigError(f"timm has no model like {name}; save it with layout='native'")

    def timm_facts(self, config: Any) -> dict[str, Any]:
        """What timm's config.json says of the shape: `num_features`, and `pool_size`, `first_conv` and `classifier`."""
        del config
        return {}

    # config.json of transformers

    def read_transformers(self, data: Mapping[str, Any]) -> Any:
        """The config a transformers config.json describes, whose classes are counted elsewhere.

        Raises: ConfigError: values this package cannot build. LookupError, TypeError, ValueError: missing or misused
            fields, which the caller turns into one message.
        """
        raise ConfigError(f"config.json is of model_type {data['model_type']!r}, which {self.family} cannot read")

    def write_transformers(self, config: Any) -> dict[str, Any]:
        """The fields of a transformers config.json that describe the model.

        Raises: ConfigError: transformers cannot build such a model.
        """
        del config
        raise ConfigError(f"transformers has no {self.family} models; save it with layout='native'")


@cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{w\}", r"(?P<w>weight|bias)"))
