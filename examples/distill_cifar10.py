"""The DeiT paper's distillation table on CIFAR-10: one student, one budget, four ways to use a convnet teacher.

    python examples/distill_cifar10.py path/to/cifar10 --out runs/distill

The data folder holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. A convnet is trained, then the same small
transformer from the same seed: without a teacher, with soft and with hard distillation on the class token, and with
hard distillation through the distillation token. The last epoch's weights are scored: figures of epochs that test
accuracy selected would be optimistic. A second start continues the first one; `--arms` chooses some of the arms, so
that they can run side by side. Once all are done, `table.md` and (with the extra `[plot]`) `curves.png` are written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import teachers
import torch
from torch.nn import functional as F

import deit_models
from deit_models.data.datasets import open_dataset
from deit_models.data.records import ImageRecords
from deit_models.recipes.recipe import Recipe, recipe_named
from deit_models.registry import default_preprocessing
from deit_models.show.charts import plot_curves
from deit_models.training.run import train
from deit_models.training.state import LOG_NAME, read_log
from deit_models.training.teacher import Teacher

ARMS = {
    "none": ("deit_micro_patch4_32", {}),
    "soft": ("deit_micro_patch4_32", {"distillation": "soft", "distill_on": "class", "alpha": 10 / 19, "tau": 3.0}),
    "hard": ("deit_micro_patch4_32", {"distillation": "hard", "distill_on": "class"}),
    "token": ("deit_micro_distilled_patch4_32", {"distillation": "hard", "distill_on": "token"}),
}
"""Name of an arm to its model and what differs in the recipe.

"soft" is the paper's equation 2 with its lambda 0.1 and tau 3: the authors' code, and so ours, divides the teacher's
loss by the number of classes as well, which for ten classes an alpha of 10/19 makes up for.
"""


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of the recorded experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--epochs", type=int, default=12, help="of each student")
    parser.add_argument("--teacher", default="resnet20", help="a factory in teachers.py; default %(default)s")
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS", help="the last epoch is always scored")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--workers", type=int, default=0, help="loading processes; the result is the same")
    parser.add_argument("--compile", action="store_true", help="torch.compile the students (needs a C++ compiler)")
    return parser.parse_args()


def student_recipe(args: argparse.Namespace, **changes: object) -> Recipe:
    """Settings that all students share: light augmentation, label smoothing, a short warm-up."""
    warmup = min(2, args.epochs - 1)
    shared = {
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "compile": "on" if args.compile else "auto",
    }
    shared |= {"eval_every": args.eval_every}
    return recipe_named("cifar_scratch", warmup_epochs=warmup, **shared, **changes)


def teacher_recipe(args: argparse.Namespace) -> Recipe:
    """SGD with momentum, as convnets are trained; no label smoothing, which harms a teacher (Mueller et al. 2019)."""
    length = {"epochs": args.teacher_epochs, "seed": args.seed, "eval_every": args.eval_every}
    if args.teacher == "resnet20":
        rate = {"lr": 0.1, "warmup_lr": 1e-6, "batch_size": args.batch_size, "ema_decay": 0.0}
        return recipe_named("cifar_teacher", warmup_epochs=min(1, args.teacher_epochs - 1), **length, **rate)
    return recipe_named("cifar_teacher", warmup_epochs=min(3, args.teacher_epochs - 1), **length)


@torch.no_grad()
def token_likeness(model: torch.nn.Module, records: ImageRecords, count: int = 256) -> dict[str, list[float] | float]:
    """Cosine similarity of class and distillation token, and of the two heads' weights.

    `tokens` has the mean over some images in front of the first block and after each block; `heads` the mean over the
    classes. Source: DeiT, section 4 (0.06 at the input, 0.93 after the last block).
    """
    model.eval()
    device = next(model.parameters()).device
    transform = deit_models.transform_for(model)
    step = max(len(records) // count, 1)
    images = torch.stack([transform(records[i][0]) for i in range(0, len(records), step)]).to(device)
    layers = model.get_intermediate_layers(images, range(model.config.depth), norm=False)
    prefixes = [model.forward_tokens(images)[:, :2], *(layer.prefix for layer in layers)]
    tokens = [float(F.cosine_similarity(pair[:, 0], pair[:, 1], dim=-1).mean()) for pair in prefixes]
    heads = F.cosine_similarity(model.head.weight, model.head_dist.weight, dim=-1).mean()
    return {"tokens": [round(value, 4) for value in tokens], "heads": round(float(heads), 4)}


def main() -> None:
    """Train the students that are missing, and the teacher once a student needs it."""
    args = parse_args()
    records = open_dataset(args.data, "train")
    test = open_dataset(args.data, "val", classes=records.classes)
    preprocessing = default_preprocessing(ARMS["none"][0], (32, 32))

    common = {"train": records, "val": test, "workers": args.workers, "device": args.device}

    def train_teacher() -> Teacher:
        factory, options = getattr(teachers, args.teacher), teachers.run_options(args.out, "teacher")
        teacher, result = teachers.train_teacher(
            factory, teacher_recipe(args), preprocessing=preprocessing, **common, **options
        )
        print(f"teacher: {result.top1:.2f} % of {len(test)} test images", flush=True)
        return teacher

    for arm in args.arms:
        name, changes = ARMS[arm]
        torch.manual_seed(args.seed)
        model = deit_models.create_model(name, num_classes=len(records.classes))
        teacher = None if arm == "none" else train_teacher()
        options = {**common, **teachers.run_options(args.out, arm)}
        result = train(model, recipe=student_recipe(args, **changes), teacher=teacher, **options)
        print(f"{arm}: {result.top1:.2f} % of {len(test)} test images", flush=True)
        if arm == "token":
            likeness = json.dumps(token_likeness(model, test))
            (args.out / "token_likeness.json").write_text(likeness + "\n", encoding="utf-8")
            print(f"cosine similarity of the tokens and of the heads: {likeness}", flush=True)
    report(args.out)


def report(out: Path) -> None:
    """The paper's table 3 with our figures, once every run is finished; and the curves, if matplotlib is installed."""
    if not all((out / name / "model").is_dir() for name in ("teacher", *ARMS)):
        return
    logs = {name: read_log(out / name / LOG_NAME) for name in ("teacher", *ARMS)}
    last = {name: rows[-1] for name, rows in logs.items()}
    rows = [
        ("no distillation", "class", last["none"]["top1"]),
        ("soft distillation", "class", last["soft"]["top1"]),
        ("hard distillation", "class", last["hard"]["top1"]),
        ("distillation token", "class", last["token"]["class_top1"]),
        ("distillation token", "distillation", last["token"]["distillation_top1"]),
        ("distillation token", "both", last["token"]["top1"]),
        ("(the teacher)", "", last["teacher"].get("ema_top1", last["teacher"]["top1"])),
    ]
    found = [{"training": name, "heads": heads, "top1": top1} for name, heads, top1 in rows]
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = ["| training | heads used at test | top-1 (%) |", "| --- | --- | ---: |"]
    table = "\n".join(lines + [f"| {name} | {heads} | {top1:.2f} |" for name, heads, top1 in rows]) + "\n"
    print(table)
    (out / "table.md").write_text(table, encoding="utf-8")
    try:
        plot_curves({name: logs[name] for name in ARMS}, out / "curves.png", title="One student, four trainings")
    except deit_models.MissingExtraError as error:
        print(error)


if __name__ == "__main__":
    main()
