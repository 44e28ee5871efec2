"""Train a small DeiT on CIFAR-10 from scratch: one plain loop, no recipe machinery.

    python examples/train_cifar10.py path/to/cifar10 --out runs/cifar10

The data folder holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. Images are 32 pixels, so all 60,000 fit in memory
as bytes and are augmented a batch at a time. The last epoch's weights are kept: choosing the best epoch by test
accuracy would flatter the figure. A second start with the same `--out` goes on after the last finished epoch. This is
how the checkpoint in `weights/` was made; see its README.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as TF

import deit_models


def load_images(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a class-folder tree as (N, 3, 32, 32) uint8, their labels (N,) and the class names."""
    dataset = ImageFolder(str(folder))
    images = torch.stack([TF.pil_to_tensor(image) for image, _ in dataset])
    return images, torch.tensor(dataset.targets), dataset.classes


def augment(images: Tensor, *, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels (zeros come in) and mirror half of them; (B, 3, H, W) uint8, same out."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, batch))
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    samples = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices only: no biases, no norms, none of the names the model lists."""
    keep = model.no_weight_decay()
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim == 1 or name in keep]
    decayed = [p for name, p in named if not (p.ndim == 1 or name in keep)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, normalise: nn.Module) -> float:
    """Top-1 accuracy in percent, in float32."""
    model.eval()
    correct = sum(
        int((model(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100 * correct / len(labels)


class Normalise(nn.Module):
    """uint8 images to the model's normalised floats, with the mean and standard deviation of its checkpoint record."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float32."""
        return (images.float() - self.mean) / self.std


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, and to resume from")
    parser.add_argument("--model", default="deit_micro_patch4_32")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--warmup-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=5, metavar="EPOCHS", help="the last epoch is always scored")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    return parser.parse_args()


def train_epoch(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    normalise: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One pass over the batches of (images, labels); gives the mean loss."""
    total = 0.0
    for images, labels in batches:
        # The math backend: on a CPU, the backward pass of the fused one took 44 % of a step at 64 tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(normalise(augment(images)))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
    return total / len(batches)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor], args: argparse.Namespace
) -> None:
    """Train in place, from the last finished epoch on, with a log line and a checkpoint after each."""
    normalise = Normalise(model.origin.preprocessing.mean, model.origin.preprocessing.std)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr)
    steps = len(labels) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=args.lr,
        epochs=args.epochs,
        steps_per_epoch=steps,
        pct_start=args.warmup_epochs / args.epochs,
        cycle_momentum=False,
    )
    checkpoint, first_epoch = args.out / "last.pt", 0
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        first_epoch = saved["epoch"] + 1
    forward = torch.compile(model) if args.compile else model
    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(args.seed + 1000 + epoch)  # so that a resumed run draws what an uninterrupted one would
        start = time.time()
        model.train()
        order = torch.randperm(len(labels))[: steps * args.batch_size].split(args.batch_size)
        loss = train_epoch(forward, [(images[i], labels[i]) for i in order], normalise, optimizer, schedule)
        row = {"epoch": epoch, "loss": round(loss, 4), "seconds": round(time.time() - start, 1)}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            row["test_top1"] = round(accuracy(model, *test, normalise), 2)
        print(json.dumps(row), flush=True)
        with (args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        saved = {name: part.state_dict() for name, part in stateful.items()} | {"epoch": epoch}
        torch.save(saved, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


def main() -> None:
    """Load the data, train, save in half precision, score the saved file."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    images, labels, classes = load_images(args.data / "train")
    test_images, test_labels, _ = load_images(args.data / "test")
    model = deit_models.create_model(args.model, num_classes=len(classes))
    facts = {
        "class_names": tuple(classes),
        "dataset": "CIFAR-10",
        "licence": "Apache-2.0",
        "source": Path(__file__).name,
    }
    model.origin = dataclasses.replace(model.origin, **facts)
    train(model, images, labels, (test_images, test_labels), args)

    model.half().save_pretrained(args.out / "model")
    saved = deit_models.from_pretrained(args.out / "model")
    normalise = Normalise(saved.origin.preprocessing.mean, saved.origin.preprocessing.std)
    top1 = accuracy(saved, test_images, test_labels, normalise)
    print(f"{args.out / 'model'}: {top1:.2f} % of all {len(test_labels)} test images")


if __name__ == "__main__":
    main()
