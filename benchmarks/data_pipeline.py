"""How many augmented training images a second a loader gives: deit-models beside timm, from the same photographs.

    python benchmarks/data_pipeline.py PHOTOS [--images 1000] [--workers 2] [--rounds 7]
                                       [--write benchmarks/results/data_pipeline.md]

PHOTOS is a folder of image files, repeated until there are enough. Both sides decode, crop to 224 pixels (bicubic),
flip, apply rand-m9-mstd0.5-inc1, normalise and erase (pixel, 0.25), and give float32 batches; mixing is left out. timm
runs as its plain loader and with its prefetcher, which sends bytes to the main process and normalises and erases there.
deit-models runs as it is and with Pillow's resize, which makes of every crop the picture timm makes of it.

Each side has a process of its own, reads one epoch to warm up and another for the clock; the sides take turns, and
ratios are taken within a round. CPU time, of the workers and the main process together, is what a busy machine disturbs
least.
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
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PEERS = ("deit-models", "deit-models, Pillow resize", "timm", "timm, prefetcher")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def lay_out(photos: Path, images: int, folder: Path) -> None:
    """A train/ folder of `images` links to the photos, each photo a class."""
    files = sorted(path.resolve() for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise SystemExit(f"{photos}: {len(files)} images; expected a folder of at least two")
    for i in range(images):
        file = files[i % len(files)]
        link = folder / "train" / file.stem / f"{i}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)


def our_loader(folder: str, batch: int, workers: int, *, pillow_resize: bool) -> Any:
    """The loader that `deit_models.training` trains with."""
    import torch

    from deit_models.hub.manifest import Preprocessing
    from deit_models.training.augment import train_transform
    from deit_models.training.datasets import TrainingSamples, open_dataset
    from deit_models.training.levels import InputBatches, ToInput
    from deit_models.training.loading import make_loader
    from deit_models.training.recipe import Recipe
    from deit_models.training.samplers import TrainSampler

    records = open_dataset(folder, "train")
    preprocessing = Preprocessing(resize=256, crop=(224, 224))
    transform = train_transform(Recipe(), preprocessing, (224, 224), pillow_resize=pillow_resize)
    sampler = TrainSampler(len(records), batch_size=batch)
    device = torch.device("cpu")
    loader = make_loader(TrainingSamples(records, transform), sampler, batch_size=batch, workers=workers, device=device)
    return InputBatches(loader, ToInput(preprocessing, device))


def timm_loader(folder: str, batch: int, workers: int, *, prefetcher: bool) -> Any:
    """The loader timm's training script makes, with the same augmentation."""
    import torch
    from PIL import Image, ImageOps
    from timm.data import ImageDataset, auto_augment, create_loader

    def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
        return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)

    # With Pillow 13 timm 1.0.31 stops at the first image posterised to 0 bits, about one in 700
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    return create_loader(
        ImageDataset(str(Path(folder, "train"))),
        224,
        batch,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        num_workers=workers,
        device=torch.device("cpu"),
        use_prefetcher=prefetcher,
    )


def cpu_seconds(processes: Iterable[int]) -> float:
    """User and system time of some processes so far."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def child(peer: str, folder: str, batch: int, workers: int) -> None:
    """One measurement; prints a JSON row."""
    import torch

    torch.set_num_threads(1)
    if peer.startswith("timm"):
        loader = timm_loader(folder, batch, workers, prefetcher=peer.endswith("prefetcher"))
    else:
        loader = our_loader(folder, batch, workers, pillow_resize=peer.endswith("resize"))
    for _ in loader:
        pass
    inner = getattr(loader, "loader", loader)  # timm's prefetcher and our batches wrap a DataLoader
    processes = [os.getpid(), *(worker.pid for worker in inner._iterator._workers)]
    count, cpu, start = 0, cpu_seconds(processes), time.perf_counter()
    for images, *_ in loader:
        if images.shape[1:] != (3, 224, 224) or images.dtype != torch.float32:
            raise SystemExit(f"{peer} gave {images.dtype} of shape {tuple(images.shape)}")
        count += len(images)
    wall = time.perf_counter() - start
    print(json.dumps({"images_per_s": count / wall, "cpu_ms": (cpu_seconds(processes) - cpu) / count * 1e3}))


def measure(photos: Path, images: int, batch: int, workers: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """The rows of each peer, round by round."""
    rows: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        lay_out(photos, images, Path(folder))
        for i in range(rounds):
            for peer in (PEERS[(i + k) % len(PEERS)] for k in range(len(PEERS))):
                command = [sys.executable, __file__, "--child", peer, folder, str(batch), str(workers)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{peer} failed:\n{done.stderr}")
                rows[peer].append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def report(rows: dict[str, list[dict[str, float]]], images: int, batch: int, workers: int) -> str:
    """A Markdown table; the ratios are medians of the rounds' own."""
    rounds = len(rows["timm"])
    lines = [
        "# Augmented training images a second, from photographs on disk",
        "",
        f"{machine()}. {images} images of 224 pixels an epoch, batches of {batch}, {workers} workers; medians of "
        f"{rounds} interleaved rounds, one process each; `python benchmarks/data_pipeline.py PHOTOS`.",
        "",
        "| | images/s | over timm | over timm, prefetcher | CPU ms an image | timm's over it | timm, prefetcher's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for peer in PEERS:
        cells = []
        for name, upside in (("images_per_s", True), ("cpu_ms", False)):
            mine = [row[name] for row in rows[peer]]
            cells.append(f"{statistics.median(mine):.0f}" if upside else f"{statistics.median(mine):.2f}")
            for other in PEERS[2:]:
                theirs = [row[name] for row in rows[other]]
                ratios = [a / b if upside else b / a for a, b in zip(mine, theirs, strict=True)]
                cells.append(f"{statistics.median(ratios):.2f}")
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Processor, cores and versions, for the head of a table."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((s.partition(":")[2].strip() for s in info.read_text().splitlines() if "model name" in s), cpu)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "torchvision", "pillow", "timm"))
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?", help="folder of photographs, not of class folders")
    parser.add_argument("--images", type=int, default=1000, help="an epoch's, by repeating the photographs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=4, metavar=("PEER", "FOLDER", "BATCH", "WORKERS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], int(args.child[2]), int(args.child[3]))
        return
    if args.photos is None:
        parser.error("PHOTOS is needed: a folder of photographs")
    settings = {"images": args.images, "batch": args.batch, "workers": args.workers}
    table = report(measure(args.photos, rounds=args.rounds, **settings), **settings)
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
