"""Shared parts of the commands: parsers, options, labelled images, progress bars, exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

from ..errors import ConfigError
from ..trackers import TrackerName

if TYPE_CHECKING:
    from ..batches.loading import Watch
    from ..data.records import ImageRecords
    from ..distributed import Process

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def command(
    commands: Any,
    name: str,
    summary: str,
    example: str,
    run: Callable[[argparse.Namespace], int] | None,
    *,
    own_help: bool = False,
) -> argparse.ArgumentParser:
    """Add a command's parser; `example` is what to type after `deit-models`; `own_help` leaves --help to the caller."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: deit-models {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not own_help,
    )
    parser.set_defaults(run=run)
    return parser


def picked(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some options of a command line, as keywords for a function that has parameters of the same names."""
    return {name: getattr(args, name) for name in names}


# Options


def at_least(low: int) -> Callable[[str], int]:
    """Reader of a whole number for argparse; a number below `low` is wrong usage."""

    def read(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}; expected {low} or more")
        return int(text)

    read.__name__ = "int"  # argparse prints this name when the text is no number
    return read


def device(name: str) -> str:
    """Name of a device that exists here. Raises: ArgumentTypeError: there is no such device."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {name!r} on this machine; the CPU is 'cpu'") from error
    return name


LOADING = ("--payload", "--revision", "--cache-dir", "--offline")
_COUNT: dict[str, Any] = {"type": at_least(0), "metavar": "N"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "--json": {"action": "store_true", "help": "print JSON for programs"},
    "--device": {"type": device, "help": "cpu, cuda, mps, ...; default: the GPU if there is one"},
    "--workers": _COUNT | {"help": "decoding processes, 0: decode in this one; default: by the number of cores"},
    "--token-merging": _COUNT
    | {"help": "patch tokens that every block merges into others like them: faster, and other logits; default none"},
    "--model": {"metavar": "NAME", "help": "the model that a bare weights file holds"},
    "--payload": {"metavar": "KEY", "help": "the state dict to load from a training checkpoint, e.g. model_ema"},
    "--revision": {"help": "branch, tag or commit of a Hub repository"},
    "--cache-dir": {"type": Path, "help": "where to keep downloads"},
    "--offline": {"action": "store_true", "help": "use only what is on this machine"},
    "--cache": {
        "choices": ["auto", "ram", "none"],
        "default": "auto",
        "help": "keep small images decoded in memory: where they fit in a quarter of what is free, always (ram), or "
        "never; default auto",
    },
    "--tensorboard": {"action": "store_true", "help": "the same as --report-to tensorboard: event files in --out"},
    "--report-to": {
        "action": "append",
        "default": [],
        "choices": get_args(TrackerName),
        "help": "send settings and figures to this experiment tracker; may be given several times",
    },
    "--teacher": {
        "help": "regnety_160 (the papers'), a torchvision model, one of `deit-models list`, a folder or Hub "
        "repository, or file.py:FUNCTION, which is run"
    },
    "--teacher-weights": {"metavar": "FILE", "help": "a weights file, or the name of torchvision's weights"},
    "--teacher-precision": {"choices": ["float32", "bf16"], "default": "float32", "help": "default float32"},
}


