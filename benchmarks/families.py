"""Images/s of LeViT and DeiT beside timm's models, and of LeViT beside torchvision's EfficientNet, as in its paper.

    python benchmarks/families.py [--device cuda] [--threads 1] [--write benchmarks/results/families.md]

Inference in float32 with random weights, batches of 1 and 32. Each measurement is a process of its own, the sides take
turns, medians are compared. LeViT runs as it is built and with BatchNorm folded, by `LeViT.fuse` and by timm's own
`reparameterize_model`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from loading import machine

PAIRS = ("levit_128s", "levit_256", "deit_tiny_patch16_224", "deit_small_patch16_224")
BATCHES = (1, 32)


class Rival(NamedTuple):
    """An EfficientNet at the size and with the ImageNet top-1 of its paper, and the LeViT nearest to that."""

    efficientnet: str
    size: int
    top1: float
    levit: str


RIVALS = (
    Rival("efficientnet_b0", 224, 77.1, "levit_128s"),
    Rival("efficientnet_b1", 240, 79.1, "levit_128"),
    Rival("efficientnet_b2", 260, 80.1, "levit_192"),
    Rival("efficientnet_b3", 300, 81.6, "levit_256"),
    Rival("efficientnet_b4", 380, 82.9, "levit_384"),
)


def network(side: str, name: str) -> tuple[torch.nn.Module, int]:
    """The model of a side, and the side of its input in pixels."""
    if side == "torchvision":
        import torchvision

        return torchvision.models.get_model(name), next(r.size for r in RIVALS if r.efficientnet == name)
    if side.startswith("timm"):
        import timm
        from timm.utils.model import reparameterize_model

        model = timm.create_model(name).eval()
        return (reparameterize_model(model) if side == "timm folded" else model), 224
    import deit_models

    ours = deit_models.create_model(name).eval()
    return (ours.fuse() if side == "deit-models folded" else ours), 224


def rate(side: str, name: str, batch_size: int, args: argparse.Namespace) -> float:
    """Images/s: after a warm-up, calls for `args.seconds`, the median of them."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model, size = network(side, name)
    model = model.eval().to(device)
    images = torch.randn(batch_size, 3, size, size, device=device)

    def once() -> float:
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        for _ in range(3):
            once()
        times: list[float] = []
        while sum(times) < args.seconds or len(times) < 3:
            times.append(once())
    return batch_size / statistics.median(times)


def measured(cases: list[tuple[str, str]], batch_size: int, args: argparse.Namespace) -> list[float]:
    """Medians of the interleaved rounds, in the order of the cases, (side, model) each."""
    found: list[list[float]] = [[] for _ in cases]
    options = [f"--{key}={getattr(args, key)}" for key in ("device", "threads", "seconds")]
    for _ in range(args.rounds):
        for rates, (side, name) in zip(found, cases, strict=True):
            command = [sys.executable, __file__, *options, "--child", side, name, str(batch_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rates.append(json.loads(done.stdout.splitlines()[-1])["rate"])
    medians = [statistics.median(rates) for rates in found]
    print(batch_size, {" ".join(case): round(value, 1) for case, value in zip(cases, medians, strict=True)}, flush=True)
    return medians


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; the first column to the left, the others to the right."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]


def beside_timm(args: argparse.Namespace) -> list[str]:
    """One row for each model and batch size."""
    rows = []
    for name in args.models:
        for batch_size in args.batches:
            for kind in ("", " folded") if name.startswith("levit") else ("",):
                sides = [f"deit-models{kind}", f"timm{kind}"]
                ours, theirs = measured([(side, name) for side in sides], batch_size, args)
                rates = [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
                rows.append([f"`{name}`{kind and ', folded'}", str(batch_size), *rates])
    return table(["model", "batch", "deit-models", "timm", "ratio"], rows)


def beside_efficientnet(args: argparse.Namespace) -> list[str]:
    """One row for each pair of the paper and batch size."""
    import deit_models

    rows = []
    for rival in RIVALS:
        top1 = deit_models.model_info(rival.levit).top1
        for batch_size in args.batches:
            cases = [("torchvision", rival.efficientnet), ("deit-models folded", rival.levit)]
            theirs, ours = measured(cases, batch_size, args)
            pair = [f"`{rival.levit}` ({top1})", f"`{rival.efficientnet}` ({rival.top1})"]
            rows.append([*pair, str(batch_size), f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}"])
    return table(["LeViT (top-1)", "EfficientNet (top-1)", "batch", "EfficientNet", "LeViT, folded", "ratio"], rows)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(PAIRS), help="default: %(default)s")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="default: %(default)s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement; default: %(default)s")
    parser.add_argument("--no-efficientnet", action="store_true", help="leave the second table out")
    parser.add_argument("--write", type=Path, help="also write the tables there")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "MODEL", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, name, batch_size = args.child
        print(json.dumps({"rate": rate(side, name, int(batch_size), args)}))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else machine()
    threads = f", {args.threads} threads" if args.threads else ""
    lines = [
        "# Inference (images/s)",
        "",
        f"{where}{threads}. float32, random weights, 224 pixels (EfficientNet: its own size). Medians of {args.rounds} "
        f"interleaved rounds, one process each. Command: `python benchmarks/families.py`.",
        "",
        *beside_timm(args),
    ]
    if not args.no_efficientnet:
        note = "Accuracies: those of the two papers; the speed is that of torchvision's EfficientNet."
        lines += ["", "## LeViT and EfficientNet", "", note, "", *beside_efficientnet(args)]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
