"""Heat maps: do they show what a model uses, and do they depend on its weights?

    python benchmarks/heat_maps.py CIFAR10_TEST [--images 500] [--write benchmarks/results/heat_maps.md]

CIFAR10_TEST is a folder of one folder a class; the model is the shipped checkpoint. Two checks:

Deletion: patches become the mean colour, four at a time, the hottest first. The faster the probability of the model's
class falls, the more the map has found what the answer rests on. Figures: the mean probability over all steps (area
under the curve), beside patches in random order, and from the centre outwards, where CIFAR's objects lie.

Randomisation: parts of the weights are drawn anew, from the heads down. A map that stays the same shows the image, not
the model. Figures: Spearman's rank correlation with the map of the trained weights, for the same class.

Sources: Samek et al., Evaluating the visualization of what a deep neural network has learned, 2017, arXiv:1509.06321;
Adebayo et al., Sanity checks for saliency maps, 2018, arXiv:1810.03292.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from loading import machine
from token_merging import cifar
from torch import Tensor
from torch.nn import functional as F

import deit_models
from deit_models.models.layers import ImageClassifier

MODEL = "deit_micro_distilled_patch4_32"
STEP, BATCH, SEEDS = 4, 100, 3
SHOWN = (4, 8, 16, 32, 48)
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"method": "gradient"},
    "last": {"method": "last"},
    "rollout": {"method": "rollout"},
    "rollout, max, discard 0.9": {"method": "rollout", "head_fusion": "max", "discard": 0.9},
}


def patch_heat(model: ImageClassifier, images: Tensor, options: dict[str, Any], classes: Tensor) -> Tensor:
    """The mean heat of each patch, (N, patches)."""
    heat = []
    for batch, wanted in zip(images.split(BATCH), classes.split(BATCH), strict=True):
        target = {"target": wanted.tolist()} if options["method"] == "gradient" else {}
        heat.append(deit_models.heat_maps(model, batch, **options, **target))
    return F.avg_pool2d(torch.cat(heat)[:, None], model.config.patch_size).flatten(1)


@torch.no_grad()
def deletion(model: ImageClassifier, images: Tensor, heat: Tensor, classes: Tensor) -> Tensor:
    """Probability of each image's class while its hottest patches go, STEP at a time, (steps + 1, N)."""
    order, (height, width) = heat.argsort(dim=1, descending=True), model.config.grid
    rows = []
    for count in range(0, heat.shape[1] + 1, STEP):
        kept = torch.ones_like(heat).scatter(1, order[:, :count], 0.0).view(-1, 1, height, width)
        left = images * F.interpolate(kept, scale_factor=model.config.patch_size, mode="nearest")  # 0 is the mean
        scores = torch.cat([model(batch) for batch in left.split(BATCH)]).softmax(dim=1)
        rows.append(scores.gather(1, classes[:, None])[:, 0])
    return torch.stack(rows)


def area(curves: Tensor) -> Tensor:
    """Mean height of each curve, (steps + 1, N) -> (N,), by trapezoids."""
    return torch.trapezoid(curves, dim=0) / (len(curves) - 1)


def centred(model: ImageClassifier, count: int) -> Tensor:
    """Heat that falls from the centre outwards, (count, patches)."""
    rows, columns = (torch.arange(side) - (side - 1) / 2 for side in model.config.grid)
    return -(rows[:, None] ** 2 + columns**2).flatten().expand(count, -1)


