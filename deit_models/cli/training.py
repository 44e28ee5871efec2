"""`deit-models train` and `deit-models distill`."""
# MERGED """The recipe on the command line: `--recipe`, `--list-recipes`, and one option for each field of `Recipe`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from ..errors import ConfigError, DataError
from ..training.presets import PRESETS
from ..training.recipe import Recipe, read_recipe, recipe_named
from .arguments import TrainingDisplay, add_data, add_loading, add_workers, command, loading, open_data
from .runs import add_folder, add_image_cache, add_teacher, check_fresh, given_teacher, run_to_end, say, state_file

if TYPE_CHECKING:
    from ..data.records import ImageRecords
    from ..distributed import Process
    from ..models.layers import ImageClassifier
    from ..training.recipe import Recipe
    from ..training.run import TrainResult


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


NO_VALIDATION = "none"
_USAGE = "%(prog)s DATA --out FOLDER{} [--model NAME] [--recipe NAME|FILE.toml] [options]"
_TORCHRUN = "on 8 GPUs: torchrun --nproc-per-node 8 -m deit_models {} ..."


def add_train(commands: Any) -> None:
    """The command `train`."""
    example = "train photos/ --model deit_tiny_patch16_224 --out runs/photos --recipe deit_300e --epochs 100"
    parser = command(commands, "train", "train a model by a recipe", example, _run, own_help=True)
    parser.set_defaults(teacher=None, teacher_weights=None, teacher_precision="float32")
    parser.usage = _USAGE.format("")
    add_recipe(parser, "deit_300e")
    _add_options(parser, "deit_tiny_patch16_224")
    parser.epilog = f"{_TORCHRUN.format('train')}\n{parser.epilog}"


def add_distill(commands: Any) -> None:
    """The command `distill`."""
    example = "distill imagenet/ --teacher regnet_y_16gf --out runs/distilled"
    parser = command(commands, "distill", "train a model with a teacher", example, _run, own_help=True)
    parser.usage = _USAGE.format(" --teacher NAME")
    add_recipe(parser, "deit_distill_300e")
    add_teacher(parser, required=True)
    _add_options(parser, "deit_tiny_distilled_patch16_224")
    parser.epilog = f"{_TORCHRUN.format('distill')}\n{parser.epilog}"


def _add_options(parser: argparse.ArgumentParser, model: str) -> None:
    parser.set_defaults(default_model=model)
    add_data(
        parser, "a folder with train/ and val/, each with a folder of images for each class; or a name: cifar10, ..."
    )
    text = f"images to evaluate on, a folder or a name; default: those of DATA; {NO_VALIDATION}: train without any"
    parser.add_argument("--val-data", metavar="DATA", help=text)
    add_folder(parser, "recipe, log, saved state and models")
    text = (
        f"what to train, from `deit-models list`, default {model}; with --pretrained, the model of a bare weights file"
    )
    parser.add_argument("--model", metavar="NAME", help=text)
    text = (
        "start from these weights: a name, a folder, a file or a Hub repository; heads for other classes are made anew"
    )
    parser.add_argument("--pretrained", metavar="SOURCE", help=text)
    add_loading(parser)
    add_workers(parser)
    add_image_cache(parser)
    text = "under torchrun: a copy of the model in each process, or its parameters divided between them; default ddp"
    parser.add_argument("--shard", choices=["ddp", "fsdp"], default="ddp", help=text)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files into --out")
    parser.add_argument("--plot", action="store_true", help="at the end, draw the curves into curves.png in --out")


def _run(args: argparse.Namespace) -> int:
    recipe = _checked_recipe(args)
    display = TrainingDisplay(recipe.total_epochs, finished=None if state_file(args).exists() else 0)
    return run_to_end(args, recipe, display, lambda: _train(args, recipe, display))


