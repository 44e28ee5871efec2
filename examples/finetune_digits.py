"""From the shipped CIFAR-10 checkpoint to scikit-learn's 1,797 handwritten digits: from scratch, head alone, in full.

    python examples/finetune_digits.py --out runs/digits

Needs scikit-learn for its data. A fifth of the images of each class, drawn by seed, is the test set, which has no part
in any choice; `finetune` sets a fifth of the others aside to choose the best epoch or penalty. Prints, and writes to
`table.md`, the test accuracy and time of each way, as mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from seed_table import write_table

import deit_models
from deit_models.data.records import ArrayRecords
from deit_models.data.split import parts, stratified_split

MODEL = "deit_micro_patch4_32"
WAYS = {"from scratch": "full", "head": "head", "full": "full"}
"""A way to the mode of `finetune`; the first one starts from random weights."""


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of the recorded table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--epochs", type=int, default=30, help="of the ways that train")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--plot", action="store_true", help="also draw curves, confusion matrix and worst mistakes")
    return parser.parse_args()


def digits() -> ArrayRecords:
    """8x8 pixels of 0 to 16, as RGB images of 8 bits; the model's transform enlarges them to its 32 pixels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = (data.images * (255 / 16)).round().astype("uint8")
    return ArrayRecords("digits", grey[..., None].repeat(3, axis=-1), data.target.tolist(), map(str, range(10)))


def main() -> None:
    """Run every way with every seed, unless that is done, and write the table."""
    args = parse_args()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    records = digits()
    labels = [records.label(index) for index in range(len(records))]
    for seed in range(args.seeds):
        train, test = parts(records, stratified_split(labels, fraction=0.2, seed=seed))
        for way in args.ways:
            torch.manual_seed(seed)
            begin = deit_models.create_model if way == "from scratch" else deit_models.from_pretrained
            # mirrored digits are wrong
            changes = {"hflip": 0.0, "color_jitter": 0.0, "crop": "pad", "patience": 0, "seed": seed}
            changes["warmup_epochs"] = min(3, args.epochs - 1)
            result = deit_models.finetune(
                begin(MODEL),
                train=train,
                test=test,
                out=args.out / f"{way.replace(' ', '_')}_{seed}",
                mode=WAYS[way],
                recipe=deit_models.recipe_named("finetune", epochs=args.epochs, **changes, **_scratch(way)),
                split_seed=seed,
                plot=args.plot,
                workers=0,
            )
            found[way].append(result.metrics)
            print(
                f"{way}, seed {seed}: {result.metrics['test']['top1']:.2f} % in {result.metrics['seconds']:.0f} s",
                flush=True,
            )
    write_table(found, args.out / "table.md")


def _scratch(way: str) -> dict[str, Any]:
    """Random weights learn at one rate in all layers."""
    return {"layer_decay": 1.0} if way == "from scratch" else {}


if __name__ == "__main__":
    main()
