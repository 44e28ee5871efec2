"""Opening a data set of a million files: deit-models beside torchvision and timm, from class folders and from tables.

    python benchmarks/opening.py [--files 1000000] [--classes 1000] [--rounds 5] [--folder PLACE]
                                 [--write benchmarks/results/opening.md]

The files are empty: none is read. Each side opens them in a process of its own, from a warm directory cache; the sides
take turns, and the medians are compared. "open" is the opening call alone; the CSV file has a path and a class's name
in each line, the pairs are a list of the same, which is there before the clock starts and is passed to `wrap`.
"memory" is the growth of the process's peak, "split" the time to set a tenth of the images aside by class, which the
others leave to the user, and "to a worker" the bytes that a loading process gets where processes are spawned.
--folder keeps the files for another time.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loading import machine, peak_mb

FOLDERS, TABLE, LINES = "deit-models, class folders", "deit-models, pairs", "deit-models, CSV"
SIDES = (FOLDERS, TABLE, LINES, "torchvision ImageFolder", "timm ImageDataset")


def lay_out(files: int, classes: int, folder: Path) -> None:
    """Empty files in class folders, and a table of them beside, unless they are there."""
    for number in range(classes):
        place = folder / f"n{number:08}"
        if place.is_dir():
            continue
        place.mkdir(parents=True)
        for image in range(number, files, classes):
            (place / f"{place.name}_{image}.JPEG").touch()
    if not table_of(folder).exists():
        with table_of(folder).open("w", encoding="utf-8") as table:
            table.write("path,label\n")
            for place in sorted(folder.iterdir()):
                table.writelines(f"{place.name}/{entry.name},{place.name}\n" for entry in os.scandir(place))


def table_of(folder: Path) -> Path:
    """The CSV file of a folder, beside it."""
    return folder.with_suffix(".csv")


def child(side: str, folder: str) -> None:
    """One measurement; prints a JSON row."""
    import timm.data
    from torchvision.datasets import ImageFolder

    from deit_models.data.classes import wrap
    from deit_models.data.datasets import open_dataset
    from deit_models.data.split import labels_of, stratified_split

    places = os.scandir(folder) if side == TABLE else ()
    table = [(entry.path, place.name) for place in places for entry in os.scandir(place.path)]
    openers: dict[str, Any] = {
        FOLDERS: lambda: open_dataset(folder, "train"),
        TABLE: lambda: wrap(table),
        LINES: lambda: open_dataset(table_of(Path(folder)), "train", images=folder),
        SIDES[3]: lambda: ImageFolder(folder),
        SIDES[4]: lambda: timm.data.ImageDataset(folder),
    }
    before, start = peak_mb(), time.perf_counter()
    found = openers[side]()
    row = {"open_s": time.perf_counter() - start, "memory_mb": peak_mb() - before, "images": len(found)}
    if side in (FOLDERS, TABLE, LINES):
        start = time.perf_counter()
        stratified_split(labels_of(found), fraction=0.1, seed=0)
        row["split_s"] = time.perf_counter() - start
    row["worker_mb"] = len(pickle.dumps(found)) / 1e6
    print(json.dumps(row))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """The rows of each side, round by round; the first round warms the cache and is not counted."""
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for i in range(args.rounds + 1):
        for side in SIDES[i % len(SIDES) :] + SIDES[: i % len(SIDES)]:
            command = [sys.executable, __file__, "--child", side, str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"round {i}, {side}: {row['open_s']:.1f} s, {row['memory_mb']:.0f} MB", file=sys.stderr, flush=True)
            if row["images"] != args.files:
                raise SystemExit(f"{side} found {row['images']} of {args.files} files")
            rows[side] += [row] * bool(i)
    return rows


def report(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """A Markdown table with ratios to torchvision."""
    lines = [
        f"# Opening a data set of {args.files} files in {args.classes} classes",
        "",
        f"{machine(('torch', 'torchvision', 'timm'))}. Medians of {args.rounds} interleaved rounds, one process each; "
        "`python benchmarks/opening.py`.",
        "",
        "| | open (s) | over torchvision | memory (MB) | split (s) | to a worker (MB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for side, found in rows.items():
        ratio = statistics.median(a["open_s"] / b["open_s"] for a, b in zip(found, rows[SIDES[3]], strict=True))
        medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
        split = f"{medians['split_s']:.1f}" if "split_s" in medians else ""
        lines.append(
            f"| {side} | {medians['open_s']:.1f} | {ratio:.2f} | {medians['memory_mb']:.0f} | {split} "
            f"| {medians['worker_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the files, and to keep them; default: not kept")
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary, "images")
        folder.mkdir(exist_ok=True)
        lay_out(args.files, args.classes, folder)
        table = report(measure(args, folder), args)
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
