"""Fine-tune a pretrained DeiT on CIFAR-10, or CIFAR-100, with the authors' recipe or a shorter one.

    python examples/finetune_cifar10.py --root data --download --out runs/cifar10 --mode head
    python examples/finetune_cifar10.py --root data --out runs/cifar10_full epochs=30 batch_size=256

The recipe for these sets is the authors', from issue 45 of their repository: SGD at 0.01, batches of 768,
1000 epochs, no erasing, no stochastic depth, everything else as on ImageNet; images are enlarged to the model's size.
Fields of the recipe can be given as NAME=VALUE. A fifth of the training images is set aside to choose the epoch,
and the result is scored once, on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deit_models
from deit_models.data.datasets import open_dataset
from deit_models.recipes.recipe import recipe_from_toml


def main() -> None:
    """Fine-tune and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10, cifar100, or a folder with train/ and test/")
    parser.add_argument("--root", type=Path, help="where a data set known by name lies, default data")
    parser.add_argument("--download", action="store_true", help="fetch it if it is not there")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a name, a folder or a Hub repository")
    parser.add_argument("--mode", default="full", help="full, head, or last-N")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="fields of the recipe, as in TOML")
    args = parser.parse_args()
    where = {"root": args.root, "download": args.download}
    train = open_dataset(args.data, "train", **where)
    test = open_dataset(args.data, "val", classes=train.classes, **where)
    result = deit_models.finetune(
        args.model,
        train=train,
        test=test,
        out=args.out,
        mode=args.mode,
        recipe=recipe_from_toml("\n".join(['preset = "finetune_sgd"', *args.settings])),
        on_epoch=lambda row: print(json.dumps(row), flush=True),
    )
    figures = result.metrics["test"]
    print(f"{figures['top1']:.2f} % of {figures['images']} test images, wrote {args.out / 'best'}")


if __name__ == "__main__":
    main()
