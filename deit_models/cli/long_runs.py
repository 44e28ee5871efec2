"""Shared parts of the commands that train: recipe, folder and teacher options, the display, the end of a run."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args, get_type_hints

from ..errors import ConfigError, TrainingError
from ..recipes.presets import PRESETS
from ..recipes.recipe import Recipe, recipe_named, recipe_of
from .arguments import EXIT_INTERRUPTED, EXIT_OK, columns, process_number, progress_bar, say

if TYPE_CHECKING:
    import torch

    from ..models.layers import ImageClassifier
    from ..training.teacher import Teacher

_PREFIX = "recipe."  # of a field's name in the namespace, so that no other option has the same name

# The recipe


def add_recipe(parser: argparse.ArgumentParser, preset: str, *, by_data: bool = False) -> None:
    """Add `--recipe`, `--list-recipes`, one option for each field of `Recipe`, and a help that shows their values.

    `preset` is the default of `--recipe`; with `by_data` it is the default in the help only, and the value is None.
    """
    shown: dict[str, argparse.Action] = {}
    parser.add_argument("-h", "--help", action=_Help, nargs=0, shown=shown, help="show this, with the recipe's values")
    default = f"by the data, {preset} where they are not known" if by_data else preset
    text = "a preset, or a TOML file with `preset` and the fields to replace; the options below replace values of both"
    parser.add_argument(
        "--recipe", default=None if by_data else preset, metavar="NAME|FILE.toml", help=f"{text}; default {default}"
    )
    parser.set_defaults(shown_recipe=preset)
    parser.add_argument("--list-recipes", action=_ListRecipes, nargs=0, help="show the presets and end")
    group = parser.add_argument_group("fields of the recipe")
    for name, kind in get_type_hints(Recipe).items():
        if name != "preset":
            option = "--" + name.replace("_", "-")
            # suppressed: an option that is not given stays out of the namespace, so that the recipe's value holds
            shown[name] = group.add_argument(option, dest=_PREFIX + name, default=argparse.SUPPRESS, **_reading(kind))


def _reading(kind: Any) -> dict[str, Any]:
    """Options of `add_argument` for a field of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices := get_args(kind):
        return {"choices": choices}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of a command line: its options, then the TOML file, then the preset, then the defaults.

    Raises: ConfigError: no such preset or file, or a value that cannot work.
    """
    return recipe_of(args.recipe, **recipe_changes(args))


def recipe_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that were given as options."""
    return {key.removeprefix(_PREFIX): value for key, value in vars(args).items() if key.startswith(_PREFIX)}


class _Help(argparse.Action):
    """Print the help; each field of the recipe is shown with its value after the options before `--help`."""

    def __init__(self, *args: Any, shown: dict[str, argparse.Action], **options: Any) -> None:
        super().__init__(*args, **options)
        self.shown = shown

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.recipe = namespace.recipe or parser.get_default("shown_recipe")
        recipe, texts = chosen_recipe(namespace), {field.name: field.metadata["help"] for field in fields(Recipe)}
        for name, action in self.shown.items():
            value = getattr(recipe, name)
            spelt = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            action.help = f"{texts[name]}; default {spelt}".replace("%", "%%")
        parser.print_help()
        parser.exit()


class _ListRecipes(argparse.Action):
    """Print the presets as a table."""

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


# Other options


def add_folder(parser: argparse.ArgumentParser, contents: str) -> None:
    """Add `--out` and `--fresh`; `check_fresh` reads them."""
    text = f"for {contents}; a run in it is continued"
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=text)
    parser.add_argument("--fresh", action="store_true", help="refuse to continue a run: --out must be new or empty")


def check_fresh(args: argparse.Namespace) -> None:
    """Raise ConfigError if `--fresh` finds a folder in use."""
    if args.fresh and process_number() == 0 and args.out.is_dir() and any(args.out.iterdir()):
        raise ConfigError(
            f"{args.out} is not empty; --fresh starts in a new or empty folder: delete it or name another"
        )


def given_teacher(
    args: argparse.Namespace, model: ImageClassifier, num_classes: int, device: torch.device
) -> Teacher | None:
    """The teacher of a command line, for a student. Raises: see `load_teacher`."""
    from ..images.transforms import transform_for
    from ..training.teacher import load_teacher

    if args.teacher is None:
        return None
    options = {"weights": args.teacher_weights, "precision": args.teacher_precision, "device": device}
    return load_teacher(args.teacher, num_classes=num_classes, student=transform_for(model).preprocessing, **options)


def state_file(args: argparse.Namespace) -> Path:
    """The saved state of a run, from which it goes on."""
    from ..training.state import STATE_NAME

    return Path(args.out, STATE_NAME)


# The display, and how a run ends


_LIVE = "{desc}  {percentage:3.0f} %{postfix}  {bar}"


