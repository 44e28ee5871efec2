"""`deit-models cache`: list, verify, clear and record downloaded weights."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..hub.manifest import weights_dir
from .arguments import EXIT_FAILED, EXIT_OK, add_json, command


def add_cache(commands: Any) -> None:
    """The command `cache` with its actions."""
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
        add_json(parsers[name])
    chosen = parsers["clear"].add_mutually_exclusive_group(required=True)
    chosen.add_argument("name", nargs="?", help="a model, or a Hub repository or URL")
    chosen.add_argument("--all", action="store_true", help="all that `cache list` shows, and broken-off downloads")
    parsers["record"].add_argument("names", nargs="*", help="models, default all")
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
