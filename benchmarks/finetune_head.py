"""A head on cached features beside the conventional frozen loop, which reads and forwards every image every epoch.

    python benchmarks/finetune_head.py [--data FOLDER --model NAME] [--write benchmarks/results/finetune_head.md]

Both sides get the same training, validation and test images, the same transform, the same bfloat16 forward pass and the
same number of loading processes. The loop is the usual one: the backbone in eval mode under no_grad, AdamW on the
head with a cosine, and the epoch with the best validation accuracy counts. It gets one learning rate, the best of 0.003
to 0.3 on the digits, where ours chooses among penalties as it goes. Each measurement is a process of its own, the sides
take turns, medians are compared. Without --data: scikit-learn's handwritten digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from loading import machine

import deit_models
from deit_models.batches.inputs import EvalSamples
from deit_models.data.datasets import open_dataset
from deit_models.data.records import ArrayRecords, ImageRecords
from deit_models.data.split import labels_of, parts, stratified_split

SIDES = ("head on features", "frozen loop")


def images(args: argparse.Namespace) -> tuple[ImageRecords, ImageRecords, ImageRecords]:
    """Training, validation and test images: 64, 16 and 20 % of each class."""
    if args.data:
        whole: ImageRecords = open_dataset(args.data, "train")
    else:
        from sklearn.datasets import load_digits

        data = load_digits()
        grey = (data.images * (255 / 16)).round().astype("uint8")[..., None].repeat(3, axis=-1)
        whole = ArrayRecords("digits", grey, data.target.tolist(), map(str, range(10)))
    rest, test = parts(whole, stratified_split(labels_of(whole), fraction=0.2, seed=0))
    train, val = parts(rest, stratified_split(labels_of(rest), fraction=0.2, seed=0))
    return train, val, test


def head_on_features(args: argparse.Namespace) -> dict[str, float]:
    """`finetune` with its defaults."""
    train, val, test = images(args)
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        result = deit_models.finetune(
            args.model, train=train, val=val, test=test, out=out, mode="head", workers=args.workers
        )
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "top1": result.metrics["test"]["top1"]}


def frozen_loop(args: argparse.Namespace) -> dict[str, float]:
    """The usual loop."""
    train, val, test = images(args)
    start = time.perf_counter()
    torch.manual_seed(0)
    model = deit_models.from_pretrained(args.model, num_classes=len(train.classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).requires_grad_(False)
    model.head.requires_grad_(True)
    transform = deit_models.transform_for(model)

    def batches(records: ImageRecords, *, shuffle: bool) -> torch.utils.data.DataLoader:
        samples = EvalSamples(records, transform)
        return torch.utils.data.DataLoader(samples, batch_size=64, shuffle=shuffle, num_workers=args.workers)

    def features(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return model.forward_features(batch.to(device))[:, 0].float()

    def accuracy(records: ImageRecords) -> float:
        right = 0
        for batch, labels, _ in batches(records, shuffle=False):
            right += int((model.head(features(batch)).argmax(1) == labels.to(device)).sum())
        return 100 * right / len(records)

    optimizer = torch.optim.AdamW(model.head.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    best, weights = -1.0, {}
    for _ in range(args.epochs):
        for batch, labels, _ in batches(train, shuffle=True):
            loss = torch.nn.functional.cross_entropy(model.head(features(batch)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if (score := accuracy(val)) > best:
            best, weights = score, {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    model.head.load_state_dict(weights)
    top1 = accuracy(test)
    return {"seconds": time.perf_counter() - start, "top1": top1}


def report(found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """A Markdown table with the ratio."""
    train, val, test = images(args)
    seconds = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    top1 = {side: statistics.median(run["top1"] for run in runs) for side, runs in found.items()}
    ratio = seconds["frozen loop"] / seconds["head on features"]
    lines = [
        "# A head on cached features beside the conventional frozen loop",
        "",
        f"{machine()}. {args.model}, {train.name}: {len(train)} images for training, {len(val)} for validation, "
        f"{len(test)} for testing. Medians of {args.rounds} interleaved rounds, one process each, from loading the "
        f"model to the test accuracy; {torch.get_num_threads()} threads, {args.workers} loading processes. Ours writes "
        "models, tables and cards as well. Command: `python benchmarks/finetune_head.py`.",
        "",
        "| | seconds | test accuracy (%) |",
        "| --- | ---: | ---: |",
        f'| `finetune(mode="head")` | {seconds["head on features"]:.1f} | {top1["head on features"]:.2f} |',
        f"| frozen loop, {args.epochs} epochs, AdamW {args.lr:g} | {seconds['frozen loop']:.1f} "
        f"| {top1['frozen loop']:.2f} |",
        f"| ratio | {ratio:.1f} | |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of class folders; default: scikit-learn's digits")
    parser.add_argument("--model", default="deit_micro_patch4_32")
    parser.add_argument("--epochs", type=int, default=20, help="of the loop")
    parser.add_argument("--lr", type=float, default=0.1, help="of the loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps((head_on_features if args.child == SIDES[0] else frozen_loop)(args)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, found[side][-1], flush=True)
    table = report(found, args)
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
