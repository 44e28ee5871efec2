"""Configurations: fields are checked, and overridden by name."""

from dataclasses import dataclass
from typing import Any

import pytest

from deit_models import ConfigError
from deit_models.config import check_positive, check_rates, check_whole, nearest, override


@dataclass(frozen=True)
class Toy:
    depth: Any = 2
    ratio: Any = 4.0
    drop_rate: Any = 0.0


def test_override_replaces_fields_in_a_copy() -> None:
    before = Toy()
    assert override(before, {"depth": 3}) == Toy(depth=3)
    assert before == Toy()


def test_unknown_field_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown option 'dept' for Toy; nearest: depth"):
        override(Toy(), {"dept": 3})


def test_pretrained_is_no_field() -> None:
    with pytest.raises(ConfigError, match="from_pretrained"):
        override(Toy(), {"pretrained": True})


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_whole_numbers_above_zero(value: Any) -> None:
    check_whole(Toy(), "depth")
    with pytest.raises(ConfigError, match=r"depth=.* is not a whole number above 0"):
        check_whole(Toy(depth=value), "depth")


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), "2", None])
def test_numbers_above_zero(value: Any) -> None:
    check_positive(Toy(), "ratio", "depth")
    with pytest.raises(ConfigError, match=r"ratio=.* is not a number above 0"):
        check_positive(Toy(ratio=value), "ratio")


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0", None])
def test_rates_are_below_one(value: Any) -> None:
    check_rates(Toy(drop_rate=0.9), "drop_rate")
    with pytest.raises(ConfigError, match=r"drop_rate=.* is not a probability; use 0 <= drop_rate < 1"):
        check_rates(Toy(drop_rate=value), "drop_rate")


def test_nearest_names_are_three_at_most() -> None:
    assert nearest("ab", ["abc", "abd", "abe", "abf"]).count(",") == 2
    assert nearest("ab", []) == ""
