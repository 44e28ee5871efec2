"""Classify photographs, offline, with the checkpoint that comes with the package.

    python examples/classify_photo.py [IMAGE ...]

Without arguments it takes cat.jpg beside this file. The shipped model has the ten classes of CIFAR-10 and an input of
32x32 pixels; --model deit_small_patch16_224 has the 1000 classes of ImageNet (and is downloaded).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deit_models
from deit_models.registry import DEFAULT_MODEL

CAT = Path(__file__).with_name("cat.jpg")


def main() -> None:
    """Print the three most likely classes of each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=[CAT], help="image files")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    args = parser.parse_args()
    for result in deit_models.Classifier(args.model)(args.images, top_k=3):
        print(result.source)
        for prediction in result.predictions:
            print(f"  {prediction.probability:6.1%}  {prediction.label}")


if __name__ == "__main__":
    main()
