"""Photographs a second, classified from a folder: deit-models beside a timm loop and transformers' pipeline.

    python benchmarks/folder.py PHOTOS [--files 1000] [--many 10000] [--rounds 5] [--write benchmarks/results/folder.md]

PHOTOS is a folder of JPEG files; they are linked under new names until there are enough. The same weights are saved in
each library's layout. They are random, with a head whose bias subtracts the mean of the photos' features, so that the
photos get many different classes, by small margins: a hard test of agreement.

All sides use the authors' evaluation transform: shorter side to 256, bicubic, centre crop of 224. timm's own transform
is given crop_pct=0.875, transformers' processor size={"shortest_edge": 256}; timm reads through a DataLoader. Each peer
runs with and without worker processes, and the better of the two counts.

Each side has a process of its own, the sides take turns, the medians are compared. Images/s are those from the first
file to the last result, with the model loaded; what `optimize` chose was measured and kept before. With --many the
memory of two sides is measured once more over so many files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loading import machine, peak_mb

SIDES = {
    "timm": "timm",
    "timm, 2 workers": "timm",
    "transformers": "transformers",
    "transformers, 2 workers": "transformers",
    "deit-models": "native",
    "deit-models, fast pixels": "native",
    "deit-models, optimize": "native",
    "deit-models, optimize, fast pixels": "native",
    "deit-models, optimize int8": "native",
    "deit-models, optimize int8, fast pixels": "native",
}
"""Each side and the layout it loads. The words after the name say how it runs."""
PACKAGES = ("torch", "torchvision", "pillow", "timm", "transformers", "openvino")
REMEMBERED = ("deit-models", "deit-models, optimize, fast pixels")
JUDGES = 50
"""Files that `optimize` uses: half of a hundred photographs, so that int8 is also run on as many others."""
SUFFIXES = {".jpg", ".jpeg"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Classify = Callable[[list[str]], Iterable[int]]
"""Paths to the number of the most likely class of each, in order."""


def lay_out(photos: Path, count: int, folder: Path) -> None:
    """A folder of `count` links to the photos, or copies where the file system has no links."""
    files = sorted(path.resolve() for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{photos}: no JPEG files in it")
    folder.mkdir()
    for i in range(count):
        link = folder / f"{i:06}.jpg"
        try:
            os.link(files[i % len(files)], link)
        except OSError:
            shutil.copy(files[i % len(files)], link)


def save_weights(name: str, photos: list[Path], folder: Path) -> None:
    """The same random weights in three layouts."""
    import torch

    import deit_models

    torch.manual_seed(0)
    model = deit_models.create_model(name).eval()
    transform = deit_models.transform_for(model)
    with torch.no_grad():
        model.head.weight.normal_()
        features = model.embed(torch.stack([transform(photo) for photo in photos])).mean(0)
        model.head.bias.copy_(-(model.head.weight @ features))
    for layout in set(SIDES.values()):
        model.save_pretrained(folder / layout, layout=layout)


def in_timm(folder: str, batch: int, workers: int) -> Classify:
    """A plain loop over a DataLoader with timm's evaluation transform."""
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform
    from torch.utils.data import DataLoader, Dataset

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(224, interpolation="bicubic", crop_pct=0.875, mean=MEAN, std=STD)

    class Files(Dataset[torch.Tensor]):
        def __init__(self, paths: list[str]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, i: int) -> torch.Tensor:
            return transform(Image.open(self.paths[i]).convert("RGB"))

    def classify(paths: list[str]) -> Iterable[int]:
        with torch.inference_mode():
            for images in DataLoader(Files(paths), batch_size=batch, num_workers=workers):
                yield from model(images).softmax(-1).topk(5).indices[:, 0].tolist()

    return classify


def in_transformers(folder: str, batch: int, workers: int) -> Classify:
    """The pipeline, with its processor told the authors' sizes."""
    from transformers import AutoModelForImageClassification, DeiTImageProcessor, pipeline

    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = DeiTImageProcessor(
        size={"shortest_edge": 256}, resample=3, crop_size={"height": 224, "width": 224}, image_mean=MEAN, image_std=STD
    )
    run = pipeline("image-classification", model=model, image_processor=processor, batch_size=batch, device="cpu")
    numbers = {label: int(number) for number, label in model.config.id2label.items()}
    return lambda paths: (numbers[found[0]["label"]] for found in run(paths, top_k=5, num_workers=workers))


def in_ours(folder: str, batch: int, side: str, backend: Any) -> Classify:
    """`Classifier.classify_files` as it is, with `optimize` and with fast pixels."""
    import deit_models

    model: Any = deit_models.from_pretrained(folder)
    if "optimize" in side:
        import torch

        photos = sorted(Path(folder).parent.glob("files/*.jpg"))[:JUDGES]
        levels = deit_models.transform_for(model).levels
        options = {
            "calibration": torch.stack([levels(photo) for photo in photos]),
            "preprocessing": True,
            "backend": backend,
            "precision": "int8" if "int8" in side else "auto",
            "cache_dir": Path(folder).parent / "cache",
            "min_agreement": 0,  # random weights have small margins; the table shows what agrees
        }
        model = deit_models.optimize(model, sample=batch, **options)
        print(f"  {side}: {model.choice.backend}, {model.choice.precision}", file=sys.stderr, flush=True)
    classifier = deit_models.Classifier(model, batch_size=batch, fast_pixels="fast pixels" in side)
    return lambda paths: (result.predictions[0].index for result in classifier.classify_files(paths))


