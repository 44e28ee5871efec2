"""Errors: each is the package's own and a builtin, and is offered at the top."""

import inspect

import pytest

import deit_models
from deit_models import errors

PLAIN = (Exception, BaseException, object)
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_ours_and_a_builtin_and_offered_at_the_top(kind: type[Exception]) -> None:
    assert issubclass(kind, deit_models.DeitModelsError)
    usual = [base for base in kind.__mro__ if base.__module__ == "builtins" and base not in PLAIN]
    assert usual or kind is deit_models.DeitModelsError
    assert getattr(deit_models, kind.__name__) is kind
    assert kind.__name__ in deit_models.__all__


def test_message_is_cut_to_one_line() -> None:
    assert errors.first_line(ValueError("\n one \n two")) == "one "
    assert errors.first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("text", ["x" * 5000, "a\nb" * 400, "\x1b[31mred\udc80", "\u202e" * 200, "line\r\nline"])
def test_message_of_others_is_one_short_line(text: str) -> None:
    for message in (str(errors.CheckpointError(text)), errors.first_line(ValueError(text)), errors.one_line(text)):
        assert len(message) <= 300
        assert message.isprintable()
    assert errors.CheckpointError(text).args == (text,)


def test_both_ends_of_a_long_message_are_kept() -> None:
    message = str(errors.ConfigError("given " + "x" * 1000 + " do this"))
    assert message.startswith("given x")
    assert message.endswith("x do this")


@pytest.mark.parametrize(
    "value", [pytest.param(10**5000, id="digits"), "y" * 1000, list(range(10_000)), "a\nb", object()]
)
def test_values_of_others_are_shown_shortly(value: object) -> None:
    assert len(errors.shown(value)) <= 80
    assert errors.shown(value).isprintable()
