"""Training images/s beside a plain timm loop at equal settings, and the share of the machine's bfloat16 matrix peak.

    python benchmarks/training.py [--device cuda --batch-size 256 --compile] [--write benchmarks/results/training.md]

Both sides train the same architecture on the same ready-made batches (data_pipeline.py measures the making of batches):
bfloat16 autocast, mixup and CutMix with smoothed labels, AdamW, averaged weights. Each measurement is a process of its
own, the sides take turns, medians are compared. The matrix peak is measured too, by one large product; a training step
counts three times the forward pass's two operations per MAC.

    python benchmarks/training.py --memory [--write benchmarks/results/training_memory.md]

What a forward pass in training keeps for the backward pass, with and without gradient checkpointing, beside timm where
it has the model: bytes of different storages, without the weights', a count that does not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loading import machine

SIDES = ("deit-models", "timm")
CASES = {"deit_micro_patch4_32": 128, "deit_tiny_patch16_224": 32, "deit_small_patch16_224": 16}
"""Models and their batch sizes on a CPU."""
WARMUP = 3

STORED = ("deit_tiny_patch16_224", "deit_small_patch16_224", "t2t_vit_14", "levit_192", "vit_resnas_tiny")
"""Models of the table of memory; timm has no T2T-ViT and no ViT-ResNAS."""

Batches = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def ours(name: str, device: torch.device, batch_size: int, compiled: bool) -> Callable[[Batches], None]:
    """One call trains on the given batches with the package's own loop."""
    import deit_models
    from deit_models.batches.loading import DamageCount
    from deit_models.data.records import ArrayRecords
    from deit_models.distributed import Process
    from deit_models.images.transforms import transform_for
    from deit_models.recipes.recipe import recipe_named
    from deit_models.training.engine import train_epoch
    from deit_models.training.learner import make_learner

    model = deit_models.create_model(name)
    classes = [str(i) for i in range(model.num_classes)]
    learner = make_learner(
        model,
        recipe_named("deit_300e", batch_size=batch_size, drop_path_rate=0.0, compile=compiled),
        num_classes=len(classes),
        process=Process(0, 1, device),
        preprocessing=transform_for(model).preprocessing,
    )
    damage = DamageCount(ArrayRecords("noise", [], [], classes), limit=1.0)

    def run(batches: Batches) -> None:
        train_epoch(learner, batches, steps=len(batches), epoch=10, damage=damage)

    return run


