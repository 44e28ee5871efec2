"""Measurements on a GPU, in stages; a stage that has a result is skipped.

    python benchmarks/gpu.py [--stage check inference] [--again] [--data FOLDER] [--out FOLDER]
    python benchmarks/gpu.py --toy --out FOLDER      (a rehearsal of every stage on a CPU, with tiny models)

Each stage is a process of its own with a time limit. It writes `<stage>.json` and `<stage>.md` after every figure, so
that an interrupted stage keeps its figures; the next call measures the rest, if it is on the same card. The
data folder holds CIFAR-10 and Tiny ImageNet as archives (`cifar10_jpeg.tar.gz`, `tiny_imagenet_1.tar.gz` to `_3`),
which are unpacked there, or unpacked already as `cifar10/` and `tiny_imagenet/` with `train/` and `test/` or `val/`;
missing data is named, and its stages are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import training as loops
from loading import machine
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
EXAMPLES = ROOT / "examples"
COMMAND = "python benchmarks/gpu.py"
ARCHIVES = {
    "cifar10": ("cifar10_jpeg.tar.gz",),
    "tiny_imagenet": tuple(f"tiny_imagenet_{part}.tar.gz" for part in (1, 2, 3)),
}


class Stage(NamedTuple):
    """One stage.

    Attributes:
        run: measures, and adds rows to the result.
        limit_s: seconds after which it is ended; at most nine minutes.
        columns: key of a row to its heading, in the order of the table.
        data: the data sets it needs.
    """

    run: Callable[[Run], None]
    limit_s: int
    columns: dict[str, str]
    data: tuple[str, ...] = ()


class Run:
    """Input of a stage, and the place of its figures."""

    def __init__(self, stage: str, args: argparse.Namespace) -> None:
        self.stage, self.toy, self.data, self.out = stage, args.toy, args.data, args.out
        self.device = torch.device("cpu" if args.toy else "cuda")
        before = {} if args.again else result_of(stage, args.out) or result_of(stage, RESULTS)
        same = before.get("card") == card(self.device)  # a table is of one card
        self.rows: list[dict[str, Any]] = before["rows"] if same else []
        self.notes: list[str] = before["notes"] if same else []
        self.start = time.perf_counter() - (before["seconds"] if same else 0)

    def has(self, **values: Any) -> bool:
        """Whether an interrupted run has left a row with these values."""
        return any(values.items() <= row.items() for row in self.rows)

    def add(self, **row: Any) -> None:
        """One more row, written at once; its keys are the stage's columns."""
        expected = STAGES[self.stage].columns
        if set(row) != set(expected):
            raise ValueError(f"{self.stage}: row with {sorted(row)}; expected {sorted(expected)}")
        self.rows.append({key: row[key] for key in expected})
        print(json.dumps(self.rows[-1]), flush=True)
        self.save(complete=False)

    def save(self, *, complete: bool) -> None:
        """Write the rows as JSON and as Markdown."""
        found = {
            "stage": self.stage,
            "complete": complete,
            "card": card(self.device),
            "machine": machine(("torch", "torchvision", "timm", "transformers")),
            "command": f"{COMMAND} --stage {self.stage}{' --toy' if self.toy else ''}",
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - self.start, 1),
            "columns": STAGES[self.stage].columns,
            "rows": self.rows,
            "notes": self.notes,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.stage}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (self.out / f"{self.stage}.md").write_text(as_markdown(found), encoding="utf-8")

    def script(self, path: str, *arguments: object) -> None:
        """Run one of the examples; its output goes to `<stage>.log`. Raises: RuntimeError: it failed."""
        command = [sys.executable, str(EXAMPLES / path), *map(str, arguments), "--device", self.device.type]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        log = self.out / f"{self.stage}.log"
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{path} failed: {log.read_text(encoding='utf-8')[-500:]}")


def card(device: torch.device) -> str:
    """The name of the GPU, or of the processor in a rehearsal."""
    from deit_models.deploy.hardware import machine

    return f"{machine(device)['device']}{' (rehearsal)' if device.type == 'cpu' else ''}"


