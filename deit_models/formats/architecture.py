"""A model that is in no list: its architecture as a TOML file, which `create_model` takes in the place of a name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..checkpoint import Preprocessing
from ..errors import ConfigError
from ..files import _is_tables, _table, toml_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
SUFFIX = ".toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model written down: enough to build it with random weights, and to prepare its input.

    Attributes:
        name: what it is called in model cards.
        family: file under `models/` that builds it.
        settings: fields of the family's config.
        preprocessing: its evaluation transform; None: that of DeiT at its size.
    """

    name: str
    family: str
    settings: Mapping[str, Any]
    preprocessing: Preprocessing | None = None

    def to_toml(self) -> str:
        """The file's text, which `read_architecture` reads."""
        tables = [f"architecture = {FORMAT}\n{toml_lines({'name': self.name, 'family': self.family})}"]
        plain = {key: value for key, value in self.settings.items() if not _is_tables(value)}
        tables.append(f"[settings]\n{toml_lines(plain)}")
        for key, value in self.settings.items():
            if _is_tables(value):
                tables += [f"[[settings.{key}]]\n{toml_lines(_table(entry))}" for entry in value]
        if self.preprocessing is not None:
            tables.append(f"[preprocessing]\n{toml_lines(self.preprocessing.to_dict())}")
        return "\n".join(tables)


def read_architecture(path: str | PathLike[str]) -> Architecture:
    """An architecture from its file.

    Raises: ConfigError: no such file, not TOML, or not an architecture.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("architecture") != FORMAT:
            raise ConfigError(f"it has no line `architecture = {FORMAT}`")
        known = {"architecture", "name", "family", "settings", "preprocessing"}
        if not {"name", "family", "settings"} <= set(data) <= known:
            raise ConfigError(f"it has {', '.join(sorted(data))}; expected {', '.join(sorted(known))}")
        spec = data.get("preprocessing")
        return Architecture(
            name=str(data["name"]),
            family=str(data["family"]),
            settings=data["settings"],
            preprocessing=None if spec is None else Preprocessing.from_dict(spec),
        )
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, ConfigError, TypeError) as error:
        raise ConfigError(f"{path} is not an architecture: {error}") from error
