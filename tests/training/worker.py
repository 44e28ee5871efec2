"""What tests of the engine run in processes of their own: `python worker.py SCENARIO FOLDER ...`.

The processes are forked from one that has imported everything and computed nothing, because importing takes longer than
the runs themselves.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import PIL.Image
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deit_models.batches.loading import FINE, Batch, DamageCount
from deit_models.distributed import Process, join_processes
from deit_models.errors import DeitModelsError
from deit_models.images.transforms import EvalTransform
from deit_models.scoring.evaluation import evaluate
from deit_models.training.dense import make_label_maps
from deit_models.training.engine import train_epoch
from deit_models.training.learner import Learner
from deit_models.training.run import train
from deit_models.training.state import read_log


def fork(work: Callable[[], object]) -> int:
    """Start `work` in a process of its own and give its number; the process ends with 0 if it succeeds."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- kills


def lively_run(out: Path, epochs: int, workers: int = 0) -> None:
    train(
        tiny.model(distilled=True),
        recipe=tiny.recipe(tiny.LIVELY, epochs=epochs, seed=4),
        train=tiny.Pictures(24, broken=(5,)),
        val=tiny.Pictures(9, seed=1),
        out=out,
        workers=workers,
        device="cpu",
    )


def kills(folder: Path, count: str, epochs: str, seed: str) -> None:
    """A run that is left alone, and one that is killed `count` times at random moments and started again each time.

    Prints how many epochs were finished at each kill.
    """
    length, dice = int(epochs), random.Random(int(seed))
    assert status(fork(lambda: lively_run(folder / "alone", length))) == 0
    struck: list[int] = []
    while len(struck) < int(count):
        before = finished_epochs(folder / "killed")
        # on a fast machine too, epochs are left for the kills to come
        latest = before + max((length - before) // (int(count) - len(struck) + 1), 1)
        begun = time.perf_counter()
        child = fork(lambda: lively_run(folder / "killed", length))
        if (whole := dice.randrange(3)) == 0:
            wait = dice.uniform(0, 1)  # while it starts, or in its first epoch
        else:
            while finished_epochs(folder / "killed") < min(before + whole, latest):
                time.sleep(0.001)
            # the time of start and epochs so far, so this may be in the next epoch, its evaluation or its saving
            wait = dice.uniform(0, (time.perf_counter() - begun) / (whole + 1))
        until = time.perf_counter() + wait
        while time.perf_counter() < until and finished_epochs(folder / "killed") < latest:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert status(child) == -signal.SIGKILL, "the run was through before it could be killed"
        struck.append(finished_epochs(folder / "killed"))
    assert status(fork(lambda: lively_run(folder / "killed", length))) == 0
    sys.stdout.write(json.dumps(struck))


def finished_epochs(out: Path) -> int:
    return len(read_log(out / "log.jsonl"))


def moments(folder: Path) -> None:
    """A run that kills itself around every step of its second epoch's bookkeeping, and is started again each time."""
    assert status(fork(lambda: lively_run(folder / "alone", 3))) == 0
    for name, moment in MOMENTS.items():
        out = folder / name

        def armed(out: Path = out, moment: Moment = moment) -> None:
            sys.addaudithook(moment)
            lively_run(out, 3)

        assert status(fork(armed)) == -signal.SIGKILL, name
        left = [path.name for path in out.rglob("*.tmp")]
        assert status(fork(lambda out=out: lively_run(out, 3))) == 0
        sys.stdout.write(json.dumps({"moment": name, "left": left}) + "\n")


Moment = Callable[[str, tuple[Any, ...]], None]
"""An audit hook: Python calls it with each event, such as the opening of a file, before it happens."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def second_state(place: Any) -> bool:
    """Whether a path is that of a state to be, or its temporary file, beside the state of the first epoch."""
    path = Path(place) if isinstance(place, (str, Path)) else Path()
    return path.name.startswith("last.pt") and path.with_name("last.pt").exists()


def moved_into_place(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the second state is about to take the place of the first."""
    return event == "os.rename" and second_state(arguments[1])


def cut_in_half(path: Path) -> None:
    os.truncate(path, os.stat(path).st_size // 2)


def in_half_a_state(event: str, arguments: tuple[Any, ...]) -> None:
    if moved_into_place(event, arguments):
        cut_in_half(arguments[0])
        die()


def before_the_state(event: str, arguments: tuple[Any, ...]) -> None:
    if moved_into_place(event, arguments):
        die()


class AfterTheState:
    """Strikes at the event that follows."""

    def __init__(self) -> None:
        self.armed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        armed, self.armed = self.armed, moved_into_place(event, arguments)  # killing is an event, too
        if armed:
            die()


def between_log_and_state(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and second_state(arguments[0]):
        die()


def in_half_a_model(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename" and Path(arguments[1]).name == "model.safetensors":
        cut_in_half(arguments[0])
        die()


MOMENTS: dict[str, Moment] = {
    "half a state": in_half_a_state,
    "state not in place": before_the_state,
    "state in place": AfterTheState(),
    "log written": between_log_and_state,
    "half a model": in_half_a_model,
}


# ---- many processes


def world(folder: Path, size: str, *scenarios: str) -> None:
    """Run scenarios in `size` processes that meet through a file; the result of each lands in FOLDER/RANK.pt."""

    def work(rank: int) -> None:
        meeting, patience = f"file://{folder / 'meeting'}", timedelta(seconds=100)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=int(size), timeout=patience)
        results = {}
        for name in scenarios:
            results[name] = SCENARIOS[name](folder)
        torch.save(results, folder / f"{rank}.pt")
        dist.destroy_process_group()

    children = [fork(lambda rank=rank: work(rank)) for rank in range(int(size))]
    assert [status(child) for child in children] == [0] * int(size)


class FailsInOne(tiny.Pictures):
    """Pictures whose data set fails in the last process, the first time an image is read."""

    failure: BaseException = RuntimeError("the camera is gone")

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        if os.environ["RANK"] == "1":
            raise self.failure
        return super().__getitem__(index)


class Interrupted(FailsInOne):
    failure = KeyboardInterrupt()


class Unreadable(FailsInOne):
    failure = OSError(28, "No space left on device")


def failures(folder: Path, port: str) -> None:
    """Two processes as torchrun starts them, without its launcher: runs that fail in one, each followed by others.

    What each process was told lands in FOLDER/RANK.json.
    """

    def other_data() -> None:
        pictures = tiny.Pictures(26 if os.environ["RANK"] == "0" else 25)
        small_run(folder / "other data", train=pictures)

    def late(row: dict[str, Any]) -> None:
        raise PermissionError(f"no permission after epoch {row['epoch']}")

    attempts: dict[str, Callable[[], Any]] = {
        "fails": lambda: small_run(folder / "fails", train=FailsInOne(26)),
        "interrupted": lambda: small_run(folder / "interrupted", train=Interrupted(26)),
        "unreadable": lambda: evaluate(tiny.model(), Unreadable(9), workers=0, device="cpu"),
        "no images": lambda: small_run(
            folder / "none", train=tiny.Pictures(26) if os.environ["RANK"] == "1" else str(folder / "nowhere")
        ),
        "both": lambda: small_run(folder / "both", train=str(folder / "nowhere")),
        "main only": lambda: small_run(folder / "late", on_epoch=late),
        "other data": other_data,
        "fine": lambda: small_run(folder / "fine")[-1]["epoch"],
    }

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        told = {}
        for name, attempt in attempts.items():
            try:
                told[name] = str(attempt())
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
                told[name] = f"{type(error).__name__}: {error}"
        (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")

    children = [fork(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [status(child) for child in children] == [0, 0]


def torchrun(folder: Path) -> None:
    """As `torchrun` starts it: the processes meet on their own."""
    small_run(folder / "torchrun")
    assert not dist.is_initialized()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "taught": {"distillation": "soft"},
    "short of memory": {},
}
SGD = {"optimizer": "sgd", "beta1": 0.0, "weight_decay": 0.0, "warmup_epochs": 0, "schedule": "constant", "lr": 1.0}


def whole_batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(size, 3, tiny.SIZE, tiny.SIZE, generator=generator)
    return images, torch.randint(0, 3, (size,), generator=generator)


def ask(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3)) * 20


def shorten_memory(learner: Learner) -> None:
    """The last process has room for two images, and none of them knows that yet."""
    process, learner.fitted = learner.process, False

    def run_out(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError

    if process.rank == process.world - 1:
        learner.bare.model.patch_embed.register_forward_pre_hook(run_out)


def gradients(_: Path) -> dict[str, dict[str, Tensor]]:
    """The gradients of one step of 8 images, shared by the processes; by SGD's step of length 1, and as they are."""
    found = {}
    for name, options in OPTIONS.items():
        for distilled in (False, True):
            if name == "taught" and not distilled:
                continue
            with join_processes("cpu") as process:
                settings = tiny.recipe(**SGD, **options)
                model = tiny.model(distilled=distilled)
                before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
                learner = tiny.learner(model, settings, teacher=ask if name == "taught" else None, process=process)
                if name == "short of memory":
                    shorten_memory(learner)
                parts = process.world * settings.accumulate
                images, labels = (tensor.chunk(parts) for tensor in whole_batch(8))
                mine = range(process.rank, parts, process.world)
                batches: list[Batch] = [(images[i].clone(), labels[i], torch.full_like(labels[i], FINE)) for i in mine]
                damage = DamageCount(tiny.Pictures(1), 0.01)
                done = train_epoch(learner, batches, steps=1, epoch=0, damage=damage)
                step = {key: before[key] - tensor for key, tensor in model.state_dict().items()}
            found[f"{name}, {distilled=}"] = {**step, "loss": torch.tensor(done.loss)}
            assert done.images == 8
            assert learner.parts == (4 // process.world if name == "short of memory" else 1)
    return found


def small_run(out: Path, **options: Any) -> list[dict[str, Any]]:
    """Two epochs with an average and gradient clipping, nothing drawn but the order."""
    own = {
        *tiny.LIVELY,
        "token_labels",
        "label_heads",
        "clip_mode",
        "min_lr",
        "optimizer",
        "class_weights",
        "sampling",
        "grad_checkpointing",
    }
    changes = {key: options.pop(key) for key in list(options) if key in own}
    settings = {"epochs": 2, "ema_decay": 0.5, "clip_grad": 1.0, "label_smoothing": 0.1, **changes}
    seed = options.pop("model_seed", 0)
    return train(
        tiny.model(distilled=True, seed=seed),
        **{
            "recipe": tiny.recipe(**settings),
            "train": tiny.Pictures(26),
            "val": tiny.Pictures(13, seed=1, broken=(4,)),
            "out": out,
            "workers": 0,
            "device": "cpu",
            "corrupt_limit": 0.2,
            **options,
        },
    ).log


def replicated(folder: Path) -> list[dict[str, Any]]:
    return small_run(folder / "ddp")


class StoppedError(Exception):
    """Ends a run in all processes."""


def interrupted(batches: Iterable[Any], _: int) -> Iterable[Any]:
    interrupted.calls += 1  # type: ignore[attr-defined]
    if interrupted.calls == 2:  # type: ignore[attr-defined]
        raise StoppedError
    return batches


def divided(folder: Path) -> list[dict[str, Any]]:
    """FSDP, stopped before the second epoch and taken up again."""
    return interrupted_run(folder / "fsdp")


def interrupted_run(out: Path, **options: Any) -> list[dict[str, Any]]:
    interrupted.calls = 0  # type: ignore[attr-defined]
    try:
        small_run(out, shard="fsdp", watch=interrupted, **options)
    except StoppedError:
        return small_run(out, shard="fsdp", **options)
    raise AssertionError("the run was not stopped")


def replicated_by_lamb(folder: Path) -> list[dict[str, Any]]:
    return small_run(folder / "ddp lamb", optimizer="lamb", clip_grad=0.0)


def divided_by_lamb(folder: Path) -> list[dict[str, Any]]:
    return interrupted_run(folder / "fsdp lamb", optimizer="lamb", clip_grad=0.0)


def divided_adaptively(folder: Path) -> list[dict[str, Any]]:
    return small_run(folder / "fsdp agc", shard="fsdp", clip_grad=0.01, clip_mode="agc", grad_checkpointing=True)


def several(folder: Path) -> list[dict[str, Any]]:
    """Several labels an image, balanced in both ways."""
    balanced = {"label_smoothing": 0.0, "class_weights": "balanced", "sampling": "balanced"}
    pictures = {"train": tiny.Several(26), "val": tiny.Several(13, seed=1, broken=(4,))}
    return small_run(folder / "several", epochs=1, warmup_epochs=0, **pictures, **balanced)


def labelled_patches(folder: Path) -> list[dict[str, Any]]:
    """Token labelling, by maps that the processes make together."""
    teacher = tiny.model(seed=5)
    make_label_maps(teacher, tiny.Pictures(26), folder / "maps", student=tiny.PREPROCESSING, workers=0, device="cpu")
    fields = {"token_labels": 0.5, "label_heads": "both", "hflip": 0.5, "crop": "pad"}
    return small_run(folder / "patches", label_maps=folder / "maps", val=None, **fields)


def replicated_adaptively(folder: Path) -> list[dict[str, Any]]:
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return small_run(folder / "ddp agc", clip_grad=0.01, clip_mode="agc", grad_checkpointing=several_processes)


def first_weights(_: Path) -> dict[str, dict[str, Tensor]]:
    """What each process starts from, where their models were drawn from different seeds."""
    with join_processes("cpu") as process:
        learner = tiny.learner(tiny.model(seed=process.rank), tiny.recipe(ema_decay=0.5), process=process)
        return {name: dict(heads.model.state_dict()) for name, heads in learner.versions().items()}


def divided_start(folder: Path) -> None:
    """One epoch of FSDP from different seeds, at no learning rate: what is exported is what was begun with."""
    with join_processes("cpu") as process:
        rank = process.rank
    still = {"lr": 0.0, "min_lr": 0.0, "warmup_epochs": 0, "epochs": 1, "schedule": "epoch"}
    small_run(folder / "still", shard="fsdp", model_seed=rank, **still)


class Numbered(tiny.Pictures):
    """Very many pictures: an index is written into the pixels, and decides the label."""

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        self.read.append(index)
        return PIL.Image.new("RGB", (2, 2), (index % 256, index // 256, 0)), (index * index + index // 7) % 3


class Reads(nn.Module):
    """Logits that tell every index from every other."""

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 0, 0, 0] * 255).round() + 256 * (x[:, 1, 0, 0] * 255).round()
        return torch.stack([torch.sin(index * factor) for factor in (1.0, 2.0, 3.0)], dim=1)


def many(_: Path) -> dict[str, Any]:
    """10,001 images, which neither 2 nor 3 processes share evenly."""
    pictures = Numbered(1)
    pictures._labels = range(10_001)  # the length
    plain = tiny.Preprocessing(resize=2, crop=(2, 2), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    result = evaluate(Reads(), pictures, transform=EvalTransform(plain), workers=0, batch_size=100, device="cpu")
    figures = {name: getattr(result, name) for name in ("top1", "top5", "loss", "images", "skipped")}
    return {"figures": figures, "read": pictures.read}


def refusal(work: Callable[[Process], object]) -> str:
    with join_processes("cpu") as process:
        try:
            work(process)
        except DeitModelsError as error:
            dist.barrier()
            return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(folder: Path) -> dict[str, str]:
    """What each process says to what cannot work; none may wait for another that has given up."""

    def spoiled(process: Process) -> None:
        def spoil(batches: Iterable[Batch], _: int) -> Iterable[Batch]:
            for number, (images, labels, failures) in enumerate(batches):
                yield images * (float("nan") if process.rank == number == 1 else 1.0), labels, failures

        small_run(folder / "spoiled", watch=spoil)

    def apart(process: Process) -> None:
        out = folder / f"apart {process.rank}"
        if process.is_main:
            out.mkdir()
            (out / "last.pt").write_bytes((folder / "ddp" / "last.pt").read_bytes())
        small_run(out)

    def other_shard(_: Process) -> None:
        small_run(folder / "ddp", shard="fsdp")

    return {
        "uneven batch": refusal(lambda _: small_run(folder / "uneven", batch_size=7)),
        "uneven accumulation": refusal(lambda _: small_run(folder / "uneven", batch_size=6, accumulate=2)),
        "not a number in one process": refusal(spoiled),
        "states apart": refusal(apart),
        "other sharding": refusal(other_shard),
        "fewer images than processes": refusal(lambda _: small_run(folder / "few", shard="fsdp", val=tiny.Pictures(1))),
    }


def unreadable(folder: Path) -> list[int]:
    """Broken images, some of them met by either process."""
    rows = small_run(folder / "broken", train=tiny.Pictures(32, broken=(3, 8, 20, 30)), epochs=3)
    return [row["unreadable"] for row in rows]


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    work.__name__: work
    for work in (
        gradients,
        replicated,
        several,
        labelled_patches,
        divided,
        replicated_adaptively,
        divided_adaptively,
        replicated_by_lamb,
        divided_by_lamb,
        first_weights,
        divided_start,
        many,
        refusals,
        unreadable,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, where, *rest = sys.argv[1:]
    commands = (kills, moments, world, torchrun, failures)
    {work.__name__: work for work in commands}[name](Path(where), *rest)
