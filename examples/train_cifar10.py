"""Train a small DeiT on CIFAR-10 from scratch, save it in half precision, and score the saved file.

    python examples/train_cifar10.py path/to/cifar10 --out runs/cifar10

The data folder holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. The last epoch's weights are kept: the
figure of an epoch that test accuracy selected would be optimistic. A second start with the same `--out` continues after
the last finished epoch. `deit-models train` does the same from a shell; this shows the Python side.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import deit_models


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of the first stage of the checkpoint in `weights/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, and to resume from")
    parser.add_argument("--model", default="deit_micro_patch4_32")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--warmup-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=5, metavar="EPOCHS", help="the last epoch is always scored")
    return parser.parse_args()


def main() -> None:
    """Train, save, score."""
    args = parse_args()
    classes = sum(entry.is_dir() for entry in (args.data / "train").iterdir())
    torch.manual_seed(args.seed)
    model = deit_models.create_model(args.model, num_classes=classes)
    recipe = deit_models.recipe_named(
        "cifar_scratch",
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        eval_every=args.eval_every,
    )
    deit_models.train(
        model,
        recipe=recipe,
        train=args.data,
        val=args.data,
        out=args.out,
        on_epoch=lambda row: print(json.dumps(row), flush=True),
    )
    model.half().save_pretrained(args.out / "half")
    saved = deit_models.from_pretrained(args.out / "half")
    result = deit_models.evaluate(saved, args.data)
    print(f"{args.out / 'half'}: {result.top1:.2f} % of all {result.images} test images")


if __name__ == "__main__":
    main()