def as_markdown(found: dict[str, Any]) -> str:
    """The table of one result."""
    columns, state = found["columns"], "" if found["complete"] else " Incomplete: the stage was broken off."
    lines = [
        f"# GPU: {found['stage']}",
        "",
        f"{found['card']}; {found['machine']}. {found['date']}, {found['seconds']:.0f} s, `{found['command']}`.{state}",
        "",
        f"| {' | '.join(columns.values())} |",
        f"|{' --- |' * len(columns)}",
    ]
    for row in found["rows"]:
        lines.append(f"| {' | '.join(as_text(row[key]) for key in columns)} |")
    return "\n".join([*lines, *(["", *found["notes"]] if found["notes"] else [])]) + "\n"


def as_text(value: Any) -> str:
    """A cell: whole numbers with thousands, others with four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# Stages


def check(run: Run) -> None:
    """`pytest -m gpu`: one row."""
    options = ["--gpu-device", "cpu", "-k", "test_float32"] if run.toy else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--basetemp", folder]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, *options, "tests/gpu"], cwd=ROOT, capture_output=True, text=True, check=False, errors="replace"
        )
    text = done.stdout + done.stderr
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "check.log").write_text(text[-200_000:], encoding="utf-8")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text[-300:])}
    if not counts.get("passed"):
        raise RuntimeError(f"no test passed: {text[-500:]}")
    for name in re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE):
        run.notes.append(f"- failed: `{name}`")
    run.add(
        passed=counts.get("passed", 0),
        failed=counts.get("failed", 0) + counts.get("error", 0),
        skipped=counts.get("skipped", 0),
        seconds=time.perf_counter() - start,
    )


def shipped(run: Run, data: str, teacher: str, recipes: tuple[dict[str, Any], dict[str, Any]], **seconds: int) -> None:
    """A teacher and its students, each with its time; the files to ship lie in `<out>/<data>/`."""
    work = run.out / data
    for student, limit in seconds.items():
        arguments = ["--out", work, "--teacher", teacher, "--student", student, "--student-seconds", limit]
        for option, recipe in zip(("--teacher-recipe", "--student-recipe"), recipes, strict=True):
            arguments += [option, json.dumps(recipe)]
        run.script("shipped_weights.py", folder_of(run, data), *arguments)
        for row in json.loads((work / "result.json").read_text(encoding="utf-8")):
            if row["model"] not in {known["model"] for known in run.rows}:
                run.add(**row)


BRIEF = {"epochs": 2, "warmup_epochs": 1, "batch_size": 16}
"""Of a rehearsal."""


def cifar(run: Run) -> None:
    """CIFAR-10: a teacher, DeiT-Ti and DeiT-Micro distilled from it."""
    if run.toy:
        shipped(run, "cifar10", "cifar_small", (BRIEF, BRIEF), deit_micro_distilled_patch4_32=2)
        return
    student = {"epochs": 300, "batch_size": 512, "lr": 2e-3, "warmup_epochs": 10, "eval_every": 25, "compile": "on"}
    seconds = {"deit_tiny_distilled_patch4_32": 240, "deit_micro_distilled_patch4_32": 90}
    shipped(run, "cifar10", "cifar_large", ({"epochs": 40, "eval_every": 10}, student), **seconds)


def tiny(run: Run) -> None:
    """Tiny ImageNet: a teacher, and DeiT-Ti at 64 pixels distilled from it."""
    if run.toy:
        shipped(run, "tiny_imagenet", "cifar_small", (BRIEF, BRIEF), deit_tiny_distilled_patch8_64=2)
        return
    teacher = {"epochs": 25, "lr": 0.3, "label_smoothing": 0.1, "eval_every": 5}
    student = {"epochs": 200, "batch_size": 512, "lr": 2e-3, "warmup_epochs": 5, "eval_every": 25, "compile": "on"}
    shipped(run, "tiny_imagenet", "tiny_imagenet_large", (teacher, student), deit_tiny_distilled_patch8_64=240)


def inference(run: Run) -> None:
    """DeiT-Ti/S/B in bf16 beside timm, timm compiled and transformers."""
    models = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
    batches, rounds, seconds = ((2,), 2, 0.05) if run.toy else ((1, 8, 256), 5, 0.5)
    peak = loops.matrix_peak(run.device)
    for batch in batches:  # the quickest cells come first, in case the time is up
        for name in models[:1] if run.toy else models:
            if run.has(model=name, batch=batch, side=OURS):
                continue
            inference_cell(run, name, batch, peak, rounds=rounds, seconds=seconds)


def inference_cell(run: Run, name: str, batch: int, peak: float, *, rounds: int, seconds: float) -> None:
    """All sides of one model at one batch size, in turns."""
    import deit_models
    from deit_models.deploy.hardware import call_times

    images = torch.randn(batch, 3, 224, 224, device=run.device)
    times: dict[str, list[float]] = {}
    calls: dict[str, Call] = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for side, build in INFERENCE_SIDES.items():
            try:
                call = build(run, name, images, Path(folder))
                call(images)
            except Exception as error:  # noqa: BLE001  a side that fails must not cost the others their figures
                run.notes.append(f"- {name}, batch {batch}, {side}: {type(error).__name__}: {str(error)[:200]}")
                continue
            calls[side], times[side] = call, []
        for _ in range(rounds):
            for side, call in calls.items():
                times[side].append(statistics.median(call_times(call, images, seconds=seconds, warm_up=3)))
    medians = {side: statistics.median(values) for side, values in times.items()}
    for side, latency in sorted(medians.items(), key=lambda item: item[0] == OURS):  # ours last: then a cell is whole
        peers = [value for other, value in medians.items() if other not in (side, OURS)]
        run.add(
            model=name,
            batch=batch,
            side=side,
            images_per_second=batch / latency,
            latency_ms=1e3 * latency,
            share_of_peak=2 * deit_models.count_macs(name) * batch / latency / peak,
            ratio_to_best_peer=min(peers) / latency if side == OURS and peers else None,
        )
    del calls
    torch._dynamo.reset()


OURS = "deit-models"
Call = Callable[[Tensor], Tensor]
Build = Callable[[Run, str, Tensor, Path], Call]


def _shape(run: Run) -> dict[str, int]:
    """Changes to a model for a rehearsal."""
    return {"depth": 1} if run.toy else {}


def _timm(run: Run, name: str) -> torch.nn.Module:
    import timm

    return timm.create_model(name, **_shape(run)).eval().to(run.device, torch.bfloat16)  # type: ignore[no-any-return]


def _ours(run: Run, name: str, images: Tensor, folder: Path) -> Call:
    import deit_models

    model = deit_models.create_model(name, **_shape(run)).eval().to(run.device)
    backend = "eager" if run.toy else "auto"
    return deit_models.optimize(model, sample=images, backend=backend, cache_dir=folder, min_agreement=0.0)


def _timm_eager(run: Run, name: str, images: Tensor, _: Path) -> Call:
    model, half = _timm(run, name), images.bfloat16()
    return lambda _: model(half)


def _timm_compiled(run: Run, name: str, images: Tensor, _: Path) -> Call:
    options = {"backend": "eager"} if run.toy else {"mode": "max-autotune"}
    model, half = torch.compile(_timm(run, name), **options), images.bfloat16()  # type: ignore[call-overload]
    return lambda _: model(half)


def _transformers(run: Run, name: str, images: Tensor, folder: Path) -> Call:
    from transformers import AutoModelForImageClassification

    import deit_models

    deit_models.create_model(name, **_shape(run)).save_pretrained(folder, layout="transformers")
    model = AutoModelForImageClassification.from_pretrained(folder).eval().to(run.device, torch.bfloat16)
    half = images.bfloat16()
    return lambda _: model(half).logits


INFERENCE_SIDES: dict[str, Build] = {
    OURS: _ours,
    "timm": _timm_eager,
    "timm compiled": _timm_compiled,
    "transformers": _transformers,
}


def training(run: Run) -> None:
    """Whole training steps beside timm's model in the loop of its script; then with images from a loader."""
    models = {"deit_small_patch16_224": 512, "deit_base_patch16_224": 256, "deit_tiny_patch16_224": 1024}
    cases = {"deit_micro_patch4_32": 8} if run.toy else models
    peak = loops.matrix_peak(run.device)
    for compiled in (False,) if run.toy else (True, False):
        for name, batch in cases.items():
            if run.has(model=name, batch=batch, compiled=compiled, side="timm"):
                continue
            rates = {side: training_rate(run, side, name, batch, compiled) for side in (OURS, "timm")}
            for side, (rate, memory) in rates.items():
                ratio = rate / rates["timm"][0] if side == OURS else None
                run.add(**training_row(name, side, compiled, batch, rate, peak, memory=memory, ratio=ratio))
    for name, batch, folder in loader_cases(run):
        if not run.has(model=name, images=folder.name):
            with_loader(run, name, batch, folder, peak)


