"""Rules of the configuration dataclasses: checks of their fields, and one way to override them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from .errors import ConfigError


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """The config with some fields replaced. Raises: ConfigError: an unknown field; the nearest ones are named."""
    known = [field.name for field in fields(config)]
    for name in overrides:
        if name == "pretrained":
            raise ConfigError(
                "create_model gives random weights; use deit_models.from_pretrained(name) for trained ones"
            )
        if name not in known:
            raise ConfigError(f"unknown option {name!r} for {type(config).__name__}{nearest(name, known)}")
    return replace(config, **overrides)


def check_whole(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is a whole number above 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} is not a whole number above 0")


def check_positive(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is a number above 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{name}={value!r} is not a number above 0")


def check_rates(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is a probability below 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ConfigError(f"{name}={value!r} is not a probability; use 0 <= {name} < 1")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the three nearest known names."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)
    return f"; nearest: {', '.join(close)}" if close else ""
