"""`deit-models train`, `distill` and `finetune`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import DEFAULT_TEACHER
from ..errors import ConfigError, DataError
from .arguments import (
    EXIT_OK,
    LOADING,
    add_data,
    add_options,
    at_least,
    chosen_model,
    command,
    loading,
    open_data,
    picked,
    say,
    watcher,
)
from .long_runs import (
    TrainingDisplay,
    add_folder,
    add_recipe,
    check_fresh,
    chosen_recipe,
    given_teacher,
    images_at_once,
    next_steps,
    recipe_changes,
    run_to_end,
    state_file,
)

if TYPE_CHECKING:
    from ..data.records import ImageRecords
    from ..distributed import Process
    from ..finetuning.finetune import FinetuneResult
    from ..models.layers import ImageClassifier
    from ..recipes.recipe import Recipe
    from ..training.run import TrainResult

logger = logging.getLogger(__name__)

NO_VALIDATION, SPLIT = "none", "split"


def add_train(commands: Any) -> None:
    """Add the command `train`."""
    example = "train photos/ --model deit_tiny_patch16_224 --out runs/photos --recipe deit_300e --epochs 100"
    parser = command(commands, "train", "train a model by a recipe", example, run_train, own_help=True)
    _add_training_options(parser, "train", recipe="deit_300e", model="deit_tiny_patch16_224")
    parser.set_defaults(teacher=None, teacher_weights=None, teacher_precision="float32")


def add_distill(commands: Any) -> None:
    """Add the command `distill`."""
    example = "distill imagenet/ --out runs/distilled"
    parser = command(commands, "distill", "train a model with a teacher", example, run_train, own_help=True)
    _add_training_options(parser, "distill", recipe="deit_distill_300e", model="deit_tiny_distilled_patch16_224")


def _add_training_options(parser: argparse.ArgumentParser, name: str, *, recipe: str, model: str) -> None:
    teacher = name == "distill"
    parser.usage = (
        f"%(prog)s DATA --out FOLDER{' [--teacher NAME]' * teacher} [--model NAME] [--recipe NAME|FILE.toml] [options]"
    )
    parser.epilog = f"on 8 GPUs: torchrun --nproc-per-node 8 -m deit_models {name} ...\n{parser.epilog}"
    parser.set_defaults(default_model=model)
    add_recipe(parser, recipe)
    if teacher:
        add_options(parser, "--teacher", "--teacher-weights", "--teacher-precision")
        parser.set_defaults(teacher=DEFAULT_TEACHER)
    text = "a folder with train/ and val/, each with a folder of images for each class; or a name: cifar10, ..."
    add_data(parser, text)
    text = f"images to evaluate on, a folder or a name; default: those of DATA; {NO_VALIDATION}: train without any"
    parser.add_argument("--val-data", metavar="DATA", help=text)
    add_folder(parser, "recipe, log, saved state and models")
    text = (
        f"what to train, from `deit-models list`, default {model}; with --pretrained, the model of a bare weights file"
    )
    parser.add_argument("--model", metavar="NAME", help=text)
    text = "start from these weights: a name, a folder, a file or a Hub repository; heads for other classes are new"
    parser.add_argument("--pretrained", metavar="SOURCE", help=text)
    add_options(parser, *LOADING, "--workers", "--device", "--cache", "--tensorboard", "--report-to")
    text = "label maps of the training images, made by `label-maps`; they go with --token-labels"
    parser.add_argument("--label-maps", type=Path, metavar="FOLDER", help=text)
    text = "under torchrun: a copy of the model in each process, or its parameters divided between them; default ddp"
    parser.add_argument("--shard", choices=["ddp", "fsdp"], default="ddp", help=text)
    parser.add_argument("--plot", action="store_true", help="at the end, draw the curves into curves.png in --out")


def run_train(args: argparse.Namespace, *, train: Callable[..., TrainResult] | None = None) -> int:
    """Run `train` or `distill`; `train` does the work, by default `training.run.train`."""
    recipe = chosen_recipe(args)
    if args.teacher is not None and recipe.distillation == "none":
        raise ConfigError("this recipe has distillation='none' and would not use the teacher; pass --distillation hard")
    check_fresh(args)
    finished = None if state_file(args).exists() else 0
    display = TrainingDisplay(recipe.total_epochs, finished=finished, images=images_at_once(recipe))
    return run_to_end(args, recipe, display, lambda: _train(args, recipe, display, train))


def _train(
    args: argparse.Namespace, recipe: Recipe, display: TrainingDisplay, train: Callable[..., TrainResult] | None
) -> None:
    from ..distributed import join_processes
    from ..show.charts import find_matplotlib, plot_curves
    from ..trackers import chosen_trackers
    from ..training.run import train as train_here

    chosen_trackers(args.report_to, tensorboard=args.tensorboard)  # before anything is read or fetched
    if args.plot:
        find_matplotlib()  # before hours of training, not after
    with join_processes(args.device) as process:
        records = open_data(args, args.data, "train", process)
        val = _validation(args, process, records)
        recipe = recipe.for_several_labels() if records.multi_label else recipe  # before a teacher is fetched
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
            **picked(args, "out", "label_maps", "workers", "cache", "shard", "tensorboard", "report_to"),
        )
    say(_train_summary(result))
    if args.plot and process.is_main:
        plot_curves({result.out.name: result.log}, result.out / "curves.png")
    say(next_steps(args, None if val is None else args.val_data or args.data))


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

    from ..hub.load import from_pretrained
    from ..models import create_model
    from ..registry import list_models
    from ..scoring.evaluation import match_classes

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


def _train_summary(result: TrainResult) -> str:
    if result.top1 is None or result.best_epoch is None:
        return f"wrote {result.out / 'model'}"
    several = result.map is not None
    name, last, most = ("mAP", result.map, result.best_map) if several else ("top-1", result.top1, result.best_top1)
    best = f", best {most:.2f} % after epoch {result.best_epoch + 1}"
    return f"{name} {last:.2f} %{best}; wrote {result.out / 'model'} and {result.out / 'best'}"


def add_label_maps(commands: Any) -> None:
    """Add the command `label-maps`."""
    summary = "write a teacher's probabilities for each place of the training images, for token labelling"
    example = "label-maps photos/ --teacher resnet50 --teacher-weights resnet50.pth --out maps/"
    parser = command(commands, "label-maps", summary, example, _run_label_maps)
    add_data(parser, "a folder with train/, with a folder of images for each class; or a name: cifar10, ...")
    add_options(parser, "--teacher", required=True)
    add_options(parser, "--teacher-weights")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the maps")
    text = "the model to train: a teacher without a normalisation or a size of its own takes this model's; default "
    parser.add_argument("--model", default="deit_tiny_patch16_224", metavar="NAME", help=f"{text}%(default)s")
    text = "pixels of the teacher's input; default: its own, else those of --model"
    parser.add_argument("--img-size", type=at_least(1), metavar="N", help=text)
    parser.add_argument("--batch-size", type=at_least(1), default=64, metavar="N", help="images at once, default 64")
    add_options(parser, "--workers", "--device")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue an interrupted run")
    existing.add_argument("--overwrite", action="store_true", help="replace maps that are there")


def _run_label_maps(args: argparse.Namespace) -> int:
    from ..distributed import join_processes
    from ..registry import default_preprocessing, model_spec
    from ..training.dense import make_label_maps

    with join_processes(args.device) as process:
        records = open_data(args, args.data, "train", process, own_folder=True)
        done = make_label_maps(
            args.teacher,
            records,
            args.out,
            student=default_preprocessing(args.model, model_spec(args.model).config.image_hw),
            weights=args.teacher_weights,
            img_size=args.img_size and (args.img_size, args.img_size),
            device=process.device,
            watch=watcher("label maps"),
            **picked(args, "batch_size", "workers", "resume", "overwrite"),
        )
    height, width = done["grid"]
    say(f"wrote {args.out}: {done['images']} maps of {height}x{width} cells, {len(done['classes'])} classes")
    return EXIT_OK


def add_finetune(commands: Any) -> None:
    """Add the command `finetune`."""
    summary, example = "teach a pretrained model other classes", "finetune photos/ --out runs/photos --mode head"
    parser = command(commands, "finetune", summary, example, _run_finetune, own_help=True)
    parser.usage = "%(prog)s DATA --out FOLDER [--model SOURCE] [--mode full|head|attention|last-N] [options]"
    add_recipe(parser, "finetune", by_data=True)
    text = "a folder with a folder of images for each class, or with train/ and val/; or a name: cifar10, ..."
    add_data(parser, text)
    text = (
        "images to choose the best epoch or penalty by, a folder or a name; default: those of DATA if it has any, "
        f"else, and with the word {SPLIT}, a share of the training images"
    )
    parser.add_argument("--val-data", metavar="DATA", help=text)
    parser.add_argument("--val-fraction", type=float, default=0.2, metavar="X", help="that share, default 0.2")
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="seed of that choice, default 0")
    text = "images that have no part in any choice; the best model is scored on them at the end"
    parser.add_argument("--test-data", metavar="DATA", help=text)
    add_folder(parser, "models, figures, recipe and saved state")
    text = "weights to start from: a name, a folder or a Hub repository; default: what comes with the package"
    parser.add_argument("--model", metavar="SOURCE", help=text)
    text = "trained parts: everything; the heads alone, in seconds, on features computed once; or the last N blocks; "
    parser.add_argument("--mode", default="full", metavar="full|head|attention|last-N", help=f"{text}default full")
    text = "start a class's row of the head from the row of the model's class of the same name"
    parser.add_argument("--warm-start", action="store_true", help=text)
    add_options(parser, "--teacher", "--teacher-weights", "--teacher-precision")
    add_options(parser, *LOADING, "--workers", "--device", "--cache", "--tensorboard", "--report-to")
    text = "at the end, draw curves, confusion matrix and worst mistakes into --out"
    parser.add_argument("--plot", action="store_true", help=text)
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push the best model to the Hub")
    layouts = ["native", "timm", "transformers"]
    parser.add_argument("--layout", choices=layouts, default="native", help="of the pushed model, default native")


def _run_finetune(args: argparse.Namespace) -> int:
    from ..distributed import join_processes
    from ..finetuning.adapt import check_mode
    from ..finetuning.finetune import finetune, recipe_for, validation_source
    from ..hub.load import from_pretrained
    from ..show.charts import find_matplotlib
    from ..trackers import chosen_trackers

    check_fresh(args)
    check_mode(args.mode)
    chosen_trackers(args.report_to, tensorboard=args.tensorboard)
    if args.teacher is None and args.teacher_weights is not None:
        raise ConfigError("--teacher-weights belong to a teacher; name it with --teacher")
    if args.layout != "native" and args.push_to_hub is None:
        raise ConfigError("--layout is of the model that is pushed; name its repository with --push-to-hub")
    unused = [
        name
        for name in recipe_changes(args)
        if name not in ("img_size", "precision", "seed", "class_weights", "sampling")
    ]
    if unused and args.mode == "head":
        logger.warning("mode head has no use for --%s", ", --".join(unused).replace("_", "-"))
    start = chosen_model(args)
    if args.plot:
        find_matplotlib()  # before anything is read or fetched
    with join_processes(args.device) as process:
        records = open_data(args, args.data, "train", process)
        model = from_pretrained(start, **loading(args))
        recipe = recipe_for(
            records.name,
            model,
            images=len(records),
            teacher=args.teacher is not None,
            recipe=None if args.recipe is None else chosen_recipe(args),
            **recipe_changes(args),
        )
        recipe = recipe.for_several_labels() if records.multi_label else recipe
        finished = None if state_file(args).exists() else 0
        display = TrainingDisplay(recipe.total_epochs, finished=finished, images=images_at_once(recipe))

        def work() -> None:
            own = None if args.val_data == SPLIT else validation_source(args.data, args.val_data)
            val, test = (
                source and open_data(args, source, "val", process, classes=records.classes, own_folder=True)
                for source in (own, args.test_data)
            )
            checked = f"{args.val_fraction:.0%} of them set aside" if val is None else f"{len(val)} for validation"
            settings = "" if args.mode == "head" else f", recipe {recipe.preset}"
            data = f"{len(records)} images of {len(records.classes)} classes, {checked}"
            say(f"{start}, mode {args.mode}{settings}: {data}; into {args.out}")
            result = finetune(
                model,
                train=records,
                val=val,
                test=test,
                recipe=recipe,
                teacher=given_teacher(args, model, len(records.classes), process.device),
                device=process.device,
                watch=watcher("features") if args.mode == "head" else display.watch,
                on_epoch=display.show_epoch,
                **picked(
                    args, "out", "mode", "warm_start", "val_fraction", "split_seed", "plot", "push_to_hub", "layout"
                ),
                **picked(args, "workers", "cache", "tensorboard", "report_to"),
            )
            say(_finetune_summary(result))
            say(next_steps(args, args.test_data or own, publishes=True))

        kept = "the features computed so far stay, and the same command goes on from there"
        return run_to_end(args, recipe, display, work, kept=kept if args.mode == "head" else None)


def _accuracy(figures: Mapping[str, Any]) -> str:
    """The figure that chose the weights; top-1 goes without its name."""
    return f"mAP {figures['map']:.2f} %" if "map" in figures else f"{figures['top1']:.2f} %"


def _finetune_summary(result: FinetuneResult) -> str:
    figures = [
        f"{name} {_accuracy(result.metrics[part])} of {result.metrics[part]['images']} images"
        for part, name in (("val", "validation"), ("test", "test"))
        if part in result.metrics
    ]
    if (fitted := result.metrics.get("fitted_images", 0)) > result.metrics["train_images"]:
        figures[0] += f" before the head was fitted to all {fitted}"
    pushed = f"; pushed to {result.address}" if result.address else ""
    return f"{', '.join(figures)}; wrote {result.out / 'best'} and the like for timm and transformers{pushed}"
