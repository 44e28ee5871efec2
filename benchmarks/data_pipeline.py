"""Augmented training images a second of one loading process: deit-models beside timm, from the same files.

    python benchmarks/data_pipeline.py PHOTOS [--sizes 32 64 224] [--images 4096] [--rounds 5]
                                       [--write benchmarks/results/data_pipeline.md]

PHOTOS is a folder of image files. For 224 pixels they are read as they are, repeated until there are enough; for 32 and
64 pixels, small JPEG files are made of random squares of them first. Both sides decode, crop, flip, apply
rand-m9-mstd0.5-inc1 or nothing, normalise and erase (pixel, 0.25), and give float32 batches; mixing is left out. The
crop is a random resized one (bicubic) at 224 pixels; at 32 and 64 the image is padded by an eighth and cut, for which
timm gets torchvision's RandomCrop in the place of its first transform, as the DeiT authors' script does. timm runs with
its prefetcher, its scripts' default, which sends bytes to the main process and normalises and erases there.

By default deit-models runs "in memory": small images are decoded once, before the clock starts; "from files" decodes
each time, as timm does, "from Arrow files" the same from a saved data set of Hugging Face; "cut where the model is"
needs no loading process: the main process does everything.

Each side has a process of its own and one loading process, each with one thread; it reads one epoch to warm up and as
many as take two seconds of CPU time for the clock; the sides take turns, and ratios are taken within a round. The
figure is CPU time, which a busy machine disturbs least: of the loading process, of which a run has many, and of the
main process, of which it has one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ARROW = "deit-models, from Arrow files"
SMALL = ("deit-models, in memory", "deit-models, from files", ARROW, "timm")
PEERS = {32: SMALL, 64: SMALL, 224: ("deit-models, from files", ARROW, "timm")}
THERE = "deit-models, cut where the model is"
AUGMENTS = ("none", "rand-m9-mstd0.5-inc1")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
CORES = 16
ENOUGH_S = 2.0
"""CPU time to measure: the kernel counts it in hundredths."""


def lay_out(photos: Path, images: int, size: int, folder: Path) -> None:
    """A train/ folder of `images` files of each photo's class: links, or small squares of them saved as JPEG.

    The same files are written into Arrow files beside it.
    """
    from PIL import Image

    files = sorted(path.resolve() for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise SystemExit(f"{photos}: {len(files)} images; expected a folder of at least two")
    dice = random.Random(0)
    decoded = {} if size == 224 else {file: Image.open(file).convert("RGB") for file in files}
    for i in range(images):
        file = files[i % len(files)]
        target = folder / "train" / file.stem / (f"{i}{file.suffix}" if size == 224 else f"{i}.jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        if size == 224:
            target.symlink_to(file)
            continue
        photo = decoded[file]
        side = dice.randint(min(photo.size) // 2, min(photo.size))
        left, top = dice.randint(0, photo.width - side), dice.randint(0, photo.height - side)
        photo.resize((size, size), box=(left, top, left + side, top + side)).save(target, quality=90)
    save_set(folder)


def save_set(folder: Path) -> None:
    """The images of train/ as a data set of Hugging Face, saved in the folder set, with the same encoded bytes."""
    from datasets import ClassLabel, Dataset, Features, Image

    files = sorted(folder.glob("train/*/*"))
    features = Features({"image": Image(), "label": ClassLabel(names=sorted({file.parent.name for file in files}))})
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    columns = {"image": images, "label": [file.parent.name for file in files]}
    Dataset.from_dict(columns, features=features).save_to_disk(folder / "set")


def our_loader(folder: str, size: int, augment: str, batch: int, *, peer: str) -> Any:
    """The batches that `deit_models.train` trains with."""
    import torch

    from deit_models.augmentation.augment import TrainTransform
    from deit_models.augmentation.levels import TrainInput
    from deit_models.augmentation.samples import TrainingSamples, TrainSampler, training_batches
    from deit_models.batches.inputs import InputBatches
    from deit_models.batches.memory import keep_in_memory
    from deit_models.checkpoint import Preprocessing
    from deit_models.data.datasets import open_dataset
    from deit_models.recipes.recipe import Recipe

    records = open_dataset(Path(folder, "set") if peer == ARROW else Path(folder, "train"), "train")
    if not peer.endswith("files"):
        records = keep_in_memory(records, "ram", workers=1)
    preprocessing = Preprocessing(resize=size, crop=(size, size))
    crop = "random_resized" if size == 224 else "pad"
    recipe = Recipe(crop=crop, augment=augment, color_jitter=0.0, erase=0.25)
    transform, cpu = TrainTransform(recipe, preprocessing, (size, size)), torch.device("cpu")
    sampler = TrainSampler(len(records), batch_size=batch)
    if peer == THERE:
        return training_batches(records, transform, sampler, batch_size=batch, workers=1, device=cpu)
    samples, to_input = TrainingSamples(records, transform), TrainInput(preprocessing, cpu)
    return InputBatches(
        samples, sampler, to_input, batch_size=batch, workers=1, device=cpu, size=(size, size), keep_workers=True
    )


def timm_loader(folder: str, size: int, augment: str, batch: int) -> Any:
    """The loader timm's training script makes, with the same augmentation."""
    import torch
    from PIL import Image, ImageOps
    from timm.data import ImageDataset, auto_augment, create_loader
    from torchvision.transforms import RandomCrop

    def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
        return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)

    # With Pillow 13 timm 1.0.31 stops at the first image posterised to 0 bits, about one in 700
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    dataset = ImageDataset(str(Path(folder, "train")))
    loader = create_loader(
        dataset,
        size,
        batch,
        is_training=True,
        auto_augment=None if augment == "none" else augment,
        color_jitter=0.0,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        num_workers=1,
        device=torch.device("cpu"),
    )
    if size != 224:
        dataset.transform.transforms[0] = RandomCrop(size, padding=size // 8)
    return loader


def cpu_seconds(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def child(peer: str, folder: str, size: int, augment: str, batch: int) -> None:
    """One measurement; prints a JSON row."""
    import torch

    torch.set_num_threads(1)
    loader = timm_loader(folder, size, augment, batch) if peer == "timm" else our_loader(
        folder, size, augment, batch, peer=peer
    )  # fmt: skip
    for _ in loader:
        pass
    inner = getattr(loader, "loader", loader)  # timm's prefetcher and our batches wrap a DataLoader
    workers = [worker.pid for worker in getattr(inner._iterator, "_workers", ())]
    if not workers and peer != THERE:
        raise SystemExit(f"{peer}: its loading process ended after the first epoch, so that it cannot be timed")
    count, start, before = 0, time.perf_counter(), busy(workers)
    while sum(busy(workers)) - sum(before) < ENOUGH_S:
        for images, *_ in loader:
            if images.shape[1:] != (3, size, size) or images.dtype != torch.float32:
                raise SystemExit(f"{peer} gave {images.dtype} of shape {tuple(images.shape)}")
            count += len(images)
    wall = time.perf_counter() - start
    worker_us, main_us = ((b - a) / count * 1e6 for a, b in zip(before, busy(workers), strict=True))
    print(json.dumps({"worker_us": worker_us, "main_us": main_us, "wall_per_s": count / wall}))


def busy(workers: list[int]) -> tuple[float, float]:
    """CPU seconds so far of the loading processes and of this one."""
    return sum(map(cpu_seconds, workers)), cpu_seconds(os.getpid())


Rows = dict[tuple[int, str, str], list[dict[str, float]]]


def measure(photos: Path, sizes: Iterable[int], counts: dict[bool, int], batch: int, rounds: int) -> Rows:
    """The rows of each size, augmentation and peer, round by round."""
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            lay_out(photos, counts[size == 224], size, Path(folder, str(size)))
        for number in range(rounds):
            for size in sizes:
                for augment in AUGMENTS:
                    peers = [*PEERS[size], *[THERE] * (size != 224 and augment == "none")]
                    for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
                        given = [peer, str(Path(folder, str(size))), str(size), augment, str(batch)]
                        done = subprocess.run(
                            [sys.executable, __file__, "--child", *given], capture_output=True, text=True, check=False
                        )
                        if done.returncode:
                            raise SystemExit(f"{peer} failed:\n{done.stderr}")
                        rows.setdefault((size, augment, peer), []).append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def per_core(row: dict[str, float]) -> float:
    """Images a second of CPU time, of the loading process, or of the main one where it does everything."""
    return 1e6 / (row["worker_us"] or row["main_us"])


def report(rows: Rows, counts: dict[bool, int], batch: int) -> str:
    """A Markdown table; the ratios are medians of the rounds' own."""
    rounds = len(next(iter(rows.values())))
    lines = [
        "# Augmented training images a second of one core",
        "",
        f"{machine()}. One loading process with one thread; {counts[False]} small images or {counts[True]} photographs "
        f"an epoch, batches of {batch}; medians of {rounds} interleaved rounds, one process each; "
        "`python benchmarks/data_pipeline.py PHOTOS`.",
        "",
        "Images/s are those of a second of CPU time of the loading process. The last column is "
        f"{CORES} times as many, an extrapolation and no measurement: it holds as long as the memory is fast enough "
        "and the main process keeps up; the column before has the time of the main process for an image.",
        "",
        "| pixels | augmentation | | images/s a core | over timm | images/s by the clock | main process, us an image "
        f"| {CORES} cores, extrapolated |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (size, augment, peer), mine in rows.items():
        theirs = rows[size, augment, "timm"]
        speed = statistics.median(map(per_core, mine))
        ratio = statistics.median(per_core(a) / per_core(b) for a, b in zip(mine, theirs, strict=True))
        wall, main = (statistics.median(row[name] for row in mine) for name in ("wall_per_s", "main_us"))
        most = "" if peer == THERE else f"{CORES * speed:,.0f}"
        lines.append(
            f"| {size} | {augment} | {peer} | {speed:,.0f} | {ratio:.2f} | {wall:,.0f} | {main:.0f} | {most} |"
        )
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
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--images", type=int, default=4096, help="an epoch's small images")
    parser.add_argument("--photos-an-epoch", type=int, default=512, help="by repeating the photographs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        peer, folder, size, augment, batch = args.child
        child(peer, folder, int(size), augment, int(batch))
        return
    if args.photos is None:
        parser.error("PHOTOS is needed: a folder of photographs")
    counts = {False: args.images, True: args.photos_an_epoch}
    table = report(measure(args.photos, args.sizes, counts, args.batch, args.rounds), counts, args.batch)
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
