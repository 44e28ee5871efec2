"""Token merging: changed predictions, and gain in speed.

    python benchmarks/token_merging.py CIFAR10_TEST [--images N] [--write benchmarks/results/token_merging.md]

CIFAR10_TEST is a folder of one folder a class. The shipped checkpoint classifies all its images, merged and not, in
torch's float32: the share whose most likely class is that of the unmerged model, and the share that is correct. Speed
is measured in one process, alternating the numbers of tokens call by call; medians. DeiT-Ti and DeiT-S have random
weights: their merges mean nothing, but take as long.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from loading import machine
from torch import Tensor

import deit_models
from deit_models.deploy.network import TokenMerging, decreasing, merging_plan, prepare
from deit_models.deploy.runtimes import BACKENDS, BackendName, Job
from deit_models.models.layers import ImageClassifier

SHIPPED = "deit_micro_patch4_32"
MERGED, MERGED_224 = (0, 1, 2, 4, 6, 8), (0, 8, 16)
LARGER = ("deit_tiny_patch16_224", "deit_small_patch16_224")
BATCH = {SHIPPED: 64, **dict.fromkeys(LARGER, 8)}
ANSWER_BATCH = 100


def cifar(folder: Path, model: ImageClassifier, limit: int | None) -> tuple[Tensor, Tensor]:
    """Images as the model takes them, and their classes, one a folder in alphabetical order."""
    files = sorted(folder.glob("*/*"))
    names = sorted({file.parent.name for file in files})
    files = files[:: max(len(files) // limit, 1)] if limit else files
    transform = deit_models.transform_for(model)
    images = torch.stack([transform(file) for file in files])
    return images, torch.tensor([names.index(file.parent.name) for file in files])


def answers(model: ImageClassifier, images: Tensor, merging: TokenMerging) -> Tensor:
    """The most likely class of every image."""
    network = prepare(model, plan=merging_plan(model, merging))
    return torch.cat([network(batch).argmax(dim=1) for batch in images.split(ANSWER_BATCH)])


class Speed(NamedTuple):
    """Images a second by the clock, and a second of processor time, which other work does not change."""

    clock: float
    processor: float


def speeds(
    model: ImageClassifier, example: Tensor, merged: tuple[int, ...], backend: BackendName, calls: int
) -> list[Speed]:
    """Of each number of merged tokens, from medians of calls in turns."""
    runs: list[Callable[[Tensor], Tensor]] = [
        BACKENDS[backend].build(Job(prepare(model, plan=merging_plan(model, r)), example, "float32")) for r in merged
    ]
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    for call in range(calls + 2):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter(), time.process_time()
            run(example)
            if call >= 2:  # the first calls pack weights and fill caches
                taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return [
        Speed(*(len(example) / statistics.median(column) for column in zip(*taken, strict=True))) for taken in times
    ]


def tokens_left(model: ImageClassifier, r: int) -> int:
    """Tokens that reach the last block, whose own merge would change no prediction."""
    h, w = model.config.grid
    patches = h * w
    for _ in range(model.config.depth - 1):
        patches -= min(r, patches // 2)
    return int(patches) + int(model.config.num_prefix_tokens)


def accuracy_rows(model: ImageClassifier, images: Tensor, labels: Tensor) -> list[tuple[str, float, float]]:
    """Name, agreement and accuracy of each number of merged tokens, and of decreasing plans."""
    depth = model.config.depth
    plans: list[tuple[str, TokenMerging]] = [(str(r), r) for r in MERGED]
    plans += [(f"{r}, decreasing", decreasing(r, depth)) for r in MERGED if r in (2, 4, 6)]
    plain, rows = answers(model, images, 0), []
    for name, plan in plans:
        found = answers(model, images, plan)
        same, right = ((found == wanted).double().mean().item() for wanted in (plain, labels))
        rows.append((name, same, right))
        print(f"{name}: {same:.2%} agree, {right:.2%} right", flush=True)
    return rows


def accuracy_table(model: ImageClassifier, images: Tensor, labels: Tensor) -> list[str]:
    """Lines of Markdown."""
    rows = accuracy_rows(model, images, labels)
    lines = [
        f"`{SHIPPED}`, {len(images)} CIFAR-10 test images: tokens that each block merges, share of the images whose "
        "most likely class is that of the unmerged model, share that is correct.",
        "",
        "| merged a block | agreement | accuracy | against unmerged |",
        "| --- | ---: | ---: | ---: |",
    ]
    plain_right = rows[0][2]
    for name, same, right in rows:
        lines.append(f"| {name} | {same:.2%} | {right:.2%} | {100 * (right - plain_right):+.2f} points |")
    return lines


def speed_table(model: ImageClassifier, backends: list[BackendName], calls: int) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"Batches of {BATCH[SHIPPED]} at 32 px and {BATCH[LARGER[0]]} at 224 px. Images/s by the clock, and per second "
        "of processor time (all threads), which other work on the machine does not change; each beside unmerged.",
        "",
        "| model | backend | merged a block | tokens at the last block | images/s | ratio | processor | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in (SHIPPED, *LARGER):
        small = name == SHIPPED
        merged, timed = (MERGED, model) if small else (MERGED_224, deit_models.create_model(name).eval())
        example = torch.randn(BATCH[name], 3, *timed.config.image_hw, generator=torch.Generator().manual_seed(0))
        for backend in backends:
            found = speeds(timed, example, merged, backend, calls if small else max(calls // 3, 3))
            for r, (clock, processor) in zip(merged, found, strict=True):
                ratios = clock / found[0].clock, processor / found[0].processor
                row = f"| `{name}` | {backend} | {r} | {tokens_left(timed, r)} | {clock:.1f} | {ratios[0]:.2f} "
                lines.append(f"{row}| {processor:.1f} | {ratios[1]:.2f} |")
                print(lines[-1], flush=True)
    return lines


def head() -> list[str]:
    """Title and circumstances."""
    facts = (
        f"{machine()}; {torch.get_num_threads()} thread(s) in torch. Float32. Speed: medians of calls that take turns "
    )
    return ["# Token merging", "", facts + "in one process; `python benchmarks/token_merging.py CIFAR10_TEST`."]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="CIFAR10_TEST")
    parser.add_argument("--images", type=int, help="about so many, evenly over the classes; default all")
    parser.add_argument("--calls", type=int, default=30, help="timed calls of the small model; the larger take a third")
    parser.add_argument("--backends", nargs="+", default=["eager", "openvino"], choices=sorted(BACKENDS))
    parser.add_argument("--write", type=Path, help="also write the tables there")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = deit_models.from_pretrained(SHIPPED)
    accuracy = accuracy_table(model, *cifar(args.folder, model, args.images))
    lines = [*head(), "", *accuracy, "", *speed_table(model, args.backends, args.calls)]
    if args.write:
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
