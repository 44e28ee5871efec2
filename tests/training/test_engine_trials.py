"""Trial passes of the engine: a batch too large for a GPU's memory, and whether compiling pays; without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from deit_models.batches.loading import FINE, Batch, DamageCount
from deit_models.distributed import Process
from deit_models.errors import TrainingError
from deit_models.training.engine import EpochLoss, fit_into_memory, pays, train_epoch
from deit_models.training.learner import Learner, compiled
from deit_models.training.run import Computing, Run, TrainResult


class Hungry(nn.Module):
    """A small network with statistics and dropout, whose device holds `most` images; `seen` notes each batch."""

    def __init__(self, most: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.most, self.seen = most, []
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        hidden = self.layers[:2](x)  # the statistics have moved by the time that memory runs out
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.layers[2:](hidden)


def batches(count: int, size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, tiny.SIZE, tiny.SIZE, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
            torch.full((size,), FINE),
        )
        for _ in range(count)
    ]


def epoch(learner: Learner, data: list[Batch]) -> EpochLoss:
    torch.manual_seed(5)
    steps = len(data) // learner.recipe.accumulate
    return train_epoch(learner, data, steps=steps, epoch=2, damage=DamageCount(tiny.Pictures(8), 0.0))


SETTINGS = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.8, "clip_grad": 1.0, "lr": 0.01}


# ---- memory


def test_parts_chosen_by_memory_are_accumulation_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    chosen = tiny.learner(Hungry(most=3), tiny.recipe(**SETTINGS))
    chosen.fitted = False
    by_hand = tiny.learner(Hungry(most=8), tiny.recipe(**SETTINGS, accumulate=4))
    first = epoch(chosen, batches(3, 8))
    parts = [tuple(t[start : start + 2] for t in batch) for batch in batches(3, 8) for start in range(0, 8, 2)]
    second = epoch(by_hand, parts)
    assert (first.loss, first.images) == (second.loss, second.images)
    tiny.same_bits(dict(chosen.bare.state_dict()), dict(by_hand.bare.state_dict()))
    tiny.same_bits(dict(chosen.average.module.state_dict()), dict(by_hand.average.module.state_dict()))
    tiny.same_bits(chosen.optimizer.state_dict(), by_hand.optimizer.state_dict())
    assert chosen.bare.model.seen == [8, 4, 2, *[2] * 12]
    (line,) = caplog.messages
    assert line == "8 images at once do not fit into the GPU's memory; going on in parts of 2, as with accumulate=4"


def test_trying_leaves_no_trace_where_all_fits(caplog: pytest.LogCaptureFixture) -> None:
    tried, plain = (tiny.learner(Hungry(most=8), tiny.recipe(**SETTINGS)) for _ in range(2))
    tried.fitted = False
    epoch(tried, batches(3, 8))
    epoch(plain, batches(3, 8))
    tiny.same_bits(dict(tried.bare.state_dict()), dict(plain.bare.state_dict()))
    assert caplog.messages == []
    assert (len(tried.bare.model.seen), tried.parts) == (4, 1)


@pytest.mark.parametrize(("size", "most", "left"), [(8, 0, 1), (6, 2, 3)])
def test_what_cannot_be_halved_is_refused_in_one_line(size: int, most: int, left: int) -> None:
    learner = tiny.learner(Hungry(most=most), tiny.recipe(batch_size=size))
    learner.fitted = False
    with pytest.raises(TrainingError, match=rf"too little memory for {left} images at once") as caught:
        fit_into_memory(learner, batches(1, size)[0])
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class BesideAnother(Process):
    """A process beside one in which two tries fail, then fit."""

    others: list[bool] = field(default_factory=lambda: [False, True])

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others.pop(0)]


def test_all_processes_use_what_the_smallest_memory_needs() -> None:
    learner = tiny.learner(Hungry(most=8), tiny.recipe(), process=BesideAnother(0, 1, torch.device("cpu")))
    learner.fitted = False
    fit_into_memory(learner, batches(1, 8)[0])
    assert learner.parts == 2


def memory_run(out: Path, *, most: int, stop_after: int | None = None, **changes: Any) -> TrainResult:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == stop_after:
            raise KeyboardInterrupt

    learner = tiny.learner(Hungry(most=most), tiny.recipe(**{**SETTINGS, **changes}))
    learner.fitted = False
    return Run(
        learner=learner,
        records=tiny.Pictures(16),
        classes=None,
        val=None,
        out=out,
        preprocessing=tiny.PREPROCESSING,
        computing=Computing(on_epoch=stop),
        workers=0,
    ).to_the_end()


def test_run_goes_on_in_the_parts_it_began_with(tmp_path: Path) -> None:
    memory_run(tmp_path / "alone", most=4)
    for most, changes in ((8, {}), (2, {"accumulate": 2})):  # more memory, and the same parts given by hand
        out = tmp_path / f"run {most}"
        with pytest.raises(KeyboardInterrupt):
            memory_run(out, most=4, stop_after=0)
        assert tiny.state(out)["parts"] == 2
        memory_run(out, most=4 if changes else most, **changes)
        for part in ("model", "ema_model", "optimizer"):
            tiny.same_bits(tiny.state(out)[part], tiny.state(tmp_path / "alone")[part])


# ---- compiling


@pytest.mark.parametrize(("minutes", "outcome"), [(0.5, False), (3.9, False), (4.1, True), (600, True)])
def test_compiling_pays_from_four_minutes_on(minutes: float, outcome: bool) -> None:
    assert pays(60 * minutes) is outcome


class Clock:
    """Seconds pass only where it is looked at."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def read(self) -> float:
        self.now += self.step
        return self.now


