"""`deit-models finetune`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .arguments import (
    TrainingDisplay,
    add_data,
    add_loading,
    add_workers,
    chosen_model,
    command,
    loading,
    open_data,
    watch_features,
)
from .runs import add_folder, add_image_cache, add_teacher, check_fresh, given_teacher, run_to_end, say, state_file
from .training import add_recipe, chosen_recipe, recipe_changes

if TYPE_CHECKING:
    from ..data.records import ImageRecords
    from ..distributed import Process
    from ..finetuning.run import FinetuneResult
    from ..models.layers import ImageClassifier
    from ..training.recipe import Recipe


SPLIT = "split"


def add_finetune(commands: Any) -> None:
    """The command `finetune`."""
    summary, example = "teach a pretrained model other classes", "finetune photos/ --out runs/photos --mode head"
    parser = command(commands, "finetune", summary, example, _run, own_help=True)
    parser.usage = "%(prog)s DATA --out FOLDER [--model SOURCE] [--mode full|head|last-N] [options]"
    add_recipe(parser, "finetune", by_data=True)
    add_data(
        parser, "a folder with a folder of images for each class, or with train/ and val/; or a name: cifar10, ..."
    )
    text = (
        "images to choose the best epoch or penalty by, a folder or a name; default: those of DATA if it has any, "
        f"else, and with the word {SPLIT}, a share of the training images"
    )
    parser.add_argument("--val-data", metavar="DATA", help=text)
    parser.add_argument("--val-fraction", type=float, default=0.2, metavar="X", help="that share, default 0.2")
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="which images it is, default 0")
    text = "images that have no part in any choice, to score the best model on at the end"
    parser.add_argument("--test-data", metavar="DATA", help=text)
    add_folder(parser, "models, figures, recipe and what a run goes on from")
    text = "weights to begin with: a name, a folder or a Hub repository; default: what comes with the package"
    parser.add_argument("--model", metavar="SOURCE", help=text)
    text = (
        "what learns: everything; the heads alone, in seconds, on features computed once; or the last N blocks; "
        "default full"
    )
    parser.add_argument("--mode", default="full", metavar="full|head|last-N", help=text)
    text = "begin a class's row of the head with that of the model's class of the same name"
    parser.add_argument("--warm-start", action="store_true", help=text)
    add_teacher(parser, required=False)
    add_loading(parser)
    add_workers(parser)
    add_image_cache(parser)
    text = "at the end, draw curves, confusion matrix and worst mistakes into --out"
    parser.add_argument("--plot", action="store_true", help=text)
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push the best model to the Hub")
    layouts = ["native", "timm", "transformers"]
    parser.add_argument("--layout", choices=layouts, default="native", help="of what is pushed, default native")


def _run(args: argparse.Namespace) -> int:
    from ..distributed import join_processes
    from ..hub.load import from_pretrained
    from ..training.state import find_matplotlib

    check_fresh(args)
    args.model = chosen_model(args)
    if args.plot:
        find_matplotlib()  # before anything is read or fetched
    with join_processes(args.device) as process:
        records = open_data(args, args.data, "train", process)
        model = from_pretrained(args.model, **loading(args))
        recipe = _recipe(args, model, records)
        display = TrainingDisplay(recipe.total_epochs, finished=None if state_file(args).exists() else 0)
        kept = "the features computed so far stay, and the same command goes on from there"
        return run_to_end(
            args,
            recipe,
            display,
            lambda: _finetune(args, model, records, recipe, display, process),
            kept=kept if args.mode == "head" else None,
        )


def _recipe(args: argparse.Namespace, model: ImageClassifier, records: ImageRecords) -> Recipe:
    from ..finetuning.run import recipe_for

    if args.recipe is not None:
        return chosen_recipe(args)
    has_teacher = args.teacher is not None
    return recipe_for(records.name, model, images=len(records), teacher=has_teacher, **recipe_changes(args))


def _finetune(
    args: argparse.Namespace,
    model: ImageClassifier,
    records: ImageRecords,
    recipe: Recipe,
    display: TrainingDisplay,
    process: Process,
) -> None:
    from ..finetuning.run import finetune

    val = _validation(args, process, records)
    test = None
    if args.test_data is not None:
        test = open_data(args, args.test_data, "val", process, classes=records.classes, own_folder=True)
    checked = f"{args.val_fraction:.0%} of them set aside" if val is None else f"{len(val)} for validation"
    settings = "" if args.mode == "head" else f", recipe {recipe.preset}"
    data = f"{len(records)} images of {len(records.classes)} classes, {checked}"
    say(f"{args.model}, mode {args.mode}{settings}: {data}; into {args.out}")
    result = finetune(
        model,
        train=records,
        val=val,
        test=test,
        out=args.out,
        mode=args.mode,
        recipe=recipe,
        teacher=given_teacher(args, model, len(records.classes), process.device),
        warm_start=args.warm_start,
        val_fraction=args.val_fraction,
        split_seed=args.split_seed,
        plot=args.plot,
        push_to_hub=args.push_to_hub,
        layout=args.layout,
        device=process.device,
        workers=args.workers,
        cache=args.cache,
        watch=watch_features if args.mode == "head" else display.watch,
        on_epoch=display.show_epoch,
    )
    say(_summary(result))


def _validation(args: argparse.Namespace, process: Process, records: ImageRecords) -> ImageRecords | None:
    from ..data.datasets import has_validation

    if args.val_data not in (None, SPLIT):
        return open_data(args, args.val_data, "val", process, classes=records.classes, own_folder=True)
    if args.val_data is None and has_validation(args.data):
        return open_data(args, args.data, "val", process, classes=records.classes)
    return None


def _summary(result: FinetuneResult) -> str:
    figures = [
        f"{name} {result.metrics[part]['top1']:.2f} % of {result.metrics[part]['images']} images"
        for part, name in (("val", "validation"), ("test", "test"))
        if part in result.metrics
    ]
    pushed = f"; pushed to {result.address}" if result.address else ""
    return f"{', '.join(figures)}; wrote {result.out / 'best'} and the like for timm and transformers{pushed}"
