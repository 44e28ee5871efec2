"""All families side by side on CIFAR-10: about as many multiply-accumulates, as many epochs, one recipe.

    python examples/families_cifar10.py path/to/cifar10 --out runs/families [--only deit levit]

DeiT, ViT-ResNAS, CaiT and ResMLP read 32 pixels in patches of 4. LeViT and T2T-ViT cut an image into sixteenths, so
they read it enlarged to 128 pixels, as T2T-ViT's authors enlarge CIFAR: all begin with 64 tokens. The distilled DeiT
learns from a convnet (`teachers.cifar_small`) through its token, the others from labels. A second start continues the
first one. `table.json`, `table.md` and, with the extra `[plot]`, `plot.png` (accuracy against speed) are written.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import teachers
import torch

import deit_models
from deit_models.data.datasets import open_dataset
from deit_models.deploy.hardware import call_times
from deit_models.show.charts import find_matplotlib

MODELS = {
    "DeiT": "deit_micro_patch4_32",
    "DeiT distilled": "deit_micro_distilled_patch4_32",
    "LeViT": "levit_micro_cifar10",
    "T2T-ViT": "t2t_vit_micro_cifar10",
    "ViT-ResNAS": "vit_res_mini_patch4_32",
    "CaiT": "cait_micro_patch4_32",
    "ResMLP": "resmlp_micro_patch4_32",
}
"""Name in the table to the registered model."""


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of the recorded experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the GPU if there is one")
    return parser.parse_args()


def train_one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one family, unless that is done, and return its row of the table."""
    train = open_dataset(args.data, "train")
    test = open_dataset(args.data, "val", classes=train.classes)
    shared: dict[str, Any] = {"train": train, "val": test, "device": args.device}

    torch.manual_seed(args.seed)
    model = deit_models.create_model(MODELS[name], num_classes=len(train.classes))
    info = deit_models.model_info(MODELS[name])
    changes: dict[str, Any] = {"label_heads": "both"}
    teacher = None
    if name == "DeiT distilled":
        recipe = deit_models.recipe_named("cifar_teacher", **brief(args, 16), batch_size=min(512, args.batch_size * 4))
        options = {**shared, **teachers.run_options(args.out, "teacher")}
        teacher, _ = teachers.train_teacher(teachers.cifar_small, recipe, preprocessing=info.preprocessing, **options)
        changes = {"distillation": "hard"}
    recipe = deit_models.recipe_named(
        "cifar_scratch", **brief(args, args.epochs), batch_size=args.batch_size, ema_decay=0.999, **changes
    )
    options = {**shared, **teachers.run_options(args.out, MODELS[name])}
    rows = deit_models.train(model, recipe=recipe, teacher=teacher, **options).log
    return {
        "model": name,
        "params": info.params,
        "macs": info.macs,
        "epochs": recipe.epochs,
        "top1": rows[-1]["top1"],  # in a short run the average lags behind
        "images_per_second": rows[-1]["images_per_second"],
        "inference_per_second": inference_rate(model, info.input_size),
    }


def brief(args: argparse.Namespace, epochs: int) -> dict[str, int]:
    """Length, warm-up and seed of a run; rehearsals of a few epochs shorten the teacher too."""
    epochs = min(epochs, args.epochs)
    return {
        "epochs": epochs,
        "warmup_epochs": min(5, epochs // 3),
        "seed": args.seed,
        "eval_every": max(epochs // 2, 1) if epochs < 20 else epochs // 10,
    }


def inference_rate(model: torch.nn.Module, side: int, batch: int = 64) -> float:
    """Images/s of the plain model in eval mode, where it was trained."""
    images = torch.randn(batch, 3, side, side, device=next(model.parameters()).device)
    return batch / statistics.median(call_times(model.eval(), images, seconds=1.0, warm_up=3))


def draw(table: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against speed, a point a family."""
    figure = find_matplotlib()(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in table:
        axes.scatter(row["inference_per_second"], row["top1"])
        axes.annotate(
            row["model"], (row["inference_per_second"], row["top1"]), xytext=(5, 5), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set_xlabel("images/s (inference, batch 64)")
    axes.set_ylabel("CIFAR-10 test top-1 (%)")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Train what is missing, then write the table and the plot."""
    args = parse_args()
    table = []
    for name in args.only:
        table.append(train_one(name, args))
        (args.out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    lines = ["| family | parameters | MACs | top-1 (%) | images/s (training) | images/s (inference) |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in table:
        figures = f"{row['top1']:.2f} | {row['images_per_second']:,.0f} | {row['inference_per_second']:,.0f}"
        lines.append(f"| {row['model']} | {row['params'] / 1e6:.1f} M | {row['macs'] / 1e6:.0f} M | {figures} |")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        draw(table, args.out / "plot.png")
    except deit_models.MissingExtraError as error:
        print(error)


if __name__ == "__main__":
    main()
