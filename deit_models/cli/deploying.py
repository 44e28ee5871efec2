"""`deit-models export`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import EXIT_OK, add_json, add_loading, command, loading

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
    parser.add_argument("--model", metavar="NAME", help="the model that a bare weights file holds")
    add_loading(parser)
    add_json(parser)


def _run_export(args: argparse.Namespace) -> int:
    from ..deploy.export import export
    from ..deploy.formats import format_of
    from ..hub.load import from_pretrained

    kind = args.format or format_of(args.file)
    model = from_pretrained(args.source, model=args.model, **loading(args))
    done = export(model, args.file, format=kind, preprocessing=args.preprocessing, tolerance=args.tolerance)
    if args.json:
        print(json.dumps(asdict(done), default=str))
    else:
        difference = f"logits differ by at most {done.max_abs_diff:.2g} from the model's ({done.tolerance:g} allowed)"
        print(f"wrote {done.path} ({done.format}, {done.size_bytes / 1e6:.1f} MB); run and compared: {difference}")
    return EXIT_OK
