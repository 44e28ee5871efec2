"""What the commands share: how a parser is made, common options, exit statuses."""
# MERGED """How a long command shows that it gets on: a bar on a terminal, and one line for each epoch of training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..data.records import ImageRecords
    from ..distributed import Process


def process_number() -> int:
    """Which of the processes started by torchrun this is; the one numbered 0 prints what all have to say."""
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def with_progress(results: Iterator[Any], total: int, *, on_screen: bool) -> Iterator[Any]:
    """A bar on a terminal, unless the results appear there; none in a pipe."""
    return iter(_bar(results, total, unit="image", wanted=not on_screen and total > 1))


def watch_evaluation(batches: Iterable[Any], total: int) -> Iterable[Any]:
    """The batches of an evaluation, behind a bar on a terminal."""
    return _bar(batches, total, unit="batch", label="evaluating")


def watch_features(batches: Iterable[Any], total: int) -> Iterable[Any]:
    """The batches of a frozen backbone, behind a bar on a terminal."""
    return _bar(batches, total, unit="batch", label="features")


def watch_images(batches: Iterable[Any], total: int) -> Iterable[Any]:
    """The batches of images that are kept in memory, behind a bar on a terminal."""
    return _bar(batches, total, unit="batch", label="images")


class TrainingDisplay:
    """What a training run shows: on a terminal a bar for the epoch that runs, and a line for each that is finished.

    Attributes:
        epochs: how many the run has in all.
        finished: how many are done, None as long as that is not known: a run that goes on says so after its first.
    """

    def __init__(self, epochs: int, *, finished: int | None) -> None:
        self.epochs = epochs
        self.finished = finished
        self._bar: Any = None

    def watch(self, batches: Iterable[Any], total: int) -> Iterable[Any]:
        """The batches of the next epoch, behind a bar."""
        label = "training" if self.finished is None else f"epoch {self.finished + 1}/{self.epochs}"
        self._bar = _bar(batches, total, unit="batch", label=label)
        return self._bar

    def close(self) -> None:
        """Take away the bar of an epoch that is not going to end."""
        if self._bar is not None:
            self._bar.close()

    def show_epoch(self, row: dict[str, Any]) -> None:
        """Print a row of the log, and note that its epoch is done."""
        self.finished = row["epoch"] + 1
        print(epoch_line(row, self.epochs), flush=True)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """A row of the log for readers, who count epochs from 1."""
    number = str(row["epoch"] + 1).rjust(len(str(epochs)))
    parts = [f"epoch {number}/{epochs}", f"loss {row['loss']:.4f}"]
    names = {
        "top1": "top-1", "class_top1": "class head", "distillation_top1": "distillation head", "ema_top1": "averaged",
    }  # fmt: skip
    parts += [f"{name} {row[key]:.2f} %" for key, name in names.items() if row.get(key) is not None]
    parts += [f"lr {row['lr']:.3g}", f"{row['images_per_second']:.0f} images/s"]
    if row.get("unreadable"):
        parts.append(f"{row['unreadable']} unreadable")
    return "  ".join(parts)


def _bar(items: Iterable[Any], total: int, *, unit: str, label: str | None = None, wanted: bool = True) -> Any:
    """The items; one that has a label vanishes when it is full."""
    from huggingface_hub.utils.tqdm import tqdm

    shown = wanted and sys.stderr.isatty() and process_number() == 0
    options = {"total": total, "unit": unit, "desc": label, "leave": label is None, "disable": not shown}
    return tqdm(items, **options)  # type: ignore[no-untyped-call]


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


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def device(name: str) -> str:
    """The name of a device that is there. Raises: ArgumentTypeError: there is no such device."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {name!r} on this machine; the CPU is 'cpu'") from error
    return name


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The options `--workers` and `--device`, for commands whose default is what suits the machine."""
    text = "decoding processes, 0: none besides this one; default: by the number of cores"
    parser.add_argument("--workers", type=at_least(0), metavar="N", help=text)
    parser.add_argument("--device", type=device, help="cpu, cuda, mps, ...; default: the GPU if there is one")


def at_least(low: int) -> Callable[[str], int]:
    """Reads a whole number; argparse refuses one below `low`."""

    def read(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}; expected {low} or more")
        return int(text)

    read.__name__ = "int"  # which argparse shows for what is no number
    return read


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The options for where weights come from; `loading` reads them."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--cache-dir", type=Path, help="where to keep downloads")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_loading` parsed, as keywords of `from_pretrained`."""
    return {"revision": args.revision, "cache_dir": args.cache_dir, "local_files_only": args.offline}


def chosen_model(args: argparse.Namespace) -> str:
    """The model that was named, or else the one that comes with the package, which a line on stderr then describes."""
    from ..registry import DEFAULT_MODEL, model_info

    if args.model is None and process_number() == 0:
        info = model_info(DEFAULT_MODEL)
        print(
            f"deit-models: no --model given: {DEFAULT_MODEL}, which comes with the package, knows {info.num_classes} "
            f"classes of {info.dataset} at {info.input_size} pixels; deit_small_patch16_224 knows ImageNet's 1000",
            file=sys.stderr,
        )
    return str(args.model or DEFAULT_MODEL)


def add_token_merging(parser: argparse.ArgumentParser) -> None:
    """The option `--token-merging`."""
    text = "patch tokens that every block merges into others like them: faster, and other logits; default none"
    parser.add_argument("--token-merging", type=at_least(0), metavar="N", help=text)


def add_data(parser: argparse.ArgumentParser, text: str) -> None:
    """The argument for labelled images and the options that belong to it; `open_data` reads them."""
    parser.add_argument("data", help=text)
    parser.add_argument("--root", type=Path, help="where a data set known by name lies, default data")
    parser.add_argument("--download", action="store_true", help="fetch a data set known by name if it is not there")


def open_data(
    args: argparse.Namespace,
    source: str,
    split: Literal["train", "val"],
    process: Process,
    *,
    classes: Sequence[str] | None = None,
    own_folder: bool = False,
) -> ImageRecords:
    """One split of labelled images, the same in every process; only one on each machine downloads.

    Args:
        args: of a parser with `add_data`; its options belong to `args.data`, and to any source known by name.
        source: a folder or a name.
        split: "train" or "val".
        process: this one among those that open the same data.
        classes: the names it must have, in the order that numbers the labels.
        own_folder: the folder was named for this split, and may hold class folders right in it.

    Raises: DataError: see `open_dataset`. ConfigError: options that do not fit the source.
    """
    from ..data.datasets import DATASETS, open_dataset

    fetched = source == args.data or source.partition(":")[0] in DATASETS
    root, download = (args.root, args.download) if fetched else (None, False)
    waits = download and int(os.environ.get("LOCAL_RANK", "0")) > 0
    if waits:
        process.wait_for_all()
    records = open_dataset(
        source, split, root=root, download=download and not waits, classes=classes, own_folder=own_folder
    )
    if download and not waits:
        process.wait_for_all()
    return records
