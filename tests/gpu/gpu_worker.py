"""What tests on a GPU run in processes of their own: `python gpu_worker.py SCENARIO FOLDER DEVICE`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_toys
import torch
import torch.distributed as dist
from settings import RANDOM

import deit_models
from deit_models.distributed import Process
from deit_models.training import run
from deit_models.training.run import TrainResult

LIVELY: dict[str, Any] = {**RANDOM, "optimizer": "sgd", "lr": 0.02}
"""Everything that draws random numbers or keeps a state. SGD, since AdamW makes whole steps of gradients that are 0."""


def lively(out: Path, device: torch.device, **options: Any) -> TrainResult:
    """Four epochs."""
    return deit_models.train(
        gpu_toys.small("distilled", num_classes=3),
        recipe=gpu_toys.recipe(**LIVELY),
        train=gpu_toys.Colours(36),
        val=gpu_toys.Colours(9, seed=100),
        out=out,
        device=device,
        workers=0,
        **options,
    )


def killed(folder: Path, device: torch.device) -> None:
    """The same run, killed after its second epoch."""

    def strike(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    lively(folder / "killed", device, on_epoch=strike)


def resumed(folder: Path, device: torch.device) -> None:
    """The killed run, to its end."""
    lively(folder / "killed", device)


@contextmanager
def one_of_two(device: Any = None) -> Iterator[Process]:
    """This process as one of two, since alone it would exchange nothing: each step then takes half of its batch."""
    yield Process(0, 2, torch.device(device))


def distributed(folder: Path, device: torch.device) -> None:
    """Copies (DDP), then divided parameters (FSDP) with a stop and a second start, over NCCL or gloo."""
    if device.type == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run.join_processes = one_of_two
    settings = {"ema_decay": 0.5, "clip_grad": 1.0, "optimizer": "sgd", "lr": 0.05}

    def start(shard: Any, epochs: int) -> None:
        deit_models.train(
            gpu_toys.small("distilled", num_classes=3),
            recipe=gpu_toys.recipe(**settings, epochs=epochs),
            train=gpu_toys.Colours(48),
            # one process alone cannot evaluate under FSDP in inference mode: torch gathers nothing, and has no copy
            val=gpu_toys.Colours(12, seed=100) if shard == "ddp" else None,
            out=folder / shard,
            device=device,
            workers=0,
            shard=shard,
            on_epoch=stop_after_second if shard == "fsdp" else None,
        )

    start("ddp", 4)
    try:
        start("fsdp", 4)
    except StoppedError:
        torch.manual_seed(1)
        stop_after_second.armed = False  # type: ignore[attr-defined]
        start("fsdp", 4)
    dist.destroy_process_group()


class StoppedError(Exception):
    """Ends a run between two epochs."""


def stop_after_second(row: dict[str, Any]) -> None:
    if row["epoch"] == 1 and getattr(stop_after_second, "armed", True):
        raise StoppedError


SCENARIOS: dict[str, Callable[[Path, torch.device], None]] = {
    work.__name__: work for work in (killed, resumed, distributed)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, where, kind = sys.argv[1:]
    SCENARIOS[scenario](Path(where), torch.device(kind))
