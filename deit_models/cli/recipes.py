"""The recipe on the command line: `--recipe`, `--list-recipes`, and one option for each field of `Recipe`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..training.presets import PRESETS
from ..training.recipe import Recipe, read_recipe, recipe_named

_PREFIX = "recipe."  # of the names under which a parser keeps the fields, so that no other option can collide with one
_RECIPE_HELP = (
    "a preset, or a TOML file with `preset` and the fields to replace; the options below go before both; default {}"
)


def add_recipe(parser: argparse.ArgumentParser, preset: str, *, by_data: bool = False) -> None:
    """Add `--recipe`, by default `preset`, one option a field, `--list-recipes`, and a help that shows the values.

    With `by_data` the command chooses by the data where there is no `--recipe`, which is then None; the help shows the
    values of `preset`.

    The parser must come without a help option: the values that this one shows are those of the options before it.
    """
    shown: dict[str, argparse.Action] = {}
    parser.add_argument("-h", "--help", action=_Help, nargs=0, shown=shown, help="show this, with the recipe's values")
    text = _RECIPE_HELP.format(f"by the data, {preset} where they are not known" if by_data else preset)
    parser.add_argument("--recipe", default=None if by_data else preset, metavar="NAME|FILE.toml", help=text)
    parser.set_defaults(shown_recipe=preset)
    parser.add_argument("--list-recipes", action=_ListRecipes, nargs=0, help="show the presets and end")
    group = parser.add_argument_group("fields of the recipe")
    for name, kind in get_type_hints(Recipe).items():
        if name != "preset":
            option = "--" + name.replace("_", "-")
            # suppressed: what is not given stays out of the namespace, so that the recipe's own value holds
            shown[name] = group.add_argument(option, dest=_PREFIX + name, default=argparse.SUPPRESS, **_reading(kind))


def _reading(kind: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices := get_args(kind):
        return {"choices": choices}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of a command line: its options over the TOML file over the preset over the defaults.

    Raises: ConfigError: no such preset or file, or a value that cannot work.
    """
    given = recipe_changes(args)
    if args.recipe not in PRESETS and (args.recipe.endswith(".toml") or Path(args.recipe).is_file()):
        return read_recipe(args.recipe, **given)
    return recipe_named(args.recipe, **given)


def recipe_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that the command line itself gives."""
    return {key.removeprefix(_PREFIX): value for key, value in vars(args).items() if key.startswith(_PREFIX)}


class _Help(argparse.Action):
    """Prints the help; each field of the recipe shows the value it has after the options before it."""

    def __init__(self, *args: Any, shown: dict[str, argparse.Action], **options: Any) -> None:
        super().__init__(*args, **options)
        self.shown = shown

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.recipe = namespace.recipe or parser.get_default("shown_recipe")
        recipe, texts = chosen_recipe(namespace), {field.name: field.metadata["help"] for field in fields(Recipe)}
        for name, action in self.shown.items():
            action.help = f"{texts[name]}; default {_spelt(getattr(recipe, name))}".replace("%", "%%")
        parser.print_help()
        parser.exit()


class _ListRecipes(argparse.Action):
    """Prints the presets as a table."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        rows = [("name", "epochs", "batch", "peak lr", "pixels", "teacher", "what it is, and its source")]
        for name, (source, _changes) in PRESETS.items():
            recipe = recipe_named(name)
            size = str(recipe.img_size or "model's")
            numbers = (str(recipe.epochs), str(recipe.batch_size), f"{recipe.peak_lr:g}", size, recipe.distillation)
            rows.append((name, *numbers, source))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        parser.exit()


def _spelt(value: Any) -> str:
    """A value as the command line takes it; a switch as the word on or off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
