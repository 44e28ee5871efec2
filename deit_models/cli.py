"""The `deit-models` command: parses, calls the package, prints. No logic of its own."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .errors import DeitModelsError
from .hub.manifest import Checkpoint, weights_dir
from .registry import list_models, model_info

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status: 0 fine, 1 a failure that was explained, 2 wrong usage (from argparse)."""
    try:
        args = build_parser().parse_args(argv)
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        sys.stdout = None  # or the interpreter would try to write the rest at its end
        return EXIT_OK
    except (DeitModelsError, OSError) as error:
        print(f"deit-models: {error}", file=sys.stderr)
        if not isinstance(error, DeitModelsError):
            sys.stdout = None  # it may be what cannot be written
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("deit-models: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = argparse.ArgumentParser(
        prog="deit-models",
        description="Data-efficient image transformers: find, load, classify, convert.",
        epilog="example: deit-models predict photo.jpg",
    )
    parser.add_argument("--version", action="version", version=f"deit-models {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_list, _add_info, _add_predict, _add_convert, _add_cache):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, summary: str, example: str, run: Callable[[argparse.Namespace], int] | None
) -> argparse.ArgumentParser:
    """Add a command's parser; `example` is what to type after `deit-models`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: deit-models {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_list(commands: Any) -> None:
    parser = _command(commands, "list", "list model names", "list 'deit_*distilled*'", _run_list)
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, default all")
    parser.add_argument("--pretrained", action="store_true", help="only models with published weights")
    _add_json(parser)


def _run_list(args: argparse.Namespace) -> int:
    names = list_models(args.pattern, pretrained=args.pretrained)
    if args.json:
        print(json.dumps(names))
    elif names:
        print("\n".join(names))
    else:
        print(f"deit-models: no model matches {args.pattern!r}", file=sys.stderr)
    return EXIT_OK if names else EXIT_FAILED


def _add_info(commands: Any) -> None:
    example = "info deit_tiny_patch16_224"
    parser = _command(commands, "info", "show what is known of a model", example, _run_info)
    parser.add_argument("model", help="a name from `deit-models list`")
    _add_json(parser)


def _run_info(args: argparse.Namespace) -> int:
    info = model_info(args.model)
    print(json.dumps(asdict(info), indent=2) if args.json else _describe(info))
    return EXIT_OK


def _describe(info: Checkpoint) -> str:
    top5 = "" if info.top5 is None else f", {info.top5} % top-5"
    rows = {
        "family": info.family + (", distilled" if info.distilled else ""),
        "paper": info.paper,
        "parameters": f"{info.params:,}",
        "MACs": f"{info.macs / 1e9:.2f} G",
        "input": f"{info.input_size}x{info.input_size}",
        "classes": info.num_classes,
        "accuracy": None if info.top1 is None else f"{info.top1} % top-1{top5}",
        "measured on": info.dataset,
        "licence": info.licence,
        "transform": info.preprocessing,
        "note": info.note,
        "weights": "none published" if not info.sources else None,
    }
    lines = [info.name, *(f"  {key:<12}{value}" for key, value in rows.items() if value is not None)]
    return "\n".join(lines + [f"  {'weights' if i == 0 else '':<12}{source}" for i, source in enumerate(info.sources)])


def _add_predict(commands: Any) -> None:
    example = "predict photos/ --model deit_small_patch16_224 --format csv --output labels.csv"
    parser = _command(commands, "predict", "classify images", example, _run_predict)
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders that are searched for them")
    parser.add_argument("--model", help="a name, a folder or a Hub repository; default: what comes with the package")
    _add_loading(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to show for each image, default 5")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once, default 32")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="decoding processes, default 0: this one")
    parser.add_argument("--device", type=_device, help="cpu, cuda, mps, ...; default: the GPU if there is one")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--format", choices=["text", "jsonl", "csv"], default="text", help="default text")
    written.add_argument("--json", dest="format", action="store_const", const="jsonl", help="short for --format jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the screen")


def _device(name: str) -> str:
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {name!r} on this machine; the CPU is 'cpu'") from error
    return name


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--cache-dir", type=Path, help="where to keep downloads")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "cache_dir": args.cache_dir, "local_files_only": args.offline}


def _run_predict(args: argparse.Namespace) -> int:
    from .predict import DEFAULT_MODEL, Classifier, find_images
    from .results import write_results

    paths = [path for given in args.images for path in (find_images(given) if given.is_dir() else [given])]
    classifier = Classifier(
        args.model or DEFAULT_MODEL, device=args.device, batch_size=args.batch_size, **_loading(args)
    )
    results = classifier.classify_files(paths, top_k=args.top_k, workers=args.workers)
    # newline="": the csv module ends lines itself
    opened = args.output.open("w", encoding="utf-8", newline="") if args.output is not None else nullcontext(sys.stdout)
    with opened as stream:
        shown = _with_progress(results, len(paths), on_screen=stream.isatty())
        summary = write_results(shown, stream, format=args.format)
    if summary.failed:
        print(f"deit-models: {len(summary.failed)} of {len(paths)} images could not be read:", file=sys.stderr)
        for result in summary.failed:
            print(f"  {result.error}", file=sys.stderr)
    return EXIT_FAILED if summary.failed else EXIT_OK


def _with_progress(results: Iterator[Any], total: int, *, on_screen: bool) -> Iterator[Any]:
    """A bar on a terminal, unless the results appear there; none in a pipe."""
    from huggingface_hub.utils.tqdm import tqdm

    wanted = sys.stderr.isatty() and not on_screen and total > 1
    return iter(tqdm(results, total=total, unit="image", disable=not wanted))  # type: ignore[no-untyped-call]


def _add_convert(commands: Any) -> None:
    example = "convert deit_tiny.pth out/ --model deit_tiny_patch16_224 --layout transformers"
    parser = _command(commands, "convert", "write a checkpoint in another layout", example, _run_convert)
    parser.add_argument("source", help="a name, a folder, a weights file or a Hub repository")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--layout", choices=["native", "timm", "transformers"], default="native", help="default native")
    parser.add_argument("--model", help="the model that a bare weights file holds")
    dtypes = ["float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="default float32")
    _add_loading(parser)


def _run_convert(args: argparse.Namespace) -> int:
    import torch

    from .hub.load import from_pretrained

    model = from_pretrained(args.source, model=args.model, dtype=getattr(torch, args.dtype), **_loading(args))
    model.save_pretrained(args.destination, layout=args.layout)
    print(f"wrote {args.destination} ({args.layout}, {args.dtype})")
    return EXIT_OK


def _add_cache(commands: Any) -> None:
    summary = "list, verify, clear or record downloaded weights"
    actions = _command(commands, "cache", summary, "cache verify", None).add_subparsers(required=True, metavar="ACTION")
    recorded = "digests, revisions and first logits into the manifest (maintainers)"
    parsers = {}
    for name, text, example, run in (
        ("list", "show the weights in the cache", "", _run_cache_list),
        ("verify", "hash the cached weights and compare", "", _run_cache_verify),
        ("clear", "remove cached weights", " deit_tiny_patch16_224", _run_cache_clear),
        ("record", f"download every published copy and write {recorded}", " deit_tiny_patch16_224", _run_cache_record),
    ):
        parsers[name] = _command(actions, name, text, f"cache {name}{example}", run)
        parsers[name].add_argument("--cache-dir", type=Path, help="where downloads are kept")
    for name in ("list", "verify", "clear"):
        _add_json(parsers[name])
    chosen = parsers["clear"].add_mutually_exclusive_group(required=True)
    chosen.add_argument("name", nargs="?", help="a model, or a Hub repository or URL")
    chosen.add_argument("--all", action="store_true", help="all that `cache list` shows, and broken-off downloads")
    parsers["record"].add_argument("names", nargs="*", help="models, default all")
    parsers["record"].add_argument("--manifest", type=Path, help="manifest.toml to write, default the installed one")


def _run_cache_list(args: argparse.Namespace) -> int:
    from .hub.cache import cached_files

    return _print_files(cached_files(args.cache_dir), args, "the cache holds no weights")


def _run_cache_clear(args: argparse.Namespace) -> int:
    from .hub.cache import clear_cache

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
    from .hub.cache import verify_cache

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
    from .hub.fetch import Access
    from .hub.record import Outcome, record

    def report(outcome: Outcome) -> None:
        print(f"{outcome.model}  {outcome.source}  {outcome.error or 'recorded'}", flush=True)

    manifest = args.manifest or weights_dir() / "manifest.toml"
    outcomes = record(manifest, args.names, access=Access(cache_dir=args.cache_dir), report=report)
    return EXIT_FAILED if any(outcome.error is not None for outcome in outcomes) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
