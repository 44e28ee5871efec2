"""Cost of `import deit_models` and `deit-models list` beside `import torch`.

    python benchmarks/imports.py [--rounds 15] [--write benchmarks/results/imports.md]

Whole processes, which take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from loading import machine

COMMANDS = {
    "`import torch`": ["-c", "import torch"],
    "`import deit_models`": ["-c", "import deit_models"],
    "`import torch, deit_models; deit_models.from_pretrained`": [
        "-c",
        "import torch, deit_models; deit_models.from_pretrained",
    ],
    "`deit-models list`": ["-m", "deit_models", "list"],
    "bare Python": ["-c", "pass"],
}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", type=Path, help="also write the table there")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(args.rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if i:  # the first round warms the page cache and the bytecode
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        "# Import and start-up",
        "",
        f"{machine()}. Medians of {args.rounds} interleaved rounds, whole processes; `python benchmarks/imports.py`.",
        "",
        "| | seconds | times `import torch` |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {value:.3f} | {value / medians['`import torch`']:.2f} |" for name, value in medians.items()),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
