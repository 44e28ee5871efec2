"""`deit-models train` and `deit-models distill`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .arguments import LOADING, TEACHER, add_data, add_options, command, loading, open_data, picked, say
from .long_runs import (
    TrainingDisplay,
    add_folder,
    add_recipe,
    check_fresh,
    chosen_recipe,
    given_teacher,
    run_to_end,
    state_file,
)

if TYPE_CHECKING:
    from ..data.records import ImageRecords
    from ..distributed import Process
    from ..models.layers import ImageClassifier
    from ..training.recipe import Recipe
    from ..training.run import TrainResult

NO_VALIDATION = "none"
_USAGE = "%(prog)s DATA --out FOLDER{} [--model NAME] [--recipe NAME|FILE.toml] [options]"
_TORCHRUN = "on 8 GPUs: torchrun --nproc-per-node 8 -m deit_models {} ..."


def add_train(commands: Any) -> None:
    """Add the command `train`."""
    example = "train photos/ --model deit_tiny_patch16_224 --out runs/photos --recipe deit_300e --epochs 100"
    parser = command(commands, "train", "train a model by a recipe", example, run_train, own_help=True)
    parser.set_defaults(teacher=None, teacher_weights=None, teacher_precision="float32")
    parser.usage = _USAGE.format("")
    add_recipe(parser, "deit_300e")
    _add_options(parser, "deit_tiny_patch16_224")
    parser.epilog = f"{_TORCHRUN.format('train')}\n{parser.epilog}"


def add_distill(commands: Any) -> None:
    """Add the command `distill`."""
    example = "distill imagenet/ --teacher regnet_y_16gf --out runs/distilled"
    parser = command(commands, "distill", "train a model with a teacher", example, run_train, own_help=True)
    parser.usage = _USAGE.format(" --teacher NAME")
    add_recipe(parser, "deit_distill_300e")
    add_options(parser, "--teacher", required=True)
    add_options(parser, *TEACHER[1:])
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
    add_options(parser, *LOADING, "--workers", "--device", "--cache")
    text = "under torchrun: a copy of the model in each process, or its parameters divided between them; default ddp"
    parser.add_argument("--shard", choices=["ddp", "fsdp"], default="ddp", help=text)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files into --out")
    parser.add_argument("--plot", action="store_true", help="at the end, draw the curves into curves.png in --out")


def run_train(args: argparse.Namespace, *, train: Callable[..., TrainResult] | None = None) -> int:
    """Run `train` or `distill`; `train` does the work, by default `training.run.train`."""
    recipe = chosen_recipe(args)
    if args.teacher is None and recipe.distillation != "none":
        raise ConfigError(
            f"this recipe has distillation={recipe.distillation!r}, which needs a teacher: use `deit-models distill`, "
            f"or --distillation none"
        )
    if args.teacher is not None and recipe.distillation == "none":
        raise ConfigError("this recipe has distillation='none' and would not use the teacher; pass --distillation hard")
    check_fresh(args)
    display = TrainingDisplay(recipe.total_epochs, finished=None if state_file(args).exists() else 0)
    return run_to_end(args, recipe, display, lambda: _train(args, recipe, display, train))


def _train(
    args: argparse.Namespace, recipe: Recipe, display: TrainingDisplay, train: Callable[..., TrainResult] | None
) -> None:
    from ..distributed import join_processes
    from ..training.run import train as train_here
    from ..training.state import find_matplotlib, plot_curves

    if args.plot:
        find_matplotlib()  # before hours of training, not after
    with join_processes(args.device) as process:
        records = open_data(args, args.data, "train", process)
        val = _validation(args, process, records)
        model, start = _student(args, recipe, records)
        say(_plan(args, start, records, val))
        result = (train or train_here)(
            model,
            recipe=recipe,
            train=records,
            val=val,
            teacher=given_teacher(args, model, model.num_classes, process.device),
            device=process.device,
            watch=display.watch,
            on_epoch=display.show_epoch,
            **picked(args, "out", "workers", "cache", "shard", "tensorboard"),
        )
    say(_summary(result))
    if args.plot and process.is_main:
        plot_curves({result.out.name: result.log}, result.out / "curves.png")


def _validation(args: argparse.Namespace, process: Process, records: ImageRecords) -> ImageRecords | None:
    if args.val_data == NO_VALIDATION:
        return None
    if args.val_data is not None:
        return open_data(args, args.val_data, "val", process, classes=records.classes, own_folder=True)
    try:
        return open_data(args, args.data, "val", process, classes=records.classes)
    except DataError as error:
        raise DataError(f"{error} (--val-data), or train without any (--val-data {NO_VALIDATION})") from error


def _student(args: argparse.Namespace, recipe: Recipe, records: ImageRecords) -> tuple[ImageClassifier, str]:
    """The model to train, and its start in words. Random weights come from the recipe's seed."""
    import torch

    from ..data.classes import match_classes
    from ..hub.load import from_pretrained
    from ..models import create_model
    from ..registry import list_models

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
    # other classes, or the same in another order: the old heads would be a wrong start
    model.reset_heads()
    return model, "with new heads"


def _plan(args: argparse.Namespace, start: str, records: ImageRecords, val: ImageRecords | None) -> str:
    """The line before a run."""
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