class TrainingDisplay:
    """Progress of a training run: a live line for the running epoch, on a terminal, and a line for each finished one.

    `finished` counts the epochs that are done; it is None until the first line of a continued run. `images` is the
    number of images in a batch, of all processes together.
    """

    def __init__(self, epochs: int, *, finished: int | None, images: int = 1, stream: TextIO | None = None) -> None:
        self.epochs = epochs
        self.finished = finished
        self.images = images
        self.best: float | None = None
        self._stream = stream
        self._bar: Any = None
        self._begun: tuple[float, int] | None = None

    def watch(self, batches: Iterable[Any], total: int) -> Iterable[Any]:
        """The batches of the next epoch, behind a bar that tells the loss, if it is given, the speed and the time left.

        Speed and time are those of this process: they include loading, and the time left includes evaluation.
        """
        label = "training" if self.finished is None else f"epoch {self.finished + 1}/{self.epochs}"
        self._bar = progress_bar(batches, total, unit="batch", label=label, stream=self._stream, form=_LIVE)
        if self._begun is None and self.finished is not None:
            self._begun = time.monotonic(), self.finished
        return _LiveEpoch(self, self._bar, total)

    def seconds_left(self, share: float) -> float | None:
        """Time to the end of the run, by its speed so far, in seconds; `share` of the running epoch is done."""
        if self._begun is None or self.finished is None:
            return None
        (begun, before), done = self._begun, self.finished + share
        return (time.monotonic() - begun) / (done - before) * (self.epochs - done)

    def close(self) -> None:
        """Remove the bar of an epoch that was broken off."""
        if self._bar is not None:
            self._bar.close()

    def show_epoch(self, row: dict[str, Any]) -> None:
        """Print a row of the log and count its epoch."""
        self.finished = row["epoch"] + 1
        score = row.get("map", row.get("top1"))
        self.best = score if self.best is None or (score is not None and score > self.best) else self.best
        print(epoch_line(row, self.epochs), flush=True)


class _LiveEpoch:
    """The batches of an epoch behind a bar of tqdm; `set_postfix` renews its text."""

    def __init__(self, display: TrainingDisplay, bar: Any, total: int) -> None:
        self._display, self._bar, self._total = display, bar, total
        self._seen, self._begun = 0, time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for batch in self._bar:
            self._seen += 1
            yield batch

    def set_postfix(self, *, loss: float, refresh: bool = True) -> None:
        """Tell the mean loss so far, the best accuracy so far, images/s and the time left."""
        display, elapsed = self._display, max(time.monotonic() - self._begun, 1e-3)
        told = [f"loss {loss:.4f}"]
        told += [] if display.best is None else [f"best {display.best:.2f} %"]
        told.append(f"{self._seen * display.images / elapsed:.0f} images/s")
        left = display.seconds_left(self._seen / self._total)
        told += [] if left is None else [f"{self._bar.format_interval(left)} left"]
        self._bar.set_postfix_str(", ".join(told), refresh=refresh)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """A row of the log as a line; epochs count from 1."""
    number = str(row["epoch"] + 1).rjust(len(str(epochs)))
    parts = [f"epoch {number}/{epochs}", f"loss {row['loss']:.4f}"]
    several = {"map": "mAP", "ema_map": "averaged"}
    names = several if "map" in row else {
        "top1": "top-1",
        "class_top1": "class head", "distillation_top1": "distillation head", "ema_top1": "averaged",
    }  # fmt: skip
    parts += [f"{name} {row[key]:.2f} %" for key, name in names.items() if row.get(key) is not None]
    parts += [f"lr {row['lr']:.3g}", f"{row['images_per_second']:.0f} images/s"]
    if row.get("unreadable"):
        parts.append(f"{row['unreadable']} unreadable")
    return "  ".join(parts)


def images_at_once(recipe: Recipe | None) -> int:
    """Images in a batch of a run, of all processes together; 1 of a command that trains nothing."""
    return 1 if recipe is None else recipe.batch_size // recipe.accumulate


def next_steps(args: argparse.Namespace, images: str | None, *, publishes: bool = False) -> str:
    """Lines for the end of a run in `--out`: its report or curves, if there are any, and commands for its best model.

    Args:
        args: the command line; columns and places that it names are not repeated, and without them nothing evaluates.
        images: images that no weights were fitted to, as `evaluate` takes them; None: there are none.
        publishes: whether the command has `--push-to-hub`.
    """
    out = args.out
    model = next((folder for folder in (out / "best", out / "model") if folder.is_dir()), None)
    seen = next((file for file in (out / "report.html", out / "curves.png") if file.is_file()), None)
    steps = [] if seen is None else [f"  look at   {seen}"]
    if model is not None:
        steps.append(f"  classify  {shlex.join(['deit-models', 'predict', '--model', str(model)])} IMAGE")
        if images is not None and args.root is None and not any(columns(args).values()):
            steps.append(f"  evaluate  {shlex.join(['deit-models', 'evaluate', str(model), images])}")
        if publishes and args.push_to_hub is None:
            instead = " instead of --fresh" if args.fresh else ""
            steps.append(
                f"  publish   the same command with --push-to-hub OWNER/NAME{instead}; it trains nothing again"
            )
    return "\n".join(["next:", *steps])


def run_to_end(
    args: argparse.Namespace,
    recipe: Recipe,
    display: TrainingDisplay,
    work: Callable[[], None],
    *,
    kept: str | None = None,
) -> int:
    """Do the work and return the exit status; after Ctrl-C say what is left: `kept`, or what `display` counted.

    Raises: TrainingError: the GPU has too little memory.
    """
    import torch

    try:
        with closing(display):
            work()
    except KeyboardInterrupt:
        say(f"deit-models: interrupted; {kept or _what_is_kept(args, recipe, display)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU has too little memory for {recipe.batch_size // recipe.accumulate} images at once; "
            f"--accumulate {2 * recipe.accumulate} does each step in smaller parts"
        ) from error
    return EXIT_OK


def _what_is_kept(args: argparse.Namespace, recipe: Recipe, display: TrainingDisplay) -> str:
    """For the message of an interrupted run."""
    if display.finished is None:
        return f"{args.out} is as before, and the same command goes on from there"
    done = display.finished
    saved = done if done == display.epochs else done - done % recipe.save_every
    if saved == 0:
        return f"no epoch was {'saved' if done else 'finished'}, so the same command starts again"
    return f"{args.out} keeps epoch {saved} of {display.epochs}, and the same command goes on from there"
