"""`deit-models predict`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import ConfigError, ImageError
from .arguments import EXIT_FAILED, EXIT_OK, add_loading, add_token_merging, chosen_model, command, device, loading
from .progress import with_progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..predict import Classifier
    from ..results import Written

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
    from ..predict import find_images
    from ..results import Summary, write_results, written_name

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
    from ..results import resume_results

    if args.resume and args.output is None:
        raise ConfigError("--resume goes on with a file; name it with --output")
    return resume_results(args.output, format=args.format) if args.resume and args.output.exists() else None


def _opened(output: Path | None, *, append: bool) -> AbstractContextManager[TextIO]:
    if output is None:
        return nullcontext(sys.stdout)
    return output.open("a" if append else "w", encoding="utf-8", newline="")  # the csv module ends lines itself
