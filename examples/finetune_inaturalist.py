"""Fine-tune on iNaturalist 2018 or 2019 as the competition published it, at any rank of the taxonomy.

    python examples/finetune_inaturalist.py path/to/inaturalist --out runs/inat --rank genus --mode head

The folder holds `train2018.json`, `val2018.json`, `categories.json` and `train_val2018/<super-category>/<category>/`,
or, as the DeiT authors moved the images, `train_val2018/<category>/`. Ranks: kingdom, phylum, class, order,
supercategory, family, genus, name. Classes are numbered by their first training annotation, as in the authors' code.
The settings are the preset for these sets; any field of a recipe can be given as NAME=VALUE at the end. Training in
full on all of 2018 at 224 pixels needs GPUs; --mode head takes one pass over the images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deit_models
from deit_models.data.datasets import open_dataset
from deit_models.recipes.recipe import recipe_from_toml


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the JSON files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--year", type=int, choices=[2018, 2019], default=2018)
    parser.add_argument("--rank", default="name", help="what makes a class, default name: the species")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a name, a folder or a Hub repository")
    parser.add_argument("--mode", default="full", help="full, head, or last-N")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="fields of the recipe, as in TOML")
    return parser.parse_args()


def main() -> None:
    """Fine-tune on the training images, score on the validation images, print the accuracy."""
    args = parse_args()
    source = f"inaturalist-{args.year}:{args.rank}"
    train = open_dataset(source, "train", root=args.data)
    val = open_dataset(source, "val", root=args.data, classes=train.classes)
    recipe = recipe_from_toml("\n".join(['preset = "finetune_inaturalist"', *args.settings]))
    result = deit_models.finetune(
        args.model,
        train=train,
        val=val,
        out=args.out,
        mode=args.mode,
        recipe=recipe,
        on_epoch=lambda row: print(json.dumps(row), flush=True),
    )
    figures = result.metrics["val"]
    print(
        f"{figures['top1']:.2f} % of {figures['images']} validation images, {len(train.classes)} classes by {args.rank}"
    )


if __name__ == "__main__":
    main()
