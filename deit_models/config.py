"""Rules of the configuration dataclasses: checks of their fields, and one way to override them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, get_args

from .errors import ConfigError, shown

MOST = 65_536
"""Upper bound of whole numbers that are sizes: widths, heads, pixels along a side."""
_BOUNDS = {"depth": 256, "num_classes": 10_000_000}


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """The config with some fields replaced. Raises: ConfigError: an unknown field; the nearest ones are named."""
    known = [field.name for field in fields(config)]
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{type(config).__name__} is given as {shown(overrides)}; expected a table of its fields")
    for name in overrides:
        if name == "pretrained":
            raise ConfigError(
                "create_model gives random weights; use deit_models.from_pretrained(name) for trained ones"
            )
        if name not in known:
            raise ConfigError(f"unknown option {shown(name)} for {type(config).__name__}{nearest(name, known)}")
    return replace(config, **overrides)


def check_fields(config: Any) -> None:
    """Check the fields annotated bool, int and float, of which whole numbers are sizes.

    Raises: ConfigError: a flag that is not True or False, a whole number that is none, below 1 or above what can be
        built, a number that is not finite.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "bool" and type(value) is not bool:
            raise ConfigError(f"{field.name}={shown(value)}; expected True or False")
        if field.type == "int":
            check_whole(config, field.name, most=_BOUNDS.get(field.name, MOST))
        if field.type == "float" and not is_finite(value):
            raise ConfigError(f"{field.name}={shown(value)} is not a finite number")


def check_whole(config: Any, *names: str, most: int = 10**12) -> None:
    """Raise ConfigError unless each named field is a whole number above 0, not above `most`; `num_classes` may be 0."""
    for name in names:
        value, least = getattr(config, name), name != "num_classes"
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}={shown(value)} is not a whole number above 0")
        if value > most:
            raise ConfigError(f"{name}={shown(value)} is too large; expected {most} at most")


def check_sizes(config: Any, name: str, *, entry: str, count: int | None = None) -> None:
    """Raise ConfigError unless a field holds a size for each `entry`, `count` of them; a list becomes a tuple."""
    values = getattr(config, name)
    if isinstance(values, list):
        object.__setattr__(config, name, values := tuple(values))
    whole = isinstance(values, tuple) and all(type(value) is int and 0 < value <= MOST for value in values)
    if not whole or not values or (count is not None and len(values) != count):
        raise ConfigError(
            f"{name}={shown(values)}; expected one whole number above 0 for each {entry}, as a tuple, {MOST} at most"
        )


def check_total(name: str, value: int) -> None:
    """Raise ConfigError if a sum is above the upper bound of the fields of that name."""
    if value > _BOUNDS.get(name, MOST):
        raise ConfigError(f"{name} is {value} in all; expected {_BOUNDS.get(name, MOST)} at most")


def check_positive(config: Any, *names: str, most: float = 1000) -> None:
    """Raise ConfigError unless each named field is a number above 0 and not above `most`."""
    for name in names:
        value = getattr(config, name)
        if not is_finite(value) or not 0 < value <= most:
            raise ConfigError(f"{name}={shown(value)} is not a number above 0, of {most:g} at most")


def check_rates(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is a probability below 1."""
    for name in names:
        value = getattr(config, name)
        if not is_finite(value) or not 0 <= value < 1:
            raise ConfigError(f"{name}={shown(value)} is not a probability; use 0 <= {name} < 1")


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless a value is one of those that a Literal names."""
    if value not in get_args(kind):
        raise ConfigError(f"{name}={shown(value)}; expected one of {', '.join(map(str, get_args(kind)))}")


def is_finite(value: Any) -> bool:
    """Whether a value of a config is a number, neither a truth value nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the three nearest known names, capitals aside."""
    lowered = {each.lower(): each for each in known}
    close = difflib.get_close_matches(str(name)[:100].lower(), list(lowered), n=3, cutoff=0.0)
    return f"; nearest: {', '.join(lowered[each] for each in close)}" if close else ""