def child(side: str, folder: str, files: str, batch: int, backend: str) -> None:
    """One measurement; prints a JSON row."""
    start = time.perf_counter()
    layout = str(Path(folder, SIDES[side]))
    workers = 2 if "2 workers" in side else 0
    if side.startswith("timm"):
        classify = in_timm(layout, batch, workers)
    elif side.startswith("transformers"):
        classify = in_transformers(layout, batch, workers)
    else:
        classify = in_ours(layout, batch, side, backend)
    paths = sorted(str(path) for path in Path(files).iterdir())
    loaded = time.perf_counter()
    classes = list(classify(paths))
    seconds = time.perf_counter() - loaded
    if len(classes) != len(paths):
        raise SystemExit(f"{side} gave {len(classes)} results for {len(paths)} files")
    row = {
        "images_per_s": len(paths) / seconds,
        "ready_s": loaded - start,
        "peak_mb": peak_with_children_mb(),
        "classes": classes,
    }
    print(json.dumps(row))


def peak_with_children_mb() -> float:
    """Peak resident memory of this process and of the largest of its children, in MB."""
    return peak_mb() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def start_child(side: str, folder: Path, files: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side once."""
    command = [sys.executable, __file__, "--child", side, str(folder), str(files), str(args.batch), args.backend]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"{side}: {row['images_per_s']:.1f} images/s, {row['peak_mb']:.0f} MB")
    return row


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """The rows of each side, round by round, and the peak memory of some over many files."""
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files, few = folder / "files", folder / "few"
        lay_out(args.photos, args.files, files)
        lay_out(args.photos, 2 * args.batch, few)
        save_weights(args.model, sorted(few.iterdir()), folder)
        say("once, uncounted: what optimize chooses, and a warm page cache")
        start_child("deit-models, optimize", folder, few, args)
        for i in range(args.rounds):
            say(f"round {i + 1} of {args.rounds}")
            order = list(SIDES)
            for side in order[i % len(order) :] + order[: i % len(order)]:
                rows[side].append(start_child(side, folder, files, args))
        many: dict[str, float] = {}
        if args.many:
            say(f"memory over {args.many} files")
            lay_out(args.photos, args.many, folder / "many")
            many = {s: start_child(s, folder, folder / "many", args)["peak_mb"] for s in REMEMBERED}
    return rows, many


def report(rows: dict[str, list[dict[str, Any]]], many: dict[str, float], args: argparse.Namespace) -> str:
    """A Markdown table with ratios to the better of each peer's two ways."""
    speed = {side: statistics.median(row["images_per_s"] for row in found) for side, found in rows.items()}
    best = {peer: max((s for s in SIDES if s.startswith(peer)), key=speed.__getitem__) for peer in ("timm", "transf")}
    exact = rows["deit-models"][0]["classes"]
    lines = [
        f"# Classifying a folder of {args.files} JPEG files with {args.model}",
        "",
        f"{machine(PACKAGES)}. {args.files} files by repeating {min(args.files, photo_count(args.photos))} photos, "
        f"batches of {args.batch}; medians of {args.rounds} interleaved rounds, one process each; "
        "`python benchmarks/folder.py PHOTOS`. Random weights; every side has the authors' evaluation transform. Top-1 "
        f"is the share of files with the class of deit-models' exact pixels in float32, one of {len(set(exact))}. "
        f"bf16 and int8 are accepted at any agreement; int8 is fitted to {JUDGES} of the files.",
        "",
        f"| | images/s | over {best['timm']} | over {best['transf']} | top-1 the same | ready after (s) | peak (MB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for side, found in rows.items():
        ratios = [
            statistics.median(a["images_per_s"] / b["images_per_s"] for a, b in zip(found, rows[other], strict=True))
            for other in best.values()
        ]
        same = sum(a == b for a, b in zip(found[0]["classes"], exact, strict=True)) / len(exact)
        ready, peak = (statistics.median(row[key] for row in found) for key in ("ready_s", "peak_mb"))
        cells = [
            f"{speed[side]:.1f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{same:.1%}",
            f"{ready:.1f}",
            f"{peak:.0f}",
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    if many:
        peaks = (
            f"{side} {statistics.median(row['peak_mb'] for row in rows[side]):.0f} MB over {args.files} files and "
            f"{peak:.0f} MB over {args.many}"
            for side, peak in many.items()
        )
        lines += ["", f"Peak memory: {'; '.join(peaks)}."]
    return "\n".join(lines) + "\n"


def photo_count(photos: Path) -> int:
    """Number of different photos."""
    return sum(path.suffix.lower() in SUFFIXES for path in photos.iterdir())


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?", help="folder of JPEG photographs")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--files", type=int, default=1000, help="files in the folder, by repeating the photographs")
    parser.add_argument("--many", type=int, default=10_000, help="files to measure memory over; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--backend", default="auto", help="what `optimize` may choose from; one by name is quicker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=5, metavar="X", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, folder, files, batch, backend = args.child
        child(side, folder, files, int(batch), backend)
        return
    if args.photos is None:
        parser.error("PHOTOS is needed: a folder of JPEG photographs")
    table = report(*measure(args), args)
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
