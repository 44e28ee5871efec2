"""Make checkpoints like those in `weights/`: a convnet teacher, then a small DeiT distilled through its token.

    python examples/shipped_weights.py path/to/cifar10 --out runs/shipped

The data folder holds `train/<class>/*` and `test/<class>/*` (or `val/`). The result is the student's averaged weights
in half precision, `out/<student>.safetensors`, which is scored on all test images; no epoch is chosen by test
accuracy. A second start with the same `--out` continues after the last finished epoch. `weights/README.md` has the
arguments of each shipped file.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import teachers
import torch
from torch import nn

import deit_models
from deit_models.data.datasets import open_dataset
from deit_models.recipes.recipe import Recipe, read_recipe
from deit_models.registry import default_preprocessing
from deit_models.training.run import RECIPE_NAME, TrainResult


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ (or val/) class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--teacher", default="cifar_small", help="a factory in teachers.py; default %(default)s")
    parser.add_argument("--student", default="deit_micro_distilled_patch4_32", help="default %(default)s")
    parser.add_argument("--start", help="begin with these weights of the same shape, the token aside: a name or folder")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--workers", type=int, help="loading processes; the result is the same")
    text = "shorten the student's cosine to what a trial says can be trained in so many seconds"
    parser.add_argument("--student-seconds", type=float, metavar="S", help=text)
    text = 'fields of the recipes cifar_teacher and cifar_token, as JSON: {"epochs": 16}'
    parser.add_argument("--teacher-recipe", type=json.loads, default={}, metavar="JSON", help=text)
    parser.add_argument("--student-recipe", type=json.loads, default={}, metavar="JSON", help=text)
    return parser.parse_args()


def token_added(model: nn.Module, student: nn.Module) -> None:
    """Fill `student` in place with a model of its shape; a new token and its head start as the class token's."""
    state = dict(model.state_dict())
    if "dist_token" not in state:
        positions = state["pos_embed"]
        state |= {"dist_token": state["cls_token"], "pos_embed": torch.cat([positions[:, :1], positions], dim=1)}
        state |= {f"head_dist.{name}": state[f"head.{name}"] for name in ("weight", "bias")}
    student.load_state_dict(state)


def epochs_within(seconds: float, recipe: Recipe, student: nn.Module, out: Path, **options: Any) -> int:
    """Epochs of the recipe, or those that fit into the time, by the speed of a trial's second epoch; at least 2."""
    brief = replace(recipe, epochs=2, warmup_epochs=0, eval_every=2)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        trial = deit_models.train(copy.deepcopy(student), recipe=brief, out=folder, **{**options, "val": None})
    rate = trial.log[-1]["images_per_second"] / len(options["train"])
    return max(min(recipe.epochs, int(seconds * rate)), 2)


def write_result(out: Path, runs: dict[str, TrainResult], file: str, accuracy: float) -> None:
    """`result.json`: a row each for the teacher and the student."""
    rows = []
    for name, run in runs.items():
        last, student = run.log[-1], f"{name}.safetensors" == file
        rows.append(
            {
                "model": name,
                "epochs": len(run.log),
                "top1": last["ema_top1"],
                "seconds": round(sum(row["seconds"] for row in run.log), 1),
                "images_per_second": last["images_per_second"],
                "file": file if student else None,
                "file_top1": accuracy if student else None,
            }
        )
    (out / "result.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Make the teacher, the student, the file and its score, each unless that is done."""
    args = parse_args()
    train = open_dataset(args.data, "train")
    test = open_dataset(args.data, "val", classes=train.classes)
    torch.manual_seed(0)
    student = deit_models.create_model(args.student, num_classes=len(train.classes))
    if args.start:
        token_added(deit_models.from_pretrained(args.start), student)
    preprocessing = default_preprocessing(args.student, student.config.image_hw)
    shared: dict[str, Any] = {"train": train, "val": test, "device": args.device, "workers": args.workers}

    recipe = deit_models.recipe_named("cifar_teacher", **args.teacher_recipe)
    factory, options = getattr(teachers, args.teacher), {**shared, **teachers.run_options(args.out, args.teacher)}
    teacher, teaching = teachers.train_teacher(factory, recipe, preprocessing=preprocessing, **options)
    recipe = deit_models.recipe_named("cifar_token", **args.student_recipe)
    if args.student_seconds:
        begun = args.out / args.student / RECIPE_NAME
        if begun.exists():  # the length was fixed when the run began
            recipe = read_recipe(begun)
        else:
            epochs = epochs_within(args.student_seconds, recipe, student, args.out, teacher=teacher, **shared)
            recipe = replace(recipe, epochs=epochs, warmup_epochs=min(recipe.warmup_epochs, epochs // 3))
        print(f"{args.student}: {recipe.epochs} epochs", flush=True)
    options = {**shared, **teachers.run_options(args.out, args.student)}
    learning = deit_models.train(student, recipe=recipe, teacher=teacher, **options)
    half = deit_models.from_pretrained(args.out / args.student / "ema").half()
    half.save_pretrained(args.out / "half")
    shutil.copyfile(args.out / "half" / "model.safetensors", args.out / f"{args.student}.safetensors")
    saved = deit_models.evaluate(deit_models.from_pretrained(args.out / "half"), test, device=args.device)
    file = f"{args.student}.safetensors"
    print(f"{args.out / file}: {saved.top1:.2f} % of all {saved.images} test images, each head {saved.heads}")
    write_result(args.out, {args.teacher: teaching, args.student: learning}, file, saved.top1)


if __name__ == "__main__":
    main()
