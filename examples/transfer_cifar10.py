"""An honest transfer on CIFAR-10: pre-trained on five classes, few-shot on the other five.

    python examples/transfer_cifar10.py path/to/cifar10 --out runs/transfer

The data folder holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. A small transformer is trained on airplane,
automobile, bird, cat and deer, with all images. Then it is trained on 100 images of each of dog, frog, horse, ship and
truck: as a head on its features, in full, and, for comparison, from random weights. A fifth of these images is set
aside to choose the penalty or the epoch; the result is scored on all test images of the five classes. A second start
continues the first one.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from seed_table import write_table

import deit_models
from deit_models.data.datasets import open_dataset
from deit_models.data.records import ImageRecords, SubsetRecords

MODEL = "deit_micro_patch4_32"
KNOWN = 5
"""The first five classes in alphabetical order are trained on, the others are met later."""
WAYS = {"from scratch": "full", "head": "head", "full": "full"}


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of the recorded table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--pretrain-epochs", type=int, default=10)
    parser.add_argument("--shots", type=int, default=100, help="images of each new class")
    parser.add_argument("--epochs", type=int, default=60, help="of the ways that train on them")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    return parser.parse_args()


def some_classes(records: ImageRecords, classes: tuple[str, ...]) -> SubsetRecords:
    """The images of some classes, with new label numbers."""
    wanted = [index for index in range(len(records)) if records.classes[records.label(index)] in classes]
    return SubsetRecords(records, wanted, classes=classes)


def few(records: ImageRecords, shots: int, seed: int) -> SubsetRecords:
    """A number of images of each class, drawn by seed."""
    by_class: dict[int, list[int]] = {}
    for index in range(len(records)):
        by_class.setdefault(records.label(index), []).append(index)
    generator = random.Random(seed)
    return SubsetRecords(records, [i for label in sorted(by_class) for i in generator.sample(by_class[label], shots)])


def pretrain(args: argparse.Namespace, train: ImageRecords, test: ImageRecords) -> Path:
    """Train on the known classes, unless that is done, and return the folder of the last weights."""
    torch.manual_seed(0)
    recipe = deit_models.recipe_named(
        "cifar_scratch", epochs=args.pretrain_epochs, warmup_epochs=1, seed=0, eval_every=5
    )
    result = deit_models.train(
        deit_models.create_model(MODEL, num_classes=KNOWN),
        recipe=recipe,
        train=train,
        val=test,
        out=args.out / "pretrained",
        workers=0,
        on_epoch=lambda row: print(json.dumps(row), flush=True),
    )
    print(f"pre-trained: {result.top1:.2f} % of {len(test)} test images of the known classes", flush=True)
    return args.out / "pretrained" / "model"


def main() -> None:
    """Pre-train, then run every way with every seed, unless that is done, and write the table."""
    args = parse_args()
    train = open_dataset(args.data, "train")
    test = open_dataset(args.data, "val", classes=train.classes)
    known, new = train.classes[:KNOWN], train.classes[KNOWN:]
    weights = pretrain(args, some_classes(train, known), some_classes(test, known))
    pool, scored = some_classes(train, new), some_classes(test, new)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        for way, mode in WAYS.items():
            torch.manual_seed(seed)
            scratch = way == "from scratch"
            recipe = deit_models.recipe_named(
                "finetune",
                epochs=args.epochs,
                warmup_epochs=min(3, args.epochs - 1),
                batch_size=32,
                lr_batch=32,
                crop="pad",
                patience=0,
                # random weights learn at one rate in all layers
                layer_decay=1.0 if scratch else 0.75,
                seed=seed,
            )
            result = deit_models.finetune(
                deit_models.create_model(MODEL) if scratch else weights,
                train=few(pool, args.shots, seed),
                test=scored,
                out=args.out / f"{way.replace(' ', '_')}_{seed}",
                mode=mode,
                recipe=recipe,
                split_seed=seed,
                workers=0,
            )
            found[way].append(result.metrics)
            metrics = result.metrics
            print(f"{way}, seed {seed}: {metrics['test']['top1']:.2f} % in {metrics['seconds']:.0f} s", flush=True)
    write_table(found, args.out / "table.md")


if __name__ == "__main__":
    main()
