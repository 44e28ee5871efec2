"""A table of several ways to fine-tune, each run with several seeds; the examples with seeds use it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_table(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Print a row for each way and write them to `path`: test accuracy over the seeds, mean seconds.

    Args:
        found: the way's name to the metrics of its runs, as `finetune` gives them.
        path: the Markdown file.
    """
    lines = ["| way | test accuracy (%) | each seed | seconds |", "| --- | ---: | --- | ---: |"]
    for way, runs in found.items():
        scores = [run["test"]["top1"] for run in runs]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        # a continued run counts its whole training; features and head are computed in one call
        seconds = statistics.mean(run.get("training_seconds", run["seconds"]) for run in runs)
        each = ", ".join(f"{score:.2f}" for score in scores)
        lines.append(f"| {way} | {statistics.mean(scores):.2f}{spread} | {each} | {seconds:.0f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    path.write_text(table, encoding="utf-8")
