"""`deit-models export` and `bench`."""
# MERGED """`deit-models predict`."""
# MERGED """`deit-models evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import ConfigError, ImageError
from .arguments import (
    EXIT_FAILED,
    EXIT_OK,
    add_data,
    add_json,
    add_loading,
    add_token_merging,
    add_workers,
    at_least,
    chosen_model,
    command,
    device,
    loading,
    open_data,
    process_number,
    watch_evaluation,
    with_progress,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import Evaluation
    from ..models.layers import ImageClassifier
    from ..predict import Classifier
    from .results import Written


_JUDGES, _CALIBRATION = 64, 128
_TUNING = ("precision", "min_agreement", "token_merging")


def add_predict(commands: Any) -> None:
    """The command `predict`."""
    example = "predict photos/ --model deit_small_patch16_224 --format csv --output labels.csv"
    parser = command(commands, "predict", "classify images", example, _run_predict)
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders that are searched for them")
    parser.add_argument("--model", help="a name, a folder or a Hub repository; default: what comes with the package")
    add_loading(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to show for each image, default 5")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once, default 32")
    text = "decoding processes, 0: none besides this one; default: threads of this one, processes beside a GPU"
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    parser.add_argument("--device", type=device, help="cpu, cuda, mps, ...; default: the GPU if there is one")
    text = "decode and resize faster, to nearly the same pixels; brings most for photographs of many megapixels"
    parser.add_argument("--fast-pixels", action="store_true", help=text)
    text = "compute with the fastest backend that agrees with the model; found the first time, which takes a while"
    parser.add_argument("--optimize", action="store_true", help=text)
    text = "of --optimize: auto (default) takes bf16 where it is faster and agrees; int8 is fitted to the first images"
    parser.add_argument("--precision", choices=["auto", "float32", "bf16", "int8"], help=text)
    text = "of --optimize: share of the first images that must keep their class, default 0.99"
    parser.add_argument("--min-agreement", type=float, metavar="X", help=text)
    add_token_merging(parser)
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--format", choices=["text", "jsonl", "csv"], default="text", help="default text")
    written.add_argument("--json", dest="format", action="store_const", const="jsonl", help="short for --format jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the screen")
    text = "go on where an interrupted run left off: leave out what the --output file, csv or jsonl, holds already"
    parser.add_argument("--resume", action="store_true", help=text)


def _run_predict(args: argparse.Namespace) -> int:
    from ..data.datasets import find_images
    from .results import Summary, write_results, written_name

    for name in _TUNING:
        if getattr(args, name) is not None and not args.optimize:
            raise ConfigError(f"--{name.replace('_', '-')} is for --optimize; pass both")
    paths = [path for given in args.images for path in (find_images(given) if given.is_dir() else [given])]
    total, before = len(paths), _written(args)
    if before is not None:
        paths = [path for path in paths if written_name(str(path)) not in before.names]
    results = _classifier(args, paths).classify_files(paths, top_k=args.top_k, workers=args.workers)
    going_on = before is not None and args.output.stat().st_size > 0
    with _opened(args.output, append=before is not None) as stream:
        shown = with_progress(results, len(paths), on_screen=stream.isatty())
        summary = write_results(shown, stream, format=args.format, header=not going_on)
    if before is not None:
        summary = Summary(0, before.summary.failed + summary.failed)
    if summary.failed:
        print(f"deit-models: {len(summary.failed)} of {total} images could not be read:", file=sys.stderr)
        for result in summary.failed:
            print(f"  {result.error}", file=sys.stderr)
    return EXIT_FAILED if summary.failed else EXIT_OK


def _classifier(args: argparse.Namespace, paths: list[Path]) -> Classifier:
    from ..predict import Classifier

    options: dict[str, Any] = {"batch_size": args.batch_size, "fast_pixels": args.fast_pixels}
    classifier = Classifier(chosen_model(args), device=args.device, **options, **loading(args))
    if not args.optimize:
        return classifier
    from ..deploy.optimize import optimize

    count = _CALIBRATION if args.precision == "int8" else _JUDGES
    judges = _readable(paths[:count], classifier.transform.levels)
    tuning = {name: given for name in _TUNING if (given := getattr(args, name)) is not None}
    tuning |= {"sample": args.batch_size, "calibration": judges, "cache_dir": args.cache_dir}
    fast = optimize(classifier.model, preprocessing=True, **tuning)
    return Classifier(fast, labels=classifier.labels, **options)


def _readable(paths: list[Path], decode: Callable[[Path], Tensor]) -> Tensor | None:
    """Some of the images that are to be classified, for `optimize` to judge by."""
    import torch

    found = []
    for path in paths:
        with suppress(ImageError):
            found.append(decode(path))
    return torch.stack(found) if found else None


def _written(args: argparse.Namespace) -> Written | None:
    """What an earlier run wrote, if this one is to go on with it; None for a fresh start."""
    from .results import resume_results

    if args.resume and args.output is None:
        raise ConfigError("--resume goes on with a file; name it with --output")
    return resume_results(args.output, format=args.format) if args.resume and args.output.exists() else None


def _opened(output: Path | None, *, append: bool) -> AbstractContextManager[TextIO]:
    if output is None:
        return nullcontext(sys.stdout)
    return output.open("a" if append else "w", encoding="utf-8", newline="")  # the csv module ends lines itself


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
    from ..data.transforms import transform_for
    from ..distributed import join_processes
    from ..evaluation import evaluate
    from ..hub.load import from_pretrained

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


_FORMATS = ("onnx", "openvino", "torch-export")


def add_export(commands: Any) -> None:
    """The command `export`."""
    summary = "write a model as one file for another runtime"
    example = "export deit_small_patch16_224 deit_small.onnx --preprocessing"
    parser = command(commands, "export", summary, example, _run_export)
    parser.add_argument("source", help="a name, a folder, a weights file or a Hub repository")
    parser.add_argument("file", type=Path, help="what to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2")
    parser.add_argument("--format", choices=_FORMATS, help="default: what the name of the file says")
    text = "have the file normalise: it takes pixels from 0 to 255, already resized and cropped"
    parser.add_argument("--preprocessing", action="store_true", help=text)
    text = "by how much a logit may differ from the model's, default 1e-4"
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help=text)
    add_token_merging(parser)
    parser.add_argument("--model", metavar="NAME", help="the model that a bare weights file holds")
    add_loading(parser)
    add_json(parser)


