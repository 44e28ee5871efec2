"""Two checkouts of this package side by side: import, loading, memory, training and folder speed.

    python benchmarks/commits.py OLD NEW [--rounds 9] [--write benchmarks/results/commits.md]

OLD and NEW are folders with a checkout each, made for instance by `git worktree add OLD <commit>`. Every figure comes
from a process of its own that imports the package from one of the two. The two take turns, and which one begins
changes from round to round. Ratios are taken within a round; the table has their medians.

All times are CPU times, which other work on the machine disturbs least; each part computes with one thread.
`import` is a whole process. `load` is `from_pretrained` of a DeiT-S folder, with the peak memory after it.
`train` is a run of two epochs of `deit_micro_patch4_32` on 512 images in memory, float32. `folder` is
`Classifier.classify_files` of 128 JPEG files of 256 x 256 pixels with DeiT-Ti, after 32 files to warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loading import machine, peak_mb

FIGURES = {
    "import_s": "import deit_models, seconds",
    "load_s": "load DeiT-S, seconds",
    "load_peak_mb": "peak memory after loading, MB",
    "train_s": "training, two epochs of 512 images, seconds",
    "folder_s": "128 photographs of a folder, seconds",
}
MODEL = "deit_small_patch16_224"


def prepare(folder: Path) -> None:
    """A saved DeiT-S and a folder of JPEG files."""
    import numpy as np
    from PIL import Image

    import deit_models

    deit_models.create_model(MODEL).save_pretrained(folder / "model")
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(160):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(photos / f"{number:04}.jpg", quality=90)


def load(folder: Path) -> dict[str, float]:
    """Seconds of `from_pretrained` and the peak memory after it."""
    import torch

    import deit_models

    torch.set_num_threads(1)
    deit_models.from_pretrained  # noqa: B018  # imports what loading needs
    start = time.process_time()
    deit_models.from_pretrained(folder / "model")
    return {"load_s": time.process_time() - start, "load_peak_mb": peak_mb()}


def train(folder: Path) -> dict[str, float]:
    """Seconds of two epochs."""
    import torch
    from torch.utils.data import TensorDataset

    import deit_models

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = TensorDataset(torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8), torch.arange(512) % 10)
    images.classes = [str(number) for number in range(10)]  # type: ignore[attr-defined]
    recipe = deit_models.recipe_named("cifar_scratch", epochs=2, warmup_epochs=0, precision="float32", compile="off")
    model = deit_models.create_model("deit_micro_patch4_32")
    start = time.process_time()
    deit_models.train(model, train=images, recipe=recipe, out=folder / f"run{os.getpid()}", workers=0, device="cpu")
    return {"train_s": time.process_time() - start}


def classify(folder: Path) -> dict[str, float]:
    """Seconds of a folder."""
    import torch

    import deit_models

    torch.set_num_threads(1)
    classifier = deit_models.Classifier(deit_models.create_model("deit_tiny_patch16_224").eval(), device="cpu")
    files = sorted((folder / "photos").iterdir())
    list(classifier.classify_files(files[:32]))
    start = time.process_time()
    list(classifier.classify_files(files[32:]))
    return {"folder_s": time.process_time() - start}


PARTS = {"load": load, "train": train, "classify": classify}


def measure(checkout: Path, folder: Path) -> dict[str, float]:
    """All figures of one checkout, once."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    before = os.times()
    subprocess.run([sys.executable, "-c", "import deit_models"], check=True, env=environment)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    figures = {"import_s": spent}
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, str(checkout), str(folder)]
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        figures |= json.loads(done.stdout.splitlines()[-1])
    return figures


def table(rows: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    """Medians of both, and of their ratios, in Markdown."""
    lines = [
        "# Two commits side by side",
        "",
        f"{machine()}. {len(rows)} interleaved rounds, medians; `python benchmarks/commits.py OLD NEW`.",
        "",
        "| | old | new | new / old | lowest and highest ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for figure, label in FIGURES.items():
        old, new = (statistics.median(pair[side][figure] for pair in rows) for side in (0, 1))
        ratios = sorted(pair[1][figure] / pair[0][figure] for pair in rows)
        spread = f"{ratios[0]:.2f} ... {ratios[-1]:.2f}"
        lines.append(f"| {label} | {old:.4g} | {new:.4g} | {statistics.median(ratios):.2f} | {spread} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run; with `--part`, one measurement of a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        import deit_models

        if not Path(deit_models.__file__).is_relative_to(args.old.resolve()):
            parser.error(f"deit_models comes from {deit_models.__file__}, not from {args.old}")
        print(json.dumps(PARTS[args.part](args.new)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for number in range(args.rounds + 1):
            pair = {}
            for checkout in (args.old, args.new)[:: 1 if number % 2 else -1]:
                pair[checkout] = measure(checkout.resolve(), Path(name))
            if number:  # the first round warms the page cache and the bytecode
                rows.append((pair[args.old], pair[args.new]))
    text = table(rows)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
