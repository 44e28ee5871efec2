"""What the commands that fill a folder over hours share: options, the teacher, how a run that is broken off ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..errors import ConfigError, TrainingError
from .arguments import EXIT_INTERRUPTED, EXIT_OK, TrainingDisplay, process_number

if TYPE_CHECKING:
    import torch

    from ..models.layers import ImageClassifier
    from ..training.recipe import Recipe
    from ..training.teacher import Teacher


def add_folder(parser: argparse.ArgumentParser, contents: str) -> None:
    """The options `--out` and `--fresh`; `check_fresh` looks at them."""
    text = f"for {contents}; a run that is in it goes on"
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=text)
    parser.add_argument("--fresh", action="store_true", help="refuse to go on with a run: --out must be new or empty")


def check_fresh(args: argparse.Namespace) -> None:
    """Raise ConfigError if `--fresh` finds a folder in use."""
    if args.fresh and process_number() == 0 and args.out.is_dir() and any(args.out.iterdir()):
        raise ConfigError(
            f"{args.out} is not empty; --fresh starts in a new or empty folder: delete it or name another"
        )


def add_image_cache(parser: argparse.ArgumentParser) -> None:
    """The option `--cache`, for commands that train."""
    text = (
        "keep small images decoded in memory: where they fit in a quarter of what is free, always (ram), or never; "
        "default auto"
    )
    parser.add_argument("--cache", choices=["auto", "ram", "none"], default="auto", help=text)


def add_teacher(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options for a teacher; `given_teacher` reads them."""
    text = (
        "a torchvision model, one of `deit-models list`, a folder or Hub repository, or file.py:FUNCTION, which is run"
    )
    parser.add_argument("--teacher", required=required, help=text)
    text = "a weights file of the teacher, or the name of torchvision's weights"
    parser.add_argument("--teacher-weights", metavar="FILE", help=text)
    text = "what the teacher computes in, default float32"
    parser.add_argument("--teacher-precision", choices=["float32", "bf16"], default="float32", help=text)


def given_teacher(
    args: argparse.Namespace, model: ImageClassifier, num_classes: int, device: torch.device
) -> Teacher | None:
    """The teacher of a command line, for a student. Raises: see `load_teacher`."""
    from ..data.transforms import transform_for
    from ..training.teacher import load_teacher

    if args.teacher is None:
        return None
    return load_teacher(
        args.teacher,
        num_classes=num_classes,
        student=transform_for(model).preprocessing,
        weights=args.teacher_weights,
        precision=args.teacher_precision,
        device=device,
    )


def state_file(args: argparse.Namespace) -> Path:
    """Where a run keeps what it goes on from."""
    from ..training.state import STATE_NAME

    return Path(args.out, STATE_NAME)


def run_to_end(
    args: argparse.Namespace,
    recipe: Recipe,
    display: TrainingDisplay,
    work: Callable[[], None],
    *,
    kept: str | None = None,
) -> int:
    """Do the work; gives the exit status, and says what is left if it is broken off: `kept`, or what `display` knows.

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


def say(text: str, file: TextIO | None = None) -> None:
    """Print, in the first process alone."""
    if process_number() == 0:
        print(text, file=file, flush=True)
