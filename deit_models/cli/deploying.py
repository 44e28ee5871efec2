"""`deit-models export` and `bench`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import EXIT_OK, add_json, add_loading, add_token_merging, at_least, command, device, loading

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
    from ..deploy.formats import format_of
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