def _checked_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe, which fits the command. Raises: ConfigError: it does not, or `--fresh` finds a folder in use."""
    recipe = chosen_recipe(args)
    if args.teacher is None and recipe.distillation != "none":
        raise ConfigError(
            f"this recipe has distillation={recipe.distillation!r}, which needs a teacher: use `deit-models distill`, "
            f"or --distillation none"
        )
    if args.teacher is not None and recipe.distillation == "none":
        raise ConfigError("this recipe has distillation='none' and would not use the teacher; pass --distillation hard")
    check_fresh(args)
    return recipe


def _train(args: argparse.Namespace, recipe: Recipe, display: TrainingDisplay) -> None:
    from ..distributed import join_processes
    from ..training.run import train
    from ..training.state import find_matplotlib, plot_curves

    if args.plot:
        find_matplotlib()  # before hours of training, not after
    with join_processes(args.device) as process:
        records = open_data(args, args.data, "train", process)
        val = _validation(args, process, records)
        model, start = _student(args, recipe, records)
        say(_plan(args, start, records, val))
        teacher = given_teacher(args, model, model.num_classes, process.device)
        result = train(
            model,
            recipe=recipe,
            train=records,
            val=val,
            out=args.out,
            teacher=teacher,
            device=process.device,
            workers=args.workers,
            cache=args.cache,
            shard=args.shard,
            tensorboard=args.tensorboard,
            watch=display.watch,
            on_epoch=display.show_epoch,
        )
    say(_summary(result))
    if args.plot and process.is_main:
        plot_curves({result.out.name: result.log}, result.out / "curves.png")


def _validation(args: argparse.Namespace, process: Process, records: ImageRecords) -> ImageRecords | None:
    if args.val_data == NO_VALIDATION:
        return None
    try:
        if args.val_data is None:
            return open_data(args, args.data, "val", process, classes=records.classes)
        return open_data(args, args.val_data, "val", process, classes=records.classes, own_folder=True)
    except DataError as error:
        if args.val_data is not None:
            raise
        raise DataError(f"{error} (--val-data), or train without any (--val-data {NO_VALIDATION})") from error


def _student(args: argparse.Namespace, recipe: Recipe, records: ImageRecords) -> tuple[ImageClassifier, str]:
    """The model to train, and in words what it starts from. Its random weights come from the recipe's seed."""
    import torch

    from ..data.classes import match_classes
    from ..hub.load import from_pretrained
    from ..registry import create_model, list_models

    changes: dict[str, Any] = {"num_classes": len(records.classes)}
    if recipe.img_size:
        changes["img_size"] = recipe.img_size
    torch.manual_seed(recipe.seed)
    if args.pretrained is None:
        return create_model(args.model or args.default_model, **changes), "with random weights"
    if args.model is not None and args.pretrained in list_models():
        raise ConfigError(f"--pretrained {args.pretrained} says which model it is; leave out --model {args.model}")
    model = from_pretrained(args.pretrained, model=args.model, **changes, **loading(args))
    order, _ = match_classes(model, records)
    if order is not None and list(order) == sorted(order):
        return model, "with its heads"
    # as many classes, and not these or in another order: the heads would start from what is wrong
    model.reset_heads()
    return model, "with new heads"


def _plan(args: argparse.Namespace, start: str, records: ImageRecords, val: ImageRecords | None) -> str:
    """What is about to be done, in one line."""
    model = args.model or args.default_model if args.pretrained is None else args.pretrained
    checked = "none to evaluate on" if val is None else f"{len(val)} to evaluate on"
    data = f"{len(records)} images of {len(records.classes)} classes, {checked}"
    place = f"going on in {args.out}" if state_file(args).exists() else f"into {args.out}"
    return f"{model} {start}, recipe {args.recipe}: {data}; {place}"


def _summary(result: TrainResult) -> str:
    if result.top1 is None or result.best_epoch is None:
        return f"wrote {result.out / 'model'}"
    best = f", best {result.best_top1:.2f} % after epoch {result.best_epoch + 1}"
    return f"top-1 {result.top1:.2f} %{best}; wrote {result.out / 'model'} and {result.out / 'best'}"
