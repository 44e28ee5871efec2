"""Architectures as TOML files, for models that are not registered; `create_model` takes such a file as a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from os import PathLike
from typing import Any

from ..checkpoint import Preprocessing
from ..errors import ConfigError
from ..files import parse_toml, read_text, toml_lines

FORMAT = 1
SUFFIX = ".toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model written down: enough to build it with random weights, and to prepare its input.

    Attributes:
        name: its name in model cards.
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
        plain: dict[str, Any] = {}
        nested: list[str] = []
        for key, value in self.settings.items():
            entries = value if isinstance(value, (list, tuple)) else []
            rows = [
                asdict(entry) if is_dataclass(entry) and not isinstance(entry, type) else entry for entry in entries
            ]
            if rows and isinstance(rows[0], Mapping):
                nested += [f"[[settings.{key}]]\n{toml_lines(row)}" for row in rows]
            else:
                plain[key] = value
        head = toml_lines({"architecture": FORMAT, "name": self.name, "family": self.family})
        tables = [head, f"[settings]\n{toml_lines(plain)}", *nested]
        if self.preprocessing is not None:
            tables.append(f"[preprocessing]\n{toml_lines(self.preprocessing.to_dict())}")
        return "\n".join(tables)


def read_architecture(path: str | PathLike[str]) -> Architecture:
    """An architecture from its file.

    Raises: ConfigError: no such file, not TOML, or not an architecture.
    """
    text = read_text(path)
    try:
        data = parse_toml(text)
        if data.get("architecture") != FORMAT:
            raise ConfigError(f"it has no line `architecture = {FORMAT}`")
        known = {"architecture", "name", "family", "settings", "preprocessing"}
        if not {"name", "family", "settings"} <= set(data) <= known:
            raise ConfigError(f"it has {', '.join(sorted(data))}; expected {', '.join(sorted(known))}")
        if not isinstance(data["settings"], dict):
            raise ConfigError("its settings are no table")
        spec = data.get("preprocessing")
        return Architecture(
            name=str(data["name"]),
            family=str(data["family"]),
            settings=data["settings"],
            preprocessing=None if spec is None else Preprocessing.from_dict(spec),
        )
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path} is not an architecture: {error}") from error