def theirs(name: str, device: torch.device, batch_size: int, compiled: bool) -> Callable[[Batches], None]:
    """The loop of timm's own training script, reduced to the measured parts."""
    import timm
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    import deit_models

    config = deit_models.create_model(name).config
    shape = {"img_size": config.image_hw[0], "patch_size": config.patch_size, "embed_dim": config.embed_dim}
    depth = {"depth": config.depth, "num_heads": config.num_heads, "num_classes": config.num_classes}
    model = timm.create_model("deit_tiny_patch16_224", **shape, **depth).to(device).train()
    average = ModelEmaV3(model, decay=0.99996)
    forward = torch.compile(model) if compiled else model
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3 * batch_size / 1024, weight_decay=0.05)
    mixing = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=config.num_classes)
    criterion = SoftTargetCrossEntropy()

    def run(batches: Batches) -> None:
        for step, (images, labels, _) in enumerate(batches):
            # timm's mixing makes its targets on the named device
            mixed, targets = mixing(images.to(device, non_blocking=True), labels.to(device))
            with torch.autocast(device.type, torch.bfloat16):
                loss = criterion(forward(mixed), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            if (step + 1) % 25 == 0 or device.type == "cpu":
                loss.item()

    return run


def child(side: str, name: str, args: argparse.Namespace) -> None:
    """One measurement; prints images/s."""
    device, size = torch.device(args.device), args.batch_size or CASES[name]
    run = (ours if side == "deit-models" else theirs)(name, device, size, args.compile)
    pixels = 32 if name.endswith("_32") else 224
    classes = 10 if pixels == 32 else 1000
    generator = torch.Generator().manual_seed(0)

    def batches(count: int) -> Batches:
        fine = torch.full((size,), -1)
        images = torch.randn(count, size, 3, pixels, pixels, generator=generator)
        labels = torch.randint(0, classes, (count, size), generator=generator)
        if device.type == "cuda":
            images = images.pin_memory()
        return [(images[i], labels[i], fine) for i in range(count)]

    run(batches(WARMUP))
    ready = batches(args.steps)
    start = finished(device)
    run(ready)
    print(json.dumps({"rate": size * args.steps / (finished(device) - start)}))


def finished(device: torch.device) -> float:
    """Time at which the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_peak(device: torch.device) -> float:
    """Operations/s of a large bfloat16 product, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        times.append(time.perf_counter() - start)
    return float(2 * side**3 / min(times))


def report(rates: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    """A Markdown table with ratios."""
    import deit_models

    device = torch.device(args.device)
    peak = matrix_peak(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    options = f"bfloat16, {'torch.compile' if args.compile else 'eager'}, mixing, AdamW, averaged weights"
    lines = [
        f"# Training ({options})",
        "",
        f"{where}. Medians of {args.rounds} interleaved rounds of {args.steps} steps, one process each. Matrix peak "
        f"{peak / 1e12:.2f} TFLOP/s. Command: `python benchmarks/training.py{' --compile' if args.compile else ''}`.",
        "",
        "| model | batch | deit-models (images/s) | timm (images/s) | ratio | share of the matrix peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rate in rates.items():
        share = rate["deit-models"] * 6 * deit_models.model_info(name).macs / peak
        lines.append(
            f"| `{name}` | {args.batch_size or CASES[name]} | {rate['deit-models']:.1f} | {rate['timm']:.1f} "
            f"| {rate['deit-models'] / rate['timm']:.2f} | {share:.0%} |"
        )
    return "\n".join(lines) + "\n"


def stored_mib(model: torch.nn.Module, images: torch.Tensor) -> float:
    """MiB for each image that a forward pass keeps for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other tensor gets their place

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values()) / len(images) / 2**20


def memory(args: argparse.Namespace) -> str:
    """A Markdown table of stored bytes."""
    import timm

    import deit_models

    size = args.batch_size or 2
    lines = [
        "# Gradient checkpointing",
        "",
        f"float32, {size} images of 224 pixels, training mode. MiB are what a forward pass keeps for the backward pass "
        "for each image. Command: `python benchmarks/training.py --memory`.",
        "",
        "| model | deit-models, off | on | ratio | timm, off | on |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in STORED:
        sides = [deit_models.create_model(name)]
        sides += [timm.create_model(name)] if timm.is_model(name) else []
        images = torch.randn(size, 3, 224, 224)
        found = []
        for model in sides:
            for on in (False, True):
                model.train().set_grad_checkpointing(on)
                found.append(stored_mib(model, images))
        timms = " | ".join([f"{value:.1f}" for value in found[2:]] or ["-", "-"])
        lines.append(f"| `{name}` | {found[0]:.1f} | {found[1]:.1f} | {found[0] / found[1]:.1f} | {timms} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), help="default: %(default)s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, help="default: by model, for a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--memory", action="store_true", help="the table of gradient checkpointing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args)
        return
    if args.memory:
        table = memory(args)
        if args.write:
            args.write.write_text(table, encoding="utf-8")
        return
    rates: dict[str, dict[str, float]] = {}
    for name in args.models:
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, *sys.argv[1:], "--child", side, name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1])["rate"])
        rates[name] = {side: statistics.median(values) for side, values in found.items()}
        print(name, {side: round(value, 1) for side, value in rates[name].items()}, flush=True)
    table = report(rates, args)
    print(table)
    if args.write:
        args.write.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