def _run_export(args: argparse.Namespace) -> int:
    from ..deploy.export import export
    from ..deploy.runtimes import format_of
    from ..hub.load import from_pretrained

    kind = args.format or format_of(args.file)
    model = from_pretrained(args.source, model=args.model, **loading(args))
    options = {"preprocessing": args.preprocessing, "tolerance": args.tolerance}
    done = export(model, args.file, format=kind, token_merging=args.token_merging or 0, **options)
    if args.json:
        print(json.dumps(asdict(done), default=str))
    else:
        difference = f"logits differ by at most {done.max_abs_diff:.2g} from the model's ({done.tolerance:g} allowed)"
        print(f"wrote {done.path} ({done.format}, {done.size_bytes / 1e6:.1f} MB); run and compared: {difference}")
    return EXIT_OK


def add_bench(commands: Any) -> None:
    """The command `bench`."""
    summary = "measure how fast a model runs here, as a table for an issue"
    example = "bench deit_small_patch16_224 --batch-sizes 1 32"
    parser = command(commands, "bench", summary, example, _run_bench)
    text = "a name or an architecture file, default %(default)s; weights are random"
    parser.add_argument("model", nargs="?", default="deit_tiny_patch16_224", help=text)
    text = "images at once, default 1 8 32"
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[1, 8, 32], metavar="N", help=text)
    text = "model (as it is), eager, inductor, openvino, onnxruntime; default: all that work here"
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help=text)
    text = "default: float32, and bf16 where the device computes in it by itself"
    parser.add_argument("--precision", choices=["float32", "bf16", "int8"], help=text)
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda, mps, ...; default cpu")
    text = "how long each is timed, default 3; two calls at least"
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help=text)
    add_json(parser)


def _run_bench(args: argparse.Namespace) -> int:
    from ..deploy.bench import bench, table

    rows = []
    for row in bench(
        args.model,
        batch_sizes=args.batch_sizes,
        backends=args.backends,
        precision=args.precision,
        device=args.device,
        seconds=args.seconds,
    ):
        rows.append(row)
        if sys.stderr.isatty():
            told = row.error or f"{row.images_per_second:.1f} images/s"
            print(f"{row.backend} in {row.precision}, batch {row.batch_size}: {told}", file=sys.stderr)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(args.model, rows, args.device))
    return EXIT_OK
