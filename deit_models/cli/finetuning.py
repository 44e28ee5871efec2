"""`deit-models finetune`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .arguments import (
    LOADING,
    TEACHER,
    add_data,
    add_options,
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
    recipe_changes,
    run_to_end,
    state_file,
)

if TYPE_CHECKING:
    from ..finetuning.finetune import FinetuneResult

SPLIT = "split"


def add_finetune(commands: Any) -> None:
    """The command `finetune`."""
    summary, example = "teach a pretrained model other classes", "finetune photos/ --out runs/photos --mode head"
    parser = command(commands, "finetune", summary, example, _run, own_help=True)
    parser.usage = "%(prog)s DATA --out FOLDER [--model SOURCE] [--mode full|head|last-N] [options]"
    add_recipe(parser, "finetune", by_data=True)
    text = "a folder with a folder of images for each class, or with train/ and val/; or a name: cifar10, ..."
    add_data(parser, text)
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
    text = "what learns: everything; the heads alone, in seconds, on features computed once; or the last N blocks; "
    parser.add_argument("--mode", default="full", metavar="full|head|last-N", help=f"{text}default full")
    text = "begin a class's row of the head with that of the model's class of the same name"
    parser.add_argument("--warm-start", action="store_true", help=text)
    add_options(parser, *TEACHER, *LOADING, "--workers", "--device", "--cache")
    text = "at the end, draw curves, confusion matrix and worst mistakes into --out"
    parser.add_argument("--plot", action="store_true", help=text)
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push the best model to the Hub")
    layouts = ["native", "timm", "transformers"]
    parser.add_argument("--layout", choices=layouts, default="native", help="of what is pushed, default native")


def _run(args: argparse.Namespace) -> int:
    from ..distributed import join_processes
    from ..finetuning.finetune import finetune, recipe_for, validation_source
    from ..hub.load import from_pretrained
    from ..training.state import find_matplotlib

    check_fresh(args)
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
        display = TrainingDisplay(recipe.total_epochs, finished=None if state_file(args).exists() else 0)

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
                **picked(args, "workers", "cache"),
            )
            say(_summary(result))

        kept = "the features computed so far stay, and the same command goes on from there"
        return run_to_end(args, recipe, display, work, kept=kept if args.mode == "head" else None)


def _summary(result: FinetuneResult) -> str:
    figures = [
        f"{name} {result.metrics[part]['top1']:.2f} % of {result.metrics[part]['images']} images"
        for part, name in (("val", "validation"), ("test", "test"))
        if part in result.metrics
    ]
    pushed = f"; pushed to {result.address}" if result.address else ""
    return f"{', '.join(figures)}; wrote {result.out / 'best'} and the like for timm and transformers{pushed}"
