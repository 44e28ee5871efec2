"""Configurations: fields are checked, and overridden by name."""

from dataclasses import dataclass
from typing import Any

import pytest

from deit_models import ConfigError
from deit_models.config import check_fields, check_positive, check_rates, check_sizes, check_whole, nearest, override


@dataclass(frozen=True)
class Typed:
    depth: "int" = 2
    width: "int" = 8
    bias: "bool" = True
    ratio: "float" = 4.0
    widths: "tuple[int, ...]" = (1, 2)


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
    assert nearest("cait_XXS24_224", ["cait_s24_224", "cait_xxs24_224"]).startswith("; nearest: cait_xxs24_224")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("bias", value) for value in ("false", "", 0, 1, None, [], [True])),
        *(("depth", value) for value in (257, 2**31, True, "2", 2.0, None, -1)),
        pytest.param("width", 10**5000, id="5,001 digits"),
        *(("width", value) for value in (65_537, 2**63, float("inf"))),
        *(("ratio", value) for value in (float("nan"), float("inf"), True, "4", None, [4.0])),
    ],
)
def test_flags_and_numbers_have_their_type_and_range(field: str, value: Any) -> None:
    check_fields(Typed(depth=256, ratio=3))
    with pytest.raises(ConfigError, match=f"^{field}=|^{field} "):
        check_fields(Typed(**{field: value}))


def test_sizes_of_stages_are_a_tuple_of_the_right_length() -> None:
    config = Typed(widths=[3, 4])  # type: ignore[arg-type]
    check_sizes(config, "widths", entry="stage", count=2)
    assert config.widths == (3, 4)
    for values in ((), (0,), (1, True), (2**31,), "12", None, {1: 2}):
        with pytest.raises(ConfigError, match=r"^widths=.*for each stage"):
            check_sizes(Typed(widths=values), "widths", entry="stage")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^widths=\(1, 2\)"):
        check_sizes(Typed(), "widths", entry="stage", count=3)


@pytest.mark.parametrize("value", [1e30, 9 * 10**18, float("inf"), True])
def test_numbers_have_an_upper_bound(value: Any) -> None:
    check_positive(Toy(ratio=1), "ratio", most=1)
    with pytest.raises(ConfigError, match=r"^ratio="):
        check_positive(Toy(ratio=value), "ratio")


@pytest.mark.parametrize("overrides", [[], "depth", 3, None])
def test_options_are_a_table(overrides: Any) -> None:
    with pytest.raises(ConfigError, match="expected a table of its fields"):
        override(Toy(), overrides)
