"""`deit-models list`, `info`, `convert` and `cache`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint import ModelInfo, weights_dir
from ..registry import list_models, model_info
from .arguments import EXIT_FAILED, EXIT_OK, LOADING, add_options, command, loading


def add_list(commands: Any) -> None:
    """Add the command `list`."""
    parser = command(commands, "list", "list model names", "list 'deit_*distilled*'", _run_list)
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, default all")
    parser.add_argument("--pretrained", action="store_true", help="only models with published weights")
    add_options(parser, "--json")


def _run_list(args: argparse.Namespace) -> int:
    names = list_models(args.pattern, pretrained=args.pretrained)
    if args.json:
        print(json.dumps(names))
    elif names:
        print("\n".join(names))
        headless = [name for name in names if not model_info(name).num_classes]
        if headless:
            print(f"deit-models: without a head or classes, for features: {', '.join(headless)}", file=sys.stderr)
    else:
        print(f"deit-models: no model matches {args.pattern!r}", file=sys.stderr)
    return EXIT_OK if names else EXIT_FAILED


def add_info(commands: Any) -> None:
    """Add the command `info`."""
    example = "info deit_tiny_patch16_224"
    parser = command(commands, "info", "show what is known of a model", example, _run_info)
    parser.add_argument("model", help="a name from `deit-models list`")
    add_options(parser, "--json")


def _run_info(args: argparse.Namespace) -> int:
    info = model_info(args.model)
    print(json.dumps(asdict(info), indent=2) if args.json else _describe(info))
    return EXIT_OK


def _describe(info: ModelInfo) -> str:
    accuracy = ", ".join(f"{value} % {name}" for name, value in info.accuracies.items())
    headless = "none: it gives features; finetune, or num_classes=N, gives it a head"
    rows = {
        "family": info.family + (", distilled" if info.distilled else ""),
        "paper": info.paper,
        "parameters": f"{info.params:,}",
        "MACs": f"{info.macs / 1e9:.2f} G",
        "input": f"{info.input_size}x{info.input_size}",
        "classes": info.num_classes or headless,
        "accuracy": accuracy or None,
        "measured on": info.dataset,
        "licence": info.licence,
        "transform": info.preprocessing,
        "note": info.note,
        "weights": "none published" if not info.sources else None,
    }
    lines = [info.name, *(f"  {key:<12}{value}" for key, value in rows.items() if value is not None)]
    return "\n".join(lines + [f"  {'weights' if i == 0 else '':<12}{source}" for i, source in enumerate(info.sources)])


def add_convert(commands: Any) -> None:
    """Add the command `convert`."""
    example = "convert deit_tiny.pth out/ --model deit_tiny_patch16_224 --layout transformers"
    parser = command(commands, "convert", "write a checkpoint in another layout", example, _run_convert)
    parser.add_argument("source", help="a name, a folder, a weights file or a Hub repository")
    parser.add_argument("destination", type=Path, help="folder to write")
    layouts = ["native", "timm", "timm-conv", "transformers"]
    parser.add_argument("--layout", choices=layouts, default="native", help="default native; timm-conv: of LeViT only")
    add_options(parser, "--model")
    dtypes = ["float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="default float32")
    add_options(parser, *LOADING)


def _run_convert(args: argparse.Namespace) -> int:
    import torch

    from ..hub.load import from_pretrained

    model = from_pretrained(args.source, model=args.model, dtype=getattr(torch, args.dtype), **loading(args))
    model.save_pretrained(args.destination, layout=args.layout)
    print(f"wrote {args.destination} ({args.layout}, {args.dtype})")
    return EXIT_OK


def add_cache(commands: Any) -> None:
    """Add the command `cache` with its actions."""
    summary = "list, verify, clear or record downloaded weights"
    actions = command(commands, "cache", summary, "cache verify", None).add_subparsers(required=True, metavar="ACTION")
    recorded = "digests, revisions and first logits into the manifest (maintainers)"
    parsers = {}
    for name, text, example, run in (
        ("list", "show the weights in the cache", "", _run_cache_list),
        ("verify", "hash the cached weights and compare", "", _run_cache_verify),
        ("clear", "remove cached weights", " deit_tiny_patch16_224", _run_cache_clear),
        ("record", f"download every published copy and write {recorded}", " deit_tiny_patch16_224", _run_cache_record),
    ):
        parsers[name] = command(actions, name, text, f"cache {name}{example}", run)
        parsers[name].add_argument("--cache-dir", type=Path, help="where downloads are kept")
    for name in ("list", "verify", "clear"):
        add_options(parsers[name], "--json")
    chosen = parsers["clear"].add_mutually_exclusive_group(required=True)
    chosen.add_argument("name", nargs="?", help="a model, or a Hub repository or URL")
    chosen.add_argument("--all", action="store_true", help="all files of `cache list`, and interrupted downloads")
    parsers["record"].add_argument("names", nargs="*", help="models and teachers, default all")
    parsers["record"].add_argument("--manifest", type=Path, help="manifest.toml to write, default the installed one")


def _run_cache_list(args: argparse.Namespace) -> int:
    from ..hub.cache import cached_files

    return _print_files(cached_files(args.cache_dir), args, "the cache holds no weights")


def _run_cache_clear(args: argparse.Namespace) -> int:
    from ..hub.cache import clear_cache

    return _print_files(clear_cache(args.name, args.cache_dir), args, "nothing to remove", heading="removed")


def _print_files(files: list[Any], args: argparse.Namespace, empty: str, heading: str = "") -> int:
    if args.json:
        print(json.dumps([asdict(file) for file in files], default=str, indent=2))
        return EXIT_OK
    for file in files:
        print(f"{heading} {file.size_bytes / 1e6:8.1f} MB  {file.model or '?'}  {file.kind}  {file.source}".strip())
    if not files:
        print(empty, file=sys.stderr)
    return EXIT_OK


def _run_cache_verify(args: argparse.Namespace) -> int:
    from ..hub.cache import verify_cache

    words = {True: "ok", False: "CHANGED", None: "no digest known"}
    verdicts = []
    for verdict in verify_cache(args.cache_dir):
        verdicts.append(verdict)
        if not args.json:
            print(f"{words[verdict.ok]:<16}{verdict.sha256[:16]}  {verdict.file.source}  {verdict.file.path}")
    if args.json:
        rows = [{**asdict(verdict.file), "ok": verdict.ok, "sha256": verdict.sha256} for verdict in verdicts]
        print(json.dumps(rows, default=str, indent=2))
    return EXIT_FAILED if any(verdict.ok is False for verdict in verdicts) else EXIT_OK


def _run_cache_record(args: argparse.Namespace) -> int:
    from ..hub.fetch import Access
    from ..hub.record import Outcome, record

    def report(outcome: Outcome) -> None:
        print(f"{outcome.model}  {outcome.source}  {outcome.error or 'recorded'}", flush=True)

    manifest = args.manifest or weights_dir() / "manifest.toml"
    outcomes = record(manifest, args.names, access=Access(cache_dir=args.cache_dir), report=report)
    return EXIT_FAILED if any(outcome.error is not None for outcome in outcomes) else EXIT_OK
