"""Time and memory to load a local checkpoint: deit-models beside timm and transformers.

    python benchmarks/loading.py [--model deit_base_patch16_224] [--rounds 7] [--write benchmarks/results/loading.md]

The same random weights are written in each library's own layout. Each peer loads them in a process of its own, from a
warm page cache, the processes take turns, and the medians are compared. "load" is the loading call alone, "import"
the imports before it (torch included), "total" the whole process up to the first logits of one image. Memory is the
process's peak; "over bare" is the difference to a process that only imports torch, in multiples of the weights file;
"to bare + file" is the peak of the whole process as a share of a bare process and one copy of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PEERS = ("bare", "deit-models", "timm", "transformers")
LAYOUTS = {"deit-models": "native", "timm": "timm", "transformers": "transformers"}


def importer(peer: str) -> Callable[[str], Any]:
    """Import what a peer needs, and give its one-line loading call."""
    if peer == "deit-models":
        import deit_models

        return deit_models.from_pretrained
    if peer == "timm":
        import timm

        return lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    from transformers import AutoModelForImageClassification

    return lambda folder: AutoModelForImageClassification.from_pretrained(folder).eval()


def peak_mb() -> float:
    """Peak resident memory of this process in MB; not getrusage's, which a child inherits from its parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def child(peer: str, folder: str, size: int) -> None:
    """One measurement; prints a JSON row."""
    start = time.perf_counter()
    import torch

    row: dict[str, float] = {}
    if peer != "bare":
        load = importer(peer)
        row["import_s"] = time.perf_counter() - start
        before = time.perf_counter()
        model = load(folder)
        row["load_s"] = time.perf_counter() - before
        row["load_peak_mb"] = peak_mb()
        with torch.inference_mode():
            model(torch.zeros(1, 3, size, size))
    row["total_s"] = time.perf_counter() - start
    row["peak_mb"] = peak_mb()
    print(json.dumps(row))


def measure(name: str, rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Medians by peer and figure, and the size of the weights file in MB."""
    import deit_models

    rows: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        model = deit_models.create_model(name)
        for peer, layout in LAYOUTS.items():
            model.save_pretrained(Path(folder, peer), layout=layout)
        file_mb = Path(folder, "timm", "model.safetensors").stat().st_size / 2**20
        size = str(model.config.image_hw[0])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        for i in range(rounds + 1):
            for peer in PEERS:
                command = [sys.executable, __file__, "--child", peer, str(Path(folder, peer)), size]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                if i:  # the first round warms the page cache and the bytecode
                    rows[peer].append(json.loads(done.stdout.splitlines()[-1]))
    return {p: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for p, rs in rows.items()}, file_mb


def report(name: str, rounds: int, medians: dict[str, dict[str, float]], file_mb: float) -> str:
    """A Markdown table with ratios to deit-models."""
    bare, ours = medians["bare"], medians["deit-models"]
    lines = [
        f"# Loading {name} from a local file ({file_mb:.0f} MB)",
        "",
        f"{machine()}. Medians of {rounds} interleaved rounds, one process each; `python benchmarks/loading.py`.",
        "",
        "| | import (s) | load (s) | ours/theirs | total (s) | ours/theirs | peak after load (MB) | over bare, files "
        "| peak in all (MB) | to bare + file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| bare `import torch` | {bare['total_s']:.2f} | | | | | {bare['peak_mb']:.0f} | | {bare['peak_mb']:.0f} | |",
    ]
    for peer in PEERS[1:]:
        row = medians[peer]
        over = (row["load_peak_mb"] - bare["peak_mb"]) / file_mb
        ratios = ["", ""] if peer == "deit-models" else [f"{ours[k] / row[k]:.2f}" for k in ("load_s", "total_s")]
        lines.append(
            f"| {peer} | {row['import_s']:.2f} | {row['load_s']:.3f} | {ratios[0]} | {row['total_s']:.2f} "
            f"| {ratios[1]} | {row['load_peak_mb']:.0f} | {over:.2f} "
            f"| {row['peak_mb']:.0f} | {row['peak_mb'] / (bare['peak_mb'] + file_mb):.2f} |"
        )
    return "\n".join(lines) + "\n"


def machine(packages: Sequence[str] = ("torch", "timm", "transformers", "safetensors")) -> str:
    """Processor, cores and versions, for the head of a table."""
    from deit_models.deploy.hardware import processor_name

    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return f"{processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=3, metavar=("PEER", "FOLDER", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], int(args.child[2]))
        return
    table = report(args.model, args.rounds, *measure(args.model, args.rounds))
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