def add_options(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Add options that several commands share, in this order; `changes` replace settings of all of them."""
    for name in names:
        parser.add_argument(name, **_OPTIONS[name], **changes)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options `LOADING`, as keywords of `from_pretrained`."""
    return picked(args, "payload", "revision", "cache_dir") | {"local_files_only": args.offline}


def chosen_model(args: argparse.Namespace) -> str:
    """The model of `--model`, else the default model, which a line on stderr then describes."""
    from ..registry import DEFAULT_MODEL, model_info

    if args.model is None:
        info = model_info(DEFAULT_MODEL)
        say(
            f"deit-models: no --model given: {DEFAULT_MODEL}, which comes with the package, has {info.num_classes} "
            f"classes of {info.dataset} at {info.input_size} pixels; deit_small_patch16_224 has ImageNet's 1000",
            file=sys.stderr,
        )
    return str(args.model or DEFAULT_MODEL)


# Labelled images


def add_data(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the argument for labelled images and its options; `open_data` reads them."""
    parser.add_argument("data", help=f"{text}; a table or data set of Hugging Face (hf:OWNER/NAME), see docs/data.md")
    parser.add_argument("--root", type=Path, help="where a data set known by name lies, default data")
    parser.add_argument("--download", action="store_true", help="fetch a data set known by name if it is not there")
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the options for the columns of tables; `columns` reads them."""
    text = "folder that the files of a table are relative to, default the table's"
    parser.add_argument("--images", dest="image_folder", type=Path, metavar="FOLDER", help=text)
    text = "a table's column of images; default: known by its name or type"
    parser.add_argument("--image-column", metavar="NAME", help=text)
    text = "its column of labels, or one of 0 and 1 for each class; default: known by its name or type"
    parser.add_argument("--label-column", nargs="+", metavar="NAME", help=text)
    text = "what stands between the names of several classes in the column of labels, such as '|'"
    parser.add_argument("--label-separator", metavar="TEXT", help=text)


def columns(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_columns`, as keywords of `open_dataset` and `image_sources`."""
    return {"images": args.image_folder, **picked(args, "image_column", "label_column", "label_separator")}


def open_data(
    args: argparse.Namespace,
    source: str,
    split: Literal["train", "val"],
    process: Process,
    *,
    classes: Sequence[str] | None = None,
    own_folder: bool = False,
) -> ImageRecords:
    """Open one split of labelled images, the same in every process; one process of each machine downloads.

    The options of `add_data` apply to `args.data`, to every data set known by name, and to every table. Other arguments
    and errors: see `open_dataset`. Raises: ConfigError: --offline, and a data set on the Hub.
    """
    from ..data.classes import HUB
    from ..data.columns import is_table
    from ..data.datasets import DATASETS, open_dataset

    on_hub = source.startswith(HUB)
    if on_hub and getattr(args, "offline", False) and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        raise ConfigError(
            f"--offline is for the model; {source} is read offline with HF_HUB_OFFLINE=1 in the environment"
        )
    fetched = source == args.data or source.partition(":")[0] in DATASETS
    chosen = columns(args) if source == args.data or is_table(source) else {}
    with first_downloads(process, wanted=(fetched and args.download) or on_hub) as first:
        root, download = args.root if fetched else None, fetched and args.download and first
        return open_dataset(
            source, split, root=root, download=download, classes=classes, own_folder=own_folder, **chosen
        )


@contextmanager
def first_downloads(process: Process, *, wanted: bool) -> Iterator[bool]:
    """Let the first process of each machine download, before the others go on; yields whether this one downloads."""
    waits = wanted and int(os.environ.get("LOCAL_RANK", "0")) > 0
    if waits:
        process.wait_for_all()
    yield wanted and not waits
    if wanted and not waits:
        process.wait_for_all()


# Output


def process_number() -> int:
    """Rank of this process under torchrun, else 0. Process 0 prints for all."""
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def say(text: str, file: TextIO | None = None) -> None:
    """Print, in the first process only."""
    if process_number() == 0:
        print(text, file=file, flush=True)


def in_colour() -> bool:
    """Whether the user's terminal is to have colours; see no-color.org and force-color.org."""
    forced, dumb = os.environ.get("FORCE_COLOR"), os.environ.get("TERM") == "dumb"
    return not os.environ.get("NO_COLOR") and bool(forced or not dumb)


def watcher(label: str) -> Watch:
    """Bar over the batches of one pass, on a terminal; it vanishes at the end."""
    return lambda batches, total: progress_bar(batches, total, unit="batch", label=label)


def progress_bar(
    items: Iterable[Any],
    total: int,
    *,
    unit: str,
    label: str | None = None,
    wanted: bool = True,
    stream: TextIO | None = None,
    form: str | None = None,
) -> Any:
    """The items behind a bar, which appears if `stream` (default: stderr) is a terminal; with a label it vanishes.

    `form` is a `bar_format` of tqdm, for a bar in colour.
    """
    from huggingface_hub.utils.tqdm import tqdm

    stream = stream or sys.stderr
    shown = wanted and stream.isatty() and process_number() == 0
    options = {"total": total, "unit": unit, "desc": label, "leave": label is None, "disable": not shown}
    options |= {"bar_format": form, "colour": "green" if form and in_colour() else None}
    return tqdm(items, file=stream, **options)  # type: ignore[no-untyped-call]
