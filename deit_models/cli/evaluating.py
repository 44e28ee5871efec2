"""`deit-models evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .arguments import (
    EXIT_FAILED,
    EXIT_OK,
    add_data,
    add_json,
    add_loading,
    add_workers,
    at_least,
    command,
    loading,
    open_data,
)
from .progress import process_number, watch_evaluation

if TYPE_CHECKING:
    from ..models.layers import ImageClassifier
    from ..training.evaluation import Evaluation


def add_evaluate(commands: Any) -> None:
    """The command `evaluate`."""
    summary = "measure a model's accuracy on labelled images"
    parser = command(commands, "evaluate", summary, "evaluate deit_tiny_patch16_224 imagenet/", _run_evaluate)
    parser.add_argument("source", metavar="model", help="a name, a folder, a weights file or a Hub repository")
    add_data(parser, "a folder with val/ or with a folder of images for each class, or a name such as cifar10")
    parser.add_argument("--split", choices=["val", "train"], default="val", help="default val")
    parser.add_argument("--batch-size", type=at_least(1), default=256, metavar="N", help="images at once, default 256")
    add_workers(parser)
    parser.add_argument("--precision", choices=["float32", "bf16", "fp16"], default="float32", help="default float32")
    styles = ["checkpoint", "timm", "transformers"]
    text = "whose way to resize and crop the images; default checkpoint: what the weights were published with"
    parser.add_argument("--style", choices=styles, default="checkpoint", help=text)
    text = "take the data's classes in their own order, although they are called otherwise than the model's"
    parser.add_argument("--ignore-class-names", action="store_true", help=text)
    parser.add_argument("--model", metavar="NAME", help="the model that a bare weights file holds")
    add_loading(parser)
    add_json(parser)


def _run_evaluate(args: argparse.Namespace) -> int:
    from ..hub.load import from_pretrained
    from ..training.distributed import join_processes
    from ..training.evaluation import evaluate
    from ..transforms import transform_for

    model = from_pretrained(args.source, model=args.model, **loading(args))
    transform = transform_for(model, style=args.style)
    with join_processes(args.device) as process:
        records = open_data(args, args.data, args.split, process, own_folder=True)
        result = evaluate(
            model,
            records,
            batch_size=args.batch_size,
            workers=args.workers,
            device=process.device,
            precision=args.precision,
            transform=transform,
            ignore_class_names=args.ignore_class_names,
            watch=watch_evaluation,
        )
    if process_number() == 0:
        print(_as_json(args, model, result) if args.json else _as_text(args, model, result))
        if result.skipped:
            total = result.images + result.skipped
            print(f"deit-models: {result.skipped} of {total} images could not be read", file=sys.stderr)
    return EXIT_FAILED if result.skipped else EXIT_OK


def _published(model: ImageClassifier) -> dict[str, Any] | None:
    """The accuracy that these weights are published with, in percent, and on which data."""
    origin = model.origin
    if origin is None or origin.top1 is None:
        return None
    return {"top1": origin.top1, "top5": origin.top5, "dataset": origin.dataset}


def _as_json(args: argparse.Namespace, model: ImageClassifier, result: Evaluation) -> str:
    chosen = {name: getattr(args, name) for name in ("data", "split", "style", "precision")}
    return json.dumps({"model": args.source, **chosen, **asdict(result), "published": _published(model)}, indent=2)


def _as_text(args: argparse.Namespace, model: ImageClassifier, result: Evaluation) -> str:
    rows = {"top-1": f"{result.top1:.2f} %", "top-5": f"{result.top5:.2f} %"}
    if published := _published(model):
        for name, figure in (("top-1", published["top1"]), ("top-5", published["top5"])):
            rows[name] += "" if figure is None else f"  published: {figure} % ({published['dataset']})"
    rows |= {f"{name} head": f"{top1:.2f} % top-1" for name, top1 in result.heads.items()}
    rows |= {"loss": f"{result.loss:.4f}", "images": str(result.images), "skipped": str(result.skipped)}
    lines = [f"{args.source} on {args.data}, {args.split}"]
    return "\n".join(lines + [f"  {name:<20}{value}" for name, value in rows.items()])
