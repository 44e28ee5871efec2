"""Two kinds of labels that plain classification is not made for: uneven classes, and several labels an image.

    python examples/uneven_and_several_labels.py uneven photos/ --out runs/uneven
    python examples/uneven_and_several_labels.py several photos/ --out runs/several --size 64

DATA is a folder with train/ and test/ (or val/), each with a folder of images for each class. `uneven` takes ten of its
classes, the first with 500 training images, the last with 5, and fine-tunes without anything, with class weights and
with balanced sampling. `several` puts four images into one, in two rows, whose labels are the classes of the four, and
fits a head and fine-tunes everything. Both print a table of figures on the test images and write it into OUT.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np

import deit_models
from deit_models.data.datasets import open_dataset
from deit_models.data.records import ArrayRecords, ImageRecords, SubsetRecords
from deit_models.finetuning.finetune import FinetuneResult

WAYS = {"without": {}, "class_weights": {"class_weights": "balanced"}, "sampling": {"sampling": "balanced"}}
UNEVEN = ("balanced_accuracy", "macro_f1", "top1")
SEVERAL = ("map", "macro_f1", "micro_f1")


def main() -> None:
    """Run one of the two comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", choices=["uneven", "several"])
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and table.md")
    parser.add_argument("--model", default=deit_models.registry.DEFAULT_MODEL)
    parser.add_argument("--modes", nargs="+", help="default: full; for several labels head and full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and images, default 0 1 2")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000, help="for several labels: training images, default 2000")
    parser.add_argument("--size", type=int, default=64, help="for several labels: side of the input, default 64")
    parser.add_argument("--largest", type=int, default=500, help="for uneven classes: images of the largest")
    args = parser.parse_args()
    train = open_dataset(args.data, "train")
    test = open_dataset(args.data, "val", classes=train.classes)
    (uneven if args.labels == "uneven" else several)(args, train, test)


def uneven(args: argparse.Namespace, train: ImageRecords, test: ImageRecords) -> None:
    """Fine-tune on a few classes, each with fewer images than the one before."""
    names = train.classes[:10]
    found: dict[str, list[FinetuneResult]] = defaultdict(list)
    for seed in args.seeds:
        few, exam = long_tail(train, names, largest=args.largest, seed=seed), of_classes(test, names)
        for mode in args.modes or ["full"]:
            for way, changes in WAYS.items():
                if mode == "head" and "sampling" in changes:  # it learns from all images at once
                    continue
                settings = {"epochs": args.epochs, "seed": seed, **changes}
                out = args.out / mode / f"{way}_{seed}"
                found[f"{mode}, {way}"].append(finetuned(args, few, exam, out, mode=mode, settings=settings))
    write_table(args.out / "table.md", found, UNEVEN)


def long_tail(records: ImageRecords, names: tuple[str, ...], *, largest: int, seed: int) -> ImageRecords:
    """Images of some classes: `largest` of the first, a hundredth of the last, in between by equal factors."""
    members = defaultdict(list)
    for index in range(len(records)):
        members[records.classes[records.label(index)]].append(index)
    draw, chosen = random.Random(seed), []
    for place, name in enumerate(names):
        count = max(round(largest * 0.01 ** (place / max(len(names) - 1, 1))), 2)
        chosen += draw.sample(members[name], min(count, len(members[name])))
    return SubsetRecords(records, chosen, classes=names)


def of_classes(records: ImageRecords, names: tuple[str, ...]) -> ImageRecords:
    """All images of some classes."""
    chosen = [index for index in range(len(records)) if records.classes[records.label(index)] in names]
    return SubsetRecords(records, chosen, classes=names)


def several(args: argparse.Namespace, train: ImageRecords, test: ImageRecords) -> None:
    """Learn the classes of the four images in each mosaic."""
    found: dict[str, list[FinetuneResult]] = defaultdict(list)
    for seed in args.seeds:
        learned, exam = mosaics(train, args.images, seed=seed), mosaics(test, args.images // 4, seed=seed)
        for mode in args.modes or ["head", "full"]:
            settings = {"epochs": args.epochs, "seed": seed, "img_size": args.size}
            out = args.out / mode / str(seed)
            found[mode].append(finetuned(args, learned, exam, out, mode=mode, settings=settings))
    write_table(args.out / "table.md", found, SEVERAL)


def mosaics(records: ImageRecords, count: int, *, seed: int) -> ImageRecords:
    """Images of four others in two rows, with the classes of the four as labels."""
    draw, images, labels = random.Random(seed), [], []
    for _ in range(count):
        parts = [records[index] for index in draw.sample(range(len(records)), 4)]
        pixels = [np.asarray(image) for image, _ in parts]
        images.append(np.vstack([np.hstack(pixels[:2]), np.hstack(pixels[2:])]))
        labels.append(tuple(sorted({label for _, label in parts})))
    return ArrayRecords(f"mosaics of {records.name}", np.stack(images), labels, records.classes)


def finetuned(
    args: argparse.Namespace, train: ImageRecords, test: ImageRecords, out: Path, *, mode: str, settings: dict
) -> FinetuneResult:
    """One run, which goes on where it was broken off."""
    model = deit_models.from_pretrained(args.model)
    recipe = deit_models.finetuning.finetune.recipe_for(
        train.name, model, images=len(train), teacher=False, patience=0, **settings
    )
    result = deit_models.finetune(model, train=train, test=test, out=out, mode=mode, recipe=recipe)
    print(out, {name: round(value, 2) for name, value in result.metrics["test"].items()}, flush=True)
    return result


def write_table(path: Path, found: dict[str, list[FinetuneResult]], figures: tuple[str, ...]) -> None:
    """A row for each way: means over the seeds on the test images, and their spread."""
    lines = [f"| {' | '.join(['way', *figures, 'seconds'])} |", f"| --- |{' ---: |' * (len(figures) + 1)}"]
    for way, runs in found.items():
        cells = [way]
        for name in figures:
            values = [run.metrics["test"][name] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        cells.append(f"{statistics.mean(run.metrics['seconds'] for run in runs):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