def training_row(
    name: str, side: str, compiled: bool, batch: int, rate: float, peak: float, **more: Any
) -> dict[str, Any]:
    """A row of the stage `training`; a step counts three times the forward pass's two operations per MAC."""
    import deit_models

    share = rate * 6 * deit_models.model_info(name).macs / peak
    row = {"model": name, "side": side, "compiled": compiled, "batch": batch, "images_per_second": rate}
    return row | {"share_of_peak": share, "memory": None, "ratio": None, "images": "ready", "wait": None} | more


def training_rate(run: Run, side: str, name: str, batch: int, compiled: bool) -> tuple[float, float | None]:
    """Images/s on batches that are on the device already, and the peak of the memory in GiB."""
    import deit_models

    config = deit_models.create_model(name, device="meta").config
    steps, rounds = (2, 2) if run.toy else (20, 3)
    fine = torch.full((batch,), -1)
    images = torch.randn(batch, config.in_chans, *config.image_hw, device=run.device)
    labels = torch.randint(0, config.num_classes, (batch,))
    train = (loops.ours if side == OURS else loops.theirs)(name, run.device, batch, compiled)

    def batches(count: int) -> loops.Batches:
        return [(images.clone(), labels, fine) for _ in range(count)]

    train(batches(3))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    rates = []
    for _ in range(rounds):
        ready = batches(steps)
        start = loops.finished(run.device)
        train(ready)
        rates.append(batch * steps / (loops.finished(run.device) - start))
    memory = torch.cuda.max_memory_allocated(run.device) / 2**30 if run.device.type == "cuda" else None
    torch._dynamo.reset()
    return statistics.median(rates), memory


