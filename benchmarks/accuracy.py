"""Predictions of the faster forms of a model: agreement and accuracy on labelled images, by backend and precision.

    python benchmarks/accuracy.py CIFAR10 [--backends eager openvino] [--write benchmarks/results/accuracy.md]

CIFAR10 is a folder with train/<class>/ and test/<class>/. The test images are classified by the model and by every form
that `optimize` can make of it here, chosen by name and accepted at any agreement. The ranges of int8 come from images
of the training set, the same number from each class, spread over its files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from loading import machine
from torch import Tensor

import deit_models
from deit_models.deploy.runtimes import BACKENDS, BackendName
from deit_models.images.transforms import transform_for
from deit_models.models.layers import ImageClassifier

BATCH = 100


def read_images(model: ImageClassifier, folder: Path, per_class: int | None) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) through the model's transform, and labels (B,); `per_class` evenly spaced, or all."""
    if model.origin is None or not model.origin.class_names:
        raise SystemExit("this model does not name its classes")
    transform = transform_for(model)
    images, labels = [], []
    for label, name in enumerate(model.origin.class_names):
        files = sorted(path for path in (folder / name).iterdir() if path.is_file())
        step = 1 if per_class is None else max(len(files) // per_class, 1)
        for path in files[::step][:per_class]:
            images.append(transform(path))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


@torch.inference_mode()
def answers(model: ImageClassifier, images: Tensor) -> Tensor:
    """Logits, (B, num_classes)."""
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def table(
    model: ImageClassifier, calibration: Tensor, images: Tensor, labels: Tensor, backends: list[BackendName]
) -> list[str]:
    """A row for each backend and precision, printed as it is known."""
    expected = answers(model, images)

    def top1(logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == labels).double().mean())

    lines = [
        "| backend | precision | agreement (%) | accuracy (%) | points | largest difference of a logit |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        f"| the model itself | float32 | | {top1(expected):.2f} | | |",
    ]
    print("\n".join(lines), flush=True)
    for backend in backends:
        for precision in BACKENDS[backend].precisions:
            fast = deit_models.optimize(
                model, backend=backend, precision=precision, sample=BATCH, calibration=calibration, min_agreement=0
            )
            if (fast.choice.backend, fast.choice.precision) != (backend, precision):
                lines.append(f"| {backend} | {precision} | not on this machine | | | |")
            else:
                found = answers(fast, images)
                agreement = 100 * float((found.argmax(1) == expected.argmax(1)).double().mean())
                difference = float((found - expected).abs().max())
                lines.append(
                    f"| {backend} | {precision} | {agreement:.2f} | {top1(found):.2f} "
                    f"| {top1(found) - top1(expected):+.2f} | {difference:.2g} |"
                )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="CIFAR10", help="a folder with train/ and test/")
    parser.add_argument("--model", default="deit_micro_patch4_32")
    parser.add_argument("--calibration", type=int, default=300, metavar="N", help="training images for int8's ranges")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS), help="default: all")
    parser.add_argument("--write", type=Path, help="also write the table there")
    args = parser.parse_args()
    model = deit_models.from_pretrained(args.model)
    calibration, _ = read_images(model, args.images / "train", max(args.calibration // model.num_classes, 1))
    images, labels = read_images(model, args.images / "test", None)
    capability = torch.backends.cpu.get_cpu_capability()
    head = (
        f"`{args.model}`, {len(images):,} test images, {len(calibration)} training images for int8's ranges. "
        f"{machine()}, {capability}."
    )
    print(head, flush=True)
    lines = table(model, calibration, images, labels, args.backends)
    if args.write:
        args.write.write_text("\n".join(["# Accuracy of faster forms", "", head, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
