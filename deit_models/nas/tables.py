"""Result of a search for people: a table of the best networks, a list of all, and a picture of accuracy and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, MissingExtraError, TrainingError
from ..files import atomic_write, read_toml, write_text
from ..show.charts import find_matplotlib
from ..training.state import read_log
from .evolution import ScoredCandidate

SETTINGS_NAME = "search.toml"
CANDIDATES_NAME, REPORT_NAME, PICTURE_NAME = "candidates.jsonl", "report.md", "candidates.png"
CandidateRow = Mapping[str, Any]


class SearchLimit(NamedTuple):
    """Largest cost of a search, and its unit."""

    unit: str
    limit: float


def write_tables(folder: Path, found: Sequence[ScoredCandidate], *, unit: str, limit: float) -> None:
    """Write candidates.jsonl (all, the best first), report.md and, where matplotlib is installed, candidates.png.

    Raises: SaveError: no space or no permission.
    """
    rows = [
        {"key": one.candidate.key(), "top1": one.top1, "cost": one.cost, "generation": one.generation} for one in found
    ]
    write_text(folder / CANDIDATES_NAME, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / REPORT_NAME, candidates_table(rows, unit=unit, limit=limit))
    with suppress(MissingExtraError):  # the table has the same figures
        plot_candidates(rows, folder / PICTURE_NAME, unit=unit)


def read_candidates(folder: Path) -> list[dict[str, Any]]:
    """The candidates of a finished search, the best first. Raises: TrainingError: there is none, or it is damaged."""
    rows = read_log(folder / CANDIDATES_NAME, {"key": str, "top1": Real, "cost": Real, "generation": int})
    if not rows:
        raise TrainingError(f"{folder} holds no finished search; run the search to its end first")
    return rows


def read_limit(folder: Path) -> SearchLimit:
    """The limit of the search in a folder. Raises: TrainingError: there is none."""
    path = folder / SETTINGS_NAME
    try:
        data = read_toml(path)
        return SearchLimit({"macs": "MACs", "latency": "ms"}[data["cost"]], float(data["limit"]))
    except (ConfigError, LookupError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} does not say what the search was limited by: {error}") from error


def candidates_table(rows: Sequence[CandidateRow], *, unit: str, limit: float, most: int = 10) -> str:
    """The search in Markdown: a line for each generation, and the best networks."""
    lines = [
        f"# {len(rows)} networks within {_number(limit)} {unit}",
        "",
        "| generation | networks | best top-1 | mean |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for generation in sorted({row["generation"] for row in rows}):
        own = [row["top1"] for row in rows if row["generation"] == generation]
        lines.append(f"| {generation} | {len(own)} | {max(own):.2f} | {sum(own) / len(own):.2f} |")
    lines += ["", f"| rank | top-1 with shared weights | {unit} | width: heads x MLP of each block, by stage |"]
    lines.append("| ---: | ---: | ---: | --- |")
    for rank, row in enumerate(rows[:most], start=1):
        network = row["key"].replace(" | ", "; ")
        lines.append(f"| {rank} | {row['top1']:.2f} | {_number(row['cost'])} | {network} |")
    return "\n".join(lines) + "\n"


def plot_candidates(
    rows: Sequence[CandidateRow], path: Path, *, unit: str, marked: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Draw accuracy against cost, a dot for each candidate, later generations darker, as PNG.

    Args:
        rows: the candidates.
        path: the file.
        unit: of their cost.
        marked: further points by name, each its cost and accuracy.

    Raises: MissingExtraError: matplotlib is not installed. SaveError: no space or no permission.
    """
    figure = find_matplotlib()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    dots = axes.scatter(
        [row["cost"] for row in rows],
        [row["top1"] for row in rows],
        c=[row["generation"] for row in rows],
        cmap="viridis_r",
        s=14,
        label=f"{len(rows)} candidates",
    )
    figure.colorbar(dots, label="generation")
    best = rows[0]
    axes.scatter([best["cost"]], [best["top1"]], marker="*", s=160, color="tab:red", label="winner")
    for name, point in (marked or {}).items():
        axes.scatter(*([value] for value in point), marker="D", label=name)
    axes.set_xlabel(unit)
    axes.set_ylabel("top-1 with shared weights (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
