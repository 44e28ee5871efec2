"""`deit-models finetune` beside scikit-learn and a plain timm loop, from the same weights, by CPU time.

    pip install -e . timm scikit-learn
    python benchmarks/finetuning.py [--rounds 5] [--threads 1] [--write benchmarks/results/finetuning.md]

Both sides start from the checkpoint that comes with the package, written in timm's layout for timm. The images are
scikit-learn's handwritten digits, 600 for training, as grey PNG files of 28 x 28 pixels in class folders.

`head` is a whole process from start to end: the command, which chooses a penalty and writes models, cards and figures;
and a script with timm's features (`num_classes=0`), StandardScaler and LogisticRegression, which has one penalty, or
LogisticRegressionCV, which chooses one. `full` is one epoch of training and validation: `finetune(mode="full")`, with
its state and the best model saved; and a loop with timm's transforms, AdamW with rates by layer, label smoothing, and
nothing saved. The two read the same files, in float32, in batches of 64, in one process.

Each measurement is a process of its own, the sides take turns, and the table has medians. CPU time is that of the
process and its children, which other work on the machine disturbs least. Accuracies are those of the digits that have
no part in the training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from loading import machine

MODEL, TRAIN, EPOCHS, BATCH = "deit_micro_distilled_patch4_32", 600, 4, 64


def prepare(folder: Path) -> None:
    """Training and test images, and the checkpoint in timm's layout."""
    from PIL import Image
    from sklearn.datasets import load_digits

    import deit_models

    deit_models.from_pretrained(MODEL).save_pretrained(folder / "timm", layout="timm")
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("train" if number < TRAIN else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"))
        image.resize((28, 28), Image.Resampling.BICUBIC).save(place / f"{number:04}.png")


def by_scikit_learn(folder: Path, kind: str, *, score: bool) -> None:
    """Logistic regression on timm's features; with `score`, also print the accuracy on the test images."""
    import timm
    import torch
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torchvision.datasets import ImageFolder

    model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    def features(part: str) -> tuple[Any, list[int]]:
        images = ImageFolder(str(folder / part), transform)
        with torch.inference_mode():
            loader = torch.utils.data.DataLoader(images, batch_size=BATCH)
            return torch.cat([model(batch) for batch, _ in loader]).numpy(), images.targets

    regression = LogisticRegression(max_iter=1000) if kind == "one" else LogisticRegressionCV(max_iter=1000)
    classifier = make_pipeline(StandardScaler(), regression).fit(*features("train"))
    if score:
        print(json.dumps({"top1": 100 * classifier.score(*features("test"))}))


def by_timm(folder: Path) -> None:
    """Print the CPU seconds of each epoch of a plain loop."""
    import timm
    import torch
    from timm.optim import create_optimizer_v2
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True, num_classes=10)
    config = timm.data.resolve_model_data_config(model)
    # the padding, cropping and jitter of `finetune` at 32 pixels
    augmented = [
        *(transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.RandomCrop(32, padding=4)),
        *(transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.2, 0.2, 0.2), transforms.ToTensor()),
        transforms.Normalize(config["mean"], config["std"]),
    ]
    files = ImageFolder(str(folder / "train"))
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0)).tolist()
    parts = [
        torch.utils.data.Subset(ImageFolder(files.root, transform), order[start:end])
        for transform, start, end in (
            (transforms.Compose(augmented), 0, TRAIN * 4 // 5),
            (timm.data.create_transform(**config), TRAIN * 4 // 5, TRAIN),
        )
    ]
    train, val = (
        torch.utils.data.DataLoader(part, BATCH, shuffle=place == 0, drop_last=place == 0)
        for place, part in enumerate(parts)
    )
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    spent = [time.process_time()]
    for _ in range(EPOCHS):
        model.train()
        for images, labels in train:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
        model.eval()
        with torch.inference_mode():
            sum(int((model(images).argmax(1) == labels).sum()) for images, labels in val)
        spent.append(time.process_time())
    print(json.dumps(spent))


def by_finetune(folder: Path) -> None:
    """Print the CPU seconds of each epoch of `finetune(mode="full")`."""
    import deit_models
    from deit_models.finetuning.finetune import recipe_for

    model = deit_models.from_pretrained(MODEL)
    recipe = recipe_for("train", model, images=TRAIN, teacher=False, epochs=EPOCHS, precision="float32")
    spent = [time.process_time()]
    with tempfile.TemporaryDirectory() as out:
        deit_models.finetune(
            model,
            train=folder / "train",
            out=out,
            recipe=recipe,
            workers=0,
            device="cpu",
            on_epoch=lambda _: spent.append(time.process_time()),
        )
    print(json.dumps(spent))


CHILDREN: dict[str, Callable[[Path], None]] = {
    "one": lambda folder: by_scikit_learn(folder, "one", score=False),
    "several": lambda folder: by_scikit_learn(folder, "several", score=False),
    "one, scored": lambda folder: by_scikit_learn(folder, "one", score=True),
    "several, scored": lambda folder: by_scikit_learn(folder, "several", score=True),
    "timm": by_timm,
    "finetune": by_finetune,
}
HEAD = {"`finetune --mode head`": "", "timm, LogisticRegression": "one", "timm, LogisticRegressionCV": "several"}
FULL = {'`finetune(mode="full")`': "finetune", "timm loop": "timm"}


def timed(command: list[str]) -> tuple[dict[str, float], str]:
    """CPU and wall seconds of a process and its children, and what it printed."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu": cpu, "wall": time.perf_counter() - start}, done.stdout


def child(name: str, folder: Path) -> tuple[dict[str, float], str]:
    """One of `CHILDREN`, in a process of its own."""
    return timed([sys.executable, __file__, "--child", name, "--folder", str(folder)])


def head(folder: Path, out: Path, *more: str) -> tuple[dict[str, float], str]:
    """The command."""
    command = [sys.executable, "-m", "deit_models", "finetune", str(folder / "train"), "--out", str(out)]
    return timed([*command, "--mode", "head", "--precision", "float32", *more])


def accuracies(folder: Path) -> dict[str, float]:
    """Accuracy of each way on the test images; none of them depends on chance."""
    head(folder, folder / "scored", "--test-data", str(folder / "test"))
    metrics = json.loads((folder / "scored" / "metrics.json").read_text(encoding="utf-8"))
    found = {name: json.loads(child(f"{kind}, scored", folder)[1])["top1"] for name, kind in HEAD.items() if kind}
    return {next(iter(HEAD)): metrics["test"]["top1"], **found}


def measured(folder: Path, rounds: int) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[float]]]:
    """Seconds of each process for a head, and CPU seconds of the epochs after the first."""
    whole: dict[str, list[dict[str, float]]] = {name: [] for name in HEAD}
    epochs: dict[str, list[float]] = {name: [] for name in FULL}
    for number in range(rounds):
        for name, kind in HEAD.items():
            whole[name].append((child(kind, folder) if kind else head(folder, folder / f"out{number}"))[0])
            print(name, whole[name][-1], flush=True)
        for name, kind in FULL.items():
            spent = json.loads(child(kind, folder)[1].splitlines()[-1])
            epochs[name] += [end - start for start, end in pairwise(spent[1:])]
            print(name, epochs[name][1 - EPOCHS :], flush=True)
    return whole, epochs


def table(rounds: int, threads: int, top1: dict[str, float], *found: Any) -> str:
    """Medians and ratios, in Markdown."""
    whole, epochs = found
    lines = [
        "# Fine-tuning beside scikit-learn and timm",
        "",
        f"{machine()}. {TRAIN} digits of 28 x 28 pixels, {MODEL}, float32, "
        f"{f'threads: {threads}' if threads else 'as many threads as each library takes'}. Medians of {rounds} "
        "interleaved rounds; `python benchmarks/finetuning.py`.",
        "",
        "| a head, the whole process | CPU seconds | seconds | CPU, ratio | test accuracy (%) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    ours = [run["cpu"] for run in whole[next(iter(HEAD))]]
    for name, runs in whole.items():
        cpu, wall = (statistics.median(run[key] for run in runs) for key in ("cpu", "wall"))
        ratio = statistics.median(mine / run["cpu"] for mine, run in zip(ours, runs, strict=True))
        lines.append(f"| {name} | {cpu:.1f} | {wall:.1f} | {ratio:.2f} | {top1[name]:.2f} |")
    lines += ["", "| everything, one epoch | CPU seconds | ratio |", "| --- | ---: | ---: |"]
    ours = epochs[next(iter(FULL))]
    for name, seconds in epochs.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, seconds, strict=True))
        lines.append(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.2f} |")
    return "\n".join([*lines, "", "A ratio is ours over theirs, within a round."]) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of each process; default: those it takes itself")
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        CHILDREN[args.child](args.folder)
        return
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        top1 = accuracies(folder)  # this also warms the page cache
        text = table(args.rounds, args.threads, top1, *measured(folder, args.rounds))
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
