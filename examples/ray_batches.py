"""Classify and embed a folder of photos with Ray Data: a `Classifier` in each of its actors, on any number of machines.

    python examples/ray_batches.py path/to/photos --out predictions [--model deit_small_patch16_224] [--actors 2]

Ray reads and decodes the images, shares them among the actors, starts again what fails, and writes Parquet files with
the columns path, label, probability and embedding. Needs `pip install "ray[data]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray

from deit_models import Classifier
from deit_models.registry import DEFAULT_MODEL


class Photos:
    """An actor: loads the model once, then classifies one batch after the other."""

    def __init__(self, model: str) -> None:
        self.classifier = Classifier(model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = list(batch["image"])  # arrays (H, W, 3), of which each may have another size
        tops = [result.predictions[0] for result in self.classifier(images, top_k=1)]
        return {
            "path": batch["path"],
            "label": np.array([top.label for top in tops]),
            "probability": np.array([top.probability for top in tops], dtype=np.float32),
            "embedding": self.classifier.embed(images).numpy(),
        }


def main() -> None:
    """Run the pipeline and print the first rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the Parquet files")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: the small one that comes with the package")
    parser.add_argument("--actors", type=int, default=2, help="how many models may work at once, default 2")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each actor, default 0; 0.5: two share one")
    args = parser.parse_args()
    images = ray.data.read_images(str(args.photos.resolve()), mode="RGB", include_paths=True)
    results = images.map_batches(
        Photos,
        fn_constructor_args=(args.model,),
        batch_size=32,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=args.actors),
        num_gpus=args.gpus,
    )
    results.write_parquet(str(args.out.resolve()))
    written = ray.data.read_parquet(str(args.out.resolve()))
    print(f"{written.count()} images")
    for row in written.sort("path").take(3):
        print(f"{Path(row['path']).name}: {row['label']} ({row['probability']:.1%})")


if __name__ == "__main__":
    main()
