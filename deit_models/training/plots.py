"""The curves of one or several runs as a picture; needs the extra `[plot]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..hub.fetch import atomic_write

Rows = Sequence[Mapping[str, Any]]


def find_matplotlib() -> Any:
    """Matplotlib's Figure class. Raises: MissingExtraError: it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib; pip install 'deit-models[plot]'") from error
    return Figure


def plot_curves(runs: Mapping[str, Rows], path: str | PathLike[str], *, title: str = "") -> None:
    """Draw training loss and validation accuracy by epoch, a line for each run, as PNG.

    Args:
        runs: name to the rows of its log.jsonl, see `read_log`.
        path: the file to write; its folder is made.
        title: stands above the picture.

    Raises: MissingExtraError: matplotlib is not installed. FetchError: no space or no permission.
    """
    figure = find_matplotlib()(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("loss", "top1"), ("training loss", "validation top-1 (%)"), strict=True):
        for name, rows in runs.items():
            points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
            if points:
                # a lone point has no line to see
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 3 else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