def undecided(clock: Clock, backend: Callable[..., Any], **changes: Any) -> Learner:
    """A learner that may be compiled, by `backend`."""
    torch.compiler.reset()
    learner = tiny.learner(tiny.model(distilled=True), tiny.recipe(**{**SETTINGS, "epochs": 300, **changes}))
    learner.undecided, learner.clock = True, clock.read
    learner.compile = partial(compiled, backend=backend)
    return learner


def test_long_run_is_compiled_after_its_first_steps(caplog: pytest.LogCaptureFixture) -> None:
    counter = CompileCounter()
    learner = undecided(Clock(1.0), counter)
    plain = tiny.learner(tiny.model(distilled=True), tiny.recipe(**{**SETTINGS, "epochs": 300}))
    assert epoch(learner, batches(4, 8)).loss == pytest.approx(epoch(plain, batches(4, 8)).loss, rel=1e-4)
    assert not learner.undecided
    assert learner.heads is not learner.bare
    frames = counter.frame_count
    assert frames >= 1
    for _ in range(2):  # other learning rates, another epoch
        epoch(learner, batches(4, 8))
    assert counter.frame_count == frames
    line = next(line for line in caplog.messages if "torch.compile" in line)
    # a second a step, 298 epochs of 4 steps, two of which are done
    assert line == (
        "about 20 minutes of training are left: torch.compile has compiled the model; compile='off' (--compile off) "
        "leaves it out"
    )


def test_short_run_is_not_compiled() -> None:
    counter = CompileCounter()
    learner = undecided(Clock(0.1), counter)
    epoch(learner, batches(4, 8))
    assert not learner.undecided
    assert learner.heads is learner.bare
    assert counter.frame_count == 0


def test_epoch_of_one_step_leaves_it_open() -> None:
    learner = undecided(Clock(1000.0), CompileCounter())
    for _ in range(3):
        epoch(learner, batches(1, 8))
    assert learner.undecided


def test_run_goes_on_where_compiling_fails(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Callable[..., Any]:  # noqa: ARG001
        raise RuntimeError("no compiler\nfound")

    learner = undecided(Clock(1.0), broken)
    epoch(learner, batches(3, 8))
    assert learner.heads is learner.bare
    line = next(line for line in caplog.messages if "torch.compile" in line)
    assert "torch.compile failed, so it goes on without (" in line
    assert "\n" not in line


def test_clock_is_read_while_it_is_open() -> None:
    counter = CompileCounter()
    learner = undecided(Clock(10.0**6), counter)
    learner.undecided = False  # decided already
    epoch(learner, batches(3, 8))
    assert learner.heads is learner.bare
    assert counter.frame_count == 0
