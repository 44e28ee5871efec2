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
