"""Classify a real photograph, offline, with the checkpoint that comes with the package.

    python examples/classify_photo.py [IMAGE ...]

Without arguments it takes scikit-image's photograph of Chelsea the cat (CC0). The shipped model has the ten classes
of CIFAR-10 and an input of 32x32 pixels; --model deit_small_patch16_224 has the 1000 of ImageNet (and is downloaded).
"""

from __future__ import annotations

import argparse

import deit_models
from deit_models.registry import DEFAULT_MODEL


def demo_photo() -> list[object]:
    """Chelsea the cat as an (H, W, 3) uint8 array, from scikit-image's own files."""
    try:
        from skimage import data
    except ImportError:
        raise SystemExit("no image given, and no demo photograph: pip install scikit-image, or pass an image") from None
    return [data.chelsea()]


def main() -> None:
    """Print the three most likely classes of each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    args = parser.parse_args()
    classifier = deit_models.Classifier(args.model)
    names = args.images or ["scikit-image's photograph of Chelsea the cat"]
    for name, result in zip(names, classifier(args.images or demo_photo(), top_k=3), strict=True):
        print(name)
        for prediction in result.predictions:
            print(f"  {prediction.probability:6.1%}  {prediction.label}")


if __name__ == "__main__":
    main()
