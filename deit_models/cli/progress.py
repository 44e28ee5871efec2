"""How a long command shows that it gets on: a bar on a terminal, and one line for each epoch of training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


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
