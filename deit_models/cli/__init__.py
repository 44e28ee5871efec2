"""The `deit-models` command: parses, calls the package, prints. It decides nothing itself."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import DeitModelsError
from ..files import printable
from .arguments import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, process_number
from .catalogue import add_cache, add_convert, add_info, add_list
from .inference import add_bench, add_embed, add_evaluate, add_export, add_predict
from .searching import add_search
from .showing import add_demo, add_explain
from .train import add_distill, add_finetune, add_label_maps, add_train

_COMMANDS = (
    *(add_list, add_info, add_predict, add_explain, add_embed, add_evaluate),
    *(add_finetune, add_train, add_distill, add_label_maps, add_search),
    *(add_convert, add_export, add_bench, add_cache, add_demo),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 an explained failure, 2 wrong usage (from argparse)."""
    try:
        given = [*(sys.argv[1:] if argv is None else argv)]
        parser = build_parser()
        for text in given:
            if not text or (text.startswith("--") and text.endswith("=")):  # Path("") would be the current folder
                parser.error(f"{text[:-1] or 'an argument'} is empty; is a variable of the shell not set?")
        args = parser.parse_args(given)
        # one process of a run prints the warnings of all
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine())
        logging.basicConfig(handlers=[handler], level=logging.ERROR if process_number() else logging.WARNING)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, e.g. `head`, has closed the pipe
        sys.stdout = None  # or the interpreter would try to write the rest at its end
        return EXIT_OK
    except (DeitModelsError, OSError) as error:
        who = f" (process {process_number()})" if process_number() else ""
        print(printable(f"deit-models{who}: {error}"), file=sys.stderr)
        if not isinstance(error, DeitModelsError):
            sys.stdout = None  # perhaps it cannot be written
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("deit-models: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


class _OneLine(logging.Formatter):
    """A message that moves no cursor: file names may hold control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


def build_parser() -> argparse.ArgumentParser:
    """Parser of all commands; each command sets `run`."""
    parser = argparse.ArgumentParser(
        prog="deit-models",
        description="Data-efficient image transformers: find, load, classify, fine-tune, train, convert, export.",
        epilog="example: deit-models predict photo.jpg",
    )
    parser.add_argument("--version", action="version", version=f"deit-models {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser
