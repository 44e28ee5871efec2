"""Teach a model the classes of a folder of photos, and classify with it.

    python examples/finetune_photos.py path/to/photos --out runs/photos [--model deit_small_patch16_224] [--mode full]

The folder holds one folder of images a class. A fifth of the images of each class is set aside for validation.
`deit-models finetune` does the same from a shell; this shows the Python side.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deit_models
from deit_models.registry import DEFAULT_MODEL


def main() -> None:
    """Fine-tune, print the figures, and classify one of the images that were set aside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder with a folder of images for each class")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: the small one that comes with the package")
    parser.add_argument("--mode", default="head", help="head, full, or last-N; default head, which takes seconds")
    args = parser.parse_args()
    result = deit_models.finetune(args.model, train=args.photos, out=args.out, mode=args.mode)
    figures = result.metrics["val"]
    print(f"{figures['top1']:.2f} % of {figures['images']} images that were set aside; by class:")
    print((args.out / "per_class_val.csv").read_text(encoding="utf-8"))
    photo = args.photos / json.loads((args.out / "split.json").read_text(encoding="utf-8"))["val"][0]
    answer = deit_models.Classifier(args.out / "best")(photo, top_k=1).predictions[0]
    print(f"{photo}: {answer.label} ({answer.probability:.1%})")


if __name__ == "__main__":
    main()