def deletion_table(model: ImageClassifier, images: Tensor, classes: Tensor) -> list[str]:
    """Lines of Markdown."""
    generator = torch.Generator().manual_seed(0)
    orders = {name: patch_heat(model, images, options, classes) for name, options in METHODS.items()}
    orders["centre outwards"] = centred(model, len(images))
    patches = orders["last"].shape[1]
    randoms = [
        deletion(model, images, torch.rand(len(images), patches, generator=generator), classes) for _ in range(SEEDS)
    ]
    curves = {name: deletion(model, images, heat, classes) for name, heat in orders.items()}
    curves["random"] = torch.stack(randoms).mean(0)
    plain = area(curves["random"])
    shown = " | ".join(f"{count} of {patches} gone" for count in SHOWN)
    lines = [f"| order | area | beside random | better than random | {shown} |"]
    lines.append("| --- |" + " ---: |" * (3 + len(SHOWN)))
    for name, curve in sorted(curves.items(), key=lambda item: float(area(item[1]).mean())):
        own = area(curve)
        error = (own - plain).std() / len(own) ** 0.5
        beside = "" if name == "random" else f"{(own - plain).mean():+.3f} ± {error:.3f}"
        better = "" if name == "random" else f"{(own < plain).float().mean():.0%} of images"
        heights = " | ".join(f"{curve[count // STEP].mean():.1%}" for count in SHOWN)
        lines.append(f"| {name} | {own.mean():.3f} | {beside} | {better} | {heights} |")
        print(lines[-1], flush=True)
    return lines


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis, standardised."""
    order = values.argsort(dim=-1).argsort(dim=-1).double()
    order = order - order.mean(dim=-1, keepdim=True)
    return order / order.norm(dim=-1, keepdim=True)


def redrawn(model: ImageClassifier, blocks: int, seed: int) -> ImageClassifier:
    """The model with fresh heads, final norm and last blocks; with more blocks than it has, all weights are fresh."""
    torch.manual_seed(seed)
    fresh = deit_models.create_model(MODEL).eval()
    first = model.config.depth - blocks
    drawn = ("head", "norm.", *(f"blocks.{number}." for number in range(max(first, 0), model.config.depth)))
    state = {name: t for name, t in model.state_dict().items() if first >= 0 and not name.startswith(drawn)}
    fresh.load_state_dict({**fresh.state_dict(), **state})
    return fresh


def randomisation_table(model: ImageClassifier, images: Tensor, classes: Tensor) -> list[str]:
    """Lines of Markdown."""
    depth = model.config.depth
    stages = {"heads": 0, "and the last block": 1, f"and the last {depth // 2} blocks": depth // 2, "all": depth + 1}
    lines = [f"| method | {' | '.join(stages)} |", "| --- |" + " ---: |" * len(stages)]
    for name, options in METHODS.items():
        own, cells = ranks(patch_heat(model, images, options, classes)), []
        for blocks in stages.values():
            found = [
                (own * ranks(patch_heat(redrawn(model, blocks, seed), images, options, classes))).sum(-1).mean()
                for seed in range(SEEDS)
            ]
            cells.append(f"{torch.stack(found).mean():.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="CIFAR10_TEST")
    parser.add_argument("--images", type=int, default=500, help="about so many, evenly over the classes")
    parser.add_argument("--write", type=Path, help="also write the tables there")
    args = parser.parse_args()
    model = deit_models.from_pretrained(MODEL)
    images, labels = cifar(args.folder, model, args.images)
    with torch.no_grad():
        classes = torch.cat([model(batch).argmax(dim=1) for batch in images.split(BATCH)])
    right = (classes == labels).float().mean()
    facts = f"`{MODEL}`, {len(images)} test images of CIFAR-10, of which it classifies {right:.1%} correctly"
    lines = [
        "# Heat maps",
        "",
        f"{machine(('torch',))}. `python benchmarks/heat_maps.py CIFAR10_TEST`: {facts}; the class is always the "
        "model's own answer.",
        "",
        f"**Deletion.** Patches of {model.config.patch_size} pixels become the mean colour, the hottest first. Area: "
        "mean probability of the class over all steps; lower is better. Beside random: difference of the areas, with "
        "its standard error over images. Then the mean probability after some patches are gone.",
        "",
        *deletion_table(model, images, classes),
        "",
        "**Randomisation.** Spearman's rank correlation of the patches' heat with that of the trained weights, after "
        f"weights are drawn anew, from the heads down: 1 is the same map, 0 another one. Mean over images and {SEEDS} "
        "draws.",
        "",
        *randomisation_table(model, images, classes),
    ]
    print("\n".join(lines))
    if args.write:
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