def loader_cases(run: Run) -> list[tuple[str, int, Path]]:
    """Models, batch sizes and folders of images to train from: CIFAR-10 as it is, and enlarged to photographs."""
    cifar = folder_of(run, "cifar10")
    if run.toy:
        return [("deit_micro_patch4_32", 8, cifar)]
    photos = run.data / "photos"
    if not photos.exists():
        enlarge(cifar, photos)
    return [("deit_tiny_patch4_32", 512, cifar), ("deit_small_patch16_224", 512, photos)]


def enlarge(source: Path, target: Path, count: int = 4096, side: int = 400) -> None:
    """JPEG files of 400 pixels a side, made from the first small ones: as much to decode as photographs."""
    from PIL import Image

    for number, file in enumerate(sorted(source.glob("train/*/*"))[:: max(50_000 // count, 1)]):
        (target / "train" / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((side, side), Image.Resampling.BICUBIC).save(
            target / "train" / file.parent.name / f"{number}.jpg", quality=90
        )


def with_loader(run: Run, name: str, batch: int, folder: Path, peak: float) -> None:
    """Images/s of a real run from files, and the share of the time that its device waits for images."""
    import deit_models

    model = deit_models.create_model(name, num_classes=10)
    epochs = 2 if run.toy or name.endswith("_32") else 4
    preset = "cifar_scratch" if name.endswith("_32") else "deit_300e"
    changes = {"augment": "rand-m9-mstd0.5-inc1", "erase": 0.25} if name.endswith("_32") else {"repeats": 1}
    changes |= {"epochs": epochs, "warmup_epochs": 1, "batch_size": batch, "compile": not run.toy}
    recipe = deit_models.recipe_named(preset, **changes)
    with tempfile.TemporaryDirectory() as out:
        rows = deit_models.train(model, recipe=recipe, train=folder, out=out, device=run.device).log
    rate = rows[-1]["images_per_second"]
    ready = [row for row in run.rows if row["model"] == name and row["side"] == OURS and row["images"] == "ready"]
    ready_rate = ready[0]["images_per_second"] if ready else training_rate(run, OURS, name, batch, not run.toy)[0]
    wait = max(0.0, 1 - rate / ready_rate)
    run.add(**training_row(name, OURS, not run.toy, batch, rate, peak, images=folder.name, wait=wait))


def table3(run: Run) -> None:
    """The DeiT paper's table 3 on CIFAR-10: three seeds with a strong teacher, one with a weak one."""
    epochs, size = (2, 16) if run.toy else (100, 512)
    strong, weak = ("cifar_small", "resnet20") if run.toy else ("cifar_large", "resnet20")
    for teacher, seed in [(strong, 0)] if run.toy else [(strong, 0), (strong, 1), (strong, 2), (weak, 0)]:
        if run.has(teacher=teacher, seed=seed):
            continue
        work = run.out / "table3" / f"{teacher}_{seed}"
        options = ["--teacher", teacher, "--teacher-epochs", 2 if run.toy else 40, "--eval-every", max(epochs // 5, 1)]
        options += ["--out", work, "--seed", seed, "--epochs", epochs, "--batch-size", size]
        run.script("distill_cifar10.py", folder_of(run, "cifar10"), *options)
        for row in json.loads((work / "table.json").read_text(encoding="utf-8")):
            run.add(teacher=teacher, seed=seed, epochs=epochs, **row)
        likeness = json.loads((work / "token_likeness.json").read_text(encoding="utf-8"))
        layers = ", ".join(f"{value:.2f}" for value in likeness["tokens"])
        run.notes.append(
            f"- {teacher}, seed {seed}: cosine similarity of class and distillation token at the input and after each "
            f"block {layers}; of the heads' weights {likeness['heads']:.2f}"
        )


def families(run: Run) -> None:
    """All families side by side on CIFAR-10 at equal multiply-accumulates and epochs."""
    epochs, options = (1, ["--batch-size", 16]) if run.toy else (100, ["--batch-size", 512])
    work = run.out / "families"
    run.script("families_cifar10.py", folder_of(run, "cifar10"), "--out", work, "--epochs", epochs, *options)
    for row in json.loads((work / "table.json").read_text(encoding="utf-8")):
        run.add(**row)


SHIPPED = {
    "model": "model",
    "epochs": "epochs",
    "top1": "top-1 (%)",
    "seconds": "seconds",
    "images_per_second": "images/s",
    "file": "file",
    "file_top1": "top-1 of the file (%)",
}
STAGES: dict[str, Stage] = {
    "check": Stage(check, 300, {"passed": "passed", "failed": "failed", "skipped": "skipped", "seconds": "seconds"}),
    "cifar": Stage(cifar, 540, SHIPPED, ("cifar10",)),
    "inference": Stage(
        inference,
        540,
        {
            "model": "model",
            "batch": "batch",
            "side": "side",
            "images_per_second": "images/s",
            "latency_ms": "ms a batch",
            "share_of_peak": "share of the bf16 peak",
            "ratio_to_best_peer": "ratio to the best peer",
        },
    ),
    "training": Stage(
        training,
        540,
        {
            "model": "model",
            "side": "side",
            "compiled": "compiled",
            "batch": "batch",
            "images": "images",
            "images_per_second": "images/s",
            "share_of_peak": "share of the bf16 peak",
            "memory": "memory (GiB)",
            "ratio": "ratio to timm",
            "wait": "share of waiting",
        },
        ("cifar10",),
    ),
    "tiny": Stage(tiny, 540, SHIPPED, ("tiny_imagenet",)),
    "table3": Stage(
        table3,
        540,
        {
            "teacher": "teacher",
            "seed": "seed",
            "epochs": "epochs",
            "training": "training",
            "heads": "heads used at test",
            "top1": "top-1 (%)",
        },
        ("cifar10",),
    ),
    "families": Stage(
        families,
        540,
        {
            "model": "model",
            "params": "parameters",
            "macs": "MACs",
            "epochs": "epochs",
            "top1": "top-1 (%)",
            "images_per_second": "images/s (training)",
            "inference_per_second": "images/s (inference)",
        },
        ("cifar10",),
    ),
}
"""In the order of their value."""


# Data and command line


def folder_of(run: Run, name: str) -> Path:
    """The class folders of a data set: the real one, or a few made-up images in a rehearsal."""
    return toy_images(run.out / "toy_data", name) if run.toy else run.data / name


def toy_images(root: Path, name: str) -> Path:
    """Ten classes that differ in colour, with a few images each, made on the first call."""
    from PIL import Image

    folder, side = root / name, 32 if name == "cifar10" else 64
    if not folder.exists():
        for split, count in (("train", 8), ("test", 2)):
            for label in range(10):
                target = folder / split / f"class {label}"
                target.mkdir(parents=True)
                for number in range(count):
                    Image.new("RGB", (side, side), (25 * label, 25 * number, 255 - 25 * label)).save(
                        target / f"{number}.png"
                    )
    return folder


def unpack(data: Path) -> list[str]:
    """Unpack the archives; returns the names of missing ones."""
    missing = []
    for name, archives in ARCHIVES.items():
        for archive in archives:
            mark = data / f"{archive}.unpacked"
            if not mark.exists() and (data / archive).exists():
                with tarfile.open(data / archive) as file:
                    file.extractall(data / name, filter="data")
                mark.touch()
            if not mark.exists() and not (len(archives) == 1 and (data / name / "train").is_dir()):
                missing.append(archive)
    return missing


def result_of(stage: str, folder: Path) -> dict[str, Any]:
    """Result of a stage in a folder; empty if there is none."""
    file = folder / f"{stage}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def run_stage(stage: str, args: argparse.Namespace, missing: list[str]) -> bool:
    """Run one stage in a process of its own; returns whether it succeeded."""
    lacking = [archive for name in STAGES[stage].data for archive in ARCHIVES[name] if archive in missing]
    if lacking and not args.toy:
        print(f"{stage}: skipped, {args.data} lacks {', '.join(lacking)}", flush=True)
        return True
    places = [args.out] if args.toy else [args.out, RESULTS]
    if not args.again and any(result_of(stage, place).get("complete") for place in places):
        print(f"{stage}: skipped, its result is there; --again measures anew", flush=True)
        return True
    command = [sys.executable, __file__, "--child", stage, "--data", str(args.data), "--out", str(args.out)]
    command += ["--again"] if args.again else []
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *(["--toy"] if args.toy else [])], timeout=args.limit_s or STAGES[stage].limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        print(f"{stage}: ended after {error.timeout:.0f} s; what it had is kept", flush=True)
        return False
    print(f"{stage}: {'done' if done.returncode == 0 else 'failed'}, {time.perf_counter() - start:.0f} s", flush=True)
    return done.returncode == 0


def child(stage: str, args: argparse.Namespace) -> None:
    """Measure one stage in this process."""
    sys.path.insert(0, str(ROOT))
    run = Run(stage, args)
    STAGES[stage].run(run)
    run.save(complete=True)


def main() -> int:
    """Parse the command line and run; 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all, in order")
    parser.add_argument("--again", action="store_true", help="measure stages that have a result, too")
    parser.add_argument("--toy", action="store_true", help="rehearse on the CPU with tiny models")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "gpu_data", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: the variable OUT, else benchmarks/results/gpu")
    parser.add_argument("--limit-s", type=int, help="seconds for each stage; default: its own limit")
    parser.add_argument("--child", choices=list(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out or Path(os.environ.get("OUT", RESULTS))
    if args.toy and args.out == RESULTS:
        parser.error("--toy needs --out FOLDER: a rehearsal is no result")
    if args.child:
        child(args.child, args)
        return 0
    missing = [] if args.toy else unpack(args.data)
    return 0 if all([run_stage(stage, args, missing) for stage in args.stage]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
