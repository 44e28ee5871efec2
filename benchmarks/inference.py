"""Images/s of `optimize` beside timm, torch.compile, transformers, OpenVINO and ONNX Runtime.

    python benchmarks/inference.py [--models deit_tiny_patch16_224] [--batches 1 8 32] [--rounds 5]
                                   [--write benchmarks/results/inference.md]

Random weights at the model's own size. Each side is a process of its own that builds its model once, then waits; the
sides are timed in turns, and medians over the rounds are compared. A side that is not installed is left out, and so are
the bf16 sides where the processor would only imitate bf16. The choice of `optimize` is made before, in another process,
as on any second call. The agreement of bf16 and int8 is not measured here, because predictions of random weights mean
nothing: see accuracy.py. `--write` writes the tables after every cell, and the picture beside it at the end.

    python benchmarks/inference.py --choices [--models deit_tiny_patch16_224] [--batches 1 8 32] [--seconds 1]

compares the choice of `optimize` with that of trying everything: the first call without a cache and that of a second
process are timed, then each backend and precision runs in a process of its own, and those within 10 % of the fastest
again, in turns, for medians. No peer is needed.

    python benchmarks/inference.py --families [--write benchmarks/results/family_speed.md]

times two models of each family, one image and eight, as they are and by `optimize`: the table that docs/families/ show.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from loading import machine
from torch import Tensor

import deit_models
from deit_models.deploy.bench import bench
from deit_models.deploy.hardware import call_times
from deit_models.deploy.runtimes import BACKENDS
from deit_models.distributed import has_bf16

OURS, OURS_INT8 = "deit-models", "deit-models int8"
PLAIN = "as it is"
FAMILIES = (
    *("deit_tiny_patch16_224", "deit_small_patch16_224", "deit3_small_patch16_224", "deit3_base_patch16_224"),
    *("dino_vits16", "dino_vits8", "cait_xxs24_224", "cait_s24_224", "resmlp_12", "resmlp_24", "levit_128s"),
    *("levit_256", "t2t_vit_7", "t2t_vit_14", "vit_resnas_tiny", "vit_resnas_small"),
)
"""Two models of each family."""
OPENVINO_INT8 = "OpenVINO int8"
Run = Callable[[Tensor], Any]


class Side(NamedTuple):
    """A way to compute: its builder (from a model's name and a batch), the package it needs, and its precision."""

    build: Callable[[str, Tensor, Path], Run]
    package: str
    bf16: bool = False


def timm_model(name: str) -> torch.nn.Module:
    """The model of that name in timm, with random weights."""
    import timm

    model: torch.nn.Module = timm.create_model(name).eval()
    return model


def in_timm(name: str, _: Tensor, __: Path) -> Run:
    """As timm's users run it."""
    return timm_model(name)


def in_timm_bf16(name: str, _: Tensor, __: Path) -> Run:
    """Weights and images in bf16."""
    model = timm_model(name).bfloat16()
    return lambda images: model(images.bfloat16())


def compiled(name: str, _: Tensor, __: Path) -> Run:
    """`torch.compile` of timm's model, with its default options."""
    return torch.compile(timm_model(name))


def compiled_bf16(name: str, _: Tensor, __: Path) -> Run:
    """The same in bf16."""
    model = torch.compile(timm_model(name).bfloat16())
    return lambda images: model(images.bfloat16())


def in_transformers(name: str, _: Tensor, __: Path) -> Run:
    """The model of the same configuration in transformers, from the folder that we write for it."""
    from transformers import AutoModelForImageClassification

    with tempfile.TemporaryDirectory() as folder:
        deit_models.create_model(name).save_pretrained(folder, layout="transformers")
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
    return lambda images: model(images).logits


def in_openvino(name: str, images: Tensor, _: Path, *, precision: str = "f32") -> Run:
    """The model of timm converted and compiled with the default options, one call a batch."""
    import openvino

    return _run_openvino(openvino.convert_model(timm_model(name), example_input=images), precision)


def _run_openvino(model: Any, precision: str) -> Run:
    import openvino

    run = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return lambda batch: torch.from_numpy(run(batch.numpy())[0])


def in_openvino_bf16(name: str, images: Tensor, folder: Path) -> Run:
    """The same in bf16."""
    return in_openvino(name, images, folder, precision="bf16")


def in_openvino_int8(name: str, images: Tensor, _: Path) -> Run:
    """The same quantised by NNCF with its options for transformers; the default precision for the parts in floats."""
    import nncf
    import openvino

    model = openvino.convert_model(timm_model(name), example_input=images)
    ranges = nncf.Dataset([image.numpy() for image in images[:1].expand(8, -1, -1, -1).split(1)])
    model = nncf.quantize(model, ranges, model_type=nncf.ModelType.TRANSFORMER)
    return _run_openvino(model, "bf16" if has_bf16(torch.device("cpu")) else "f32")


def in_onnxruntime(name: str, images: Tensor, folder: Path) -> Run:
    """The model of timm exported by torch and run with the default options."""
    import onnxruntime

    file = folder / "model.onnx"
    torch.onnx.export(timm_model(name), (images,), file, dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    place = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {place: batch.numpy()})[0])


def plain(name: str, _: Tensor, __: Path) -> Run:
    """Our model in float32, as `from_pretrained` gives it."""
    return deit_models.create_model(name).eval()


def optimized(name: str, images: Tensor, folder: Path) -> Run:
    """Result of `optimize`, chosen before: see `measure`. The seconds of the call go into `took`."""
    options: dict[str, Any] = {"sample": images, "cache_dir": folder, "min_agreement": 0.0}
    model = deit_models.create_model(name)
    began = time.perf_counter()
    fast = deit_models.optimize(model, backend=os.environ[BACKEND], **options)
    took.append(time.perf_counter() - began)
    return fast


def optimized_int8(name: str, images: Tensor, folder: Path) -> Run:
    """The same in int8, chosen by name."""
    options: dict[str, Any] = {"precision": "int8", "calibration": images[:8], "cache_dir": folder, "min_agreement": 0}
    return deit_models.optimize(deit_models.create_model(name), sample=images, **options)


SIDES = {
    PLAIN: Side(plain, "deit_models"),
    "timm": Side(in_timm, "timm"),
    "timm bf16": Side(in_timm_bf16, "timm", bf16=True),
    "torch.compile": Side(compiled, "timm"),
    "torch.compile bf16": Side(compiled_bf16, "timm", bf16=True),
    "transformers": Side(in_transformers, "transformers"),
    "OpenVINO": Side(in_openvino, "openvino"),
    "OpenVINO bf16": Side(in_openvino_bf16, "openvino", bf16=True),
    "ONNX Runtime": Side(in_onnxruntime, "onnxruntime"),
    OURS: Side(optimized, "deit_models"),
    OPENVINO_INT8: Side(in_openvino_int8, "nncf"),
    OURS_INT8: Side(optimized_int8, "nncf"),
}
took: list[float] = []
PEAK = "peak"
BACKEND = "OPTIMIZE_BACKEND"


def serve(side: str, name: str, batch_size: int, folder: Path, out: IO[str]) -> None:
    """Build a side; then, for every number of seconds on the standard input, write images/s of the median call."""
    torch.manual_seed(0)  # weights and images of a second process are those of the first
    if side == PEAK:
        kind = torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32
        images, unit = torch.randn(2048, 2048).to(kind), 2 * 2048**3
        run: Run = lambda x: x @ x  # noqa: E731
    else:
        images, unit = torch.randn(batch_size, 3, *image_hw(name)), batch_size
        run = SIDES[side].build(name, images, folder)
    with torch.inference_mode():
        call_times(run, images, seconds=0.0, warm_up=2)
        choice = getattr(run, "choice", None)
        ready = {"ready": side, "choice": f"{choice.backend} {choice.precision}" if choice else None, "took": took}
        print(json.dumps(ready), file=out, flush=True)
        for line in sys.stdin:
            times = call_times(run, images, seconds=float(line))
            print(json.dumps({"rate": unit / statistics.median(times)}), file=out, flush=True)


def image_hw(name: str) -> tuple[int, int]:
    """Height and width of a model's input."""
    found: tuple[int, int] = deit_models.create_model(name, device="meta").config.image_hw
    return found


class Child:
    """A side in its process."""

    def __init__(self, side: str, name: str, batch_size: int, folder: Path) -> None:
        self.command = [sys.executable, __file__, "--child", side, name, str(batch_size), str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        ready = self._answer()
        self.choice, self.took = ready["choice"], sum(ready["took"])

    def rate(self, seconds: float) -> float:
        """Images/s, or FLOP/s of the peak, now."""
        assert self.process.stdin is not None  # noqa: S101
        print(seconds, file=self.process.stdin, flush=True)
        found: float = self._answer()["rate"]
        return found

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"this ended early, run it by hand: {' '.join(self.command)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Cell(NamedTuple):
    """One model at one batch size: rates by side, all rounds; the matrix peak beside them; the choice of `optimize`."""

    model: str
    batch_size: int
    rates: dict[str, list[float]]
    choice: str

    def median(self, side: str) -> float:
        """Of all rounds."""
        return statistics.median(self.rates[side])

    @property
    def best_peer(self) -> str:
        """The fastest side that computes in floats, besides ours."""
        return max((side for side in self.rates if side not in (OURS, OURS_INT8, OPENVINO_INT8, PEAK)), key=self.median)

    def ratio(self, ours: str, side: str) -> str:
        """Ours to theirs: the median of the rounds' ratios, since a machine changes from round to round."""
        if not {ours, side} <= set(self.rates):
            return ""
        return f"{statistics.median(a / b for a, b in zip(self.rates[ours], self.rates[side], strict=True)):.2f}"


def measure(name: str, batch_size: int, sides: list[str], args: argparse.Namespace) -> Cell:
    """All sides of a cell, in turns."""
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = Path(made)
        if OURS in sides:
            Child(OURS, name, batch_size, folder).close()  # measures, and keeps the fastest
        children = {}
        for side in [*sides, PEAK]:
            children[side] = Child(side, name, batch_size, folder)
            stack.callback(children[side].close)
        rates: dict[str, list[float]] = {side: [] for side in children}
        for _ in range(args.rounds):
            for side, child in children.items():
                rates[side].append(child.rate(args.seconds))
        return Cell(name, batch_size, rates, children[OURS].choice if OURS in children else "")


def report(cells: list[Cell], sides: list[str], args: argparse.Namespace) -> str:
    """Rates, ratios and shares of the peak as Markdown."""
    kind = "bf16" if has_bf16(torch.device("cpu")) else "float32"
    packages = ("torch", "timm", "transformers", "openvino", "onnxruntime", "nncf")
    lines = [
        "# Inference (images/s)",
        "",
        f"{machine(packages)}, {torch.backends.cpu.get_cpu_capability()}. Random weights, 224 pixels. Medians of "
        f"{args.rounds} interleaved rounds of {args.seconds:g} s, one process each; `python benchmarks/inference.py"
        f"{' --families' * args.families}`.",
        "",
        f"| model | batch | {' | '.join(sides)} |",
        f"| --- | ---: |{' ---: |' * len(sides)}",
    ]
    for cell in cells:
        lines.append(row(cell, *(f"{cell.median(side):.1f}" for side in sides)))
    if OURS not in sides or "timm" not in sides:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "Ratios are medians of the rounds' ratios, and the best peer is the best of those that compute in floats. The "
        f"share is that of the {kind} matrix peak measured beside it (2048 x 2048), counting the model's own "
        "multiply-accumulates.",
        "",
        f"| model | batch | chosen | {OURS} to the best peer | to timm | share of the peak "
        f"| {OURS_INT8} to {OPENVINO_INT8} | to the best peer | to timm |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in cells:
        best = cell.best_peer
        used = 2 * deit_models.count_macs(cell.model) * cell.median(OURS) / cell.median(PEAK)
        ratios = [f"{cell.ratio(OURS, best)} ({best})", cell.ratio(OURS, "timm"), f"{used:.0%}"]
        ratios += [cell.ratio(OURS_INT8, side) for side in (OPENVINO_INT8, best, "timm")]
        lines.append(row(cell, cell.choice, *ratios))
    return "\n".join(lines) + "\n"


class Choice(NamedTuple):
    """Choice of `optimize` for a model and a batch size, seconds of both calls, and rates of all ways to compute."""

    model: str
    batch_size: int
    chosen: str
    first: float
    second: float
    rates: dict[str, list[float]]

    def line(self) -> str:
        """A row of the table."""
        rates = {way: statistics.median(found) for way, found in self.rates.items()}
        best = max(rates, key=lambda way: rates[way])
        pairs = zip(self.rates[self.chosen], self.rates[best], strict=False)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        others = ", ".join(f"{way} {rate:.1f}" for way, rate in sorted(rates.items(), key=lambda item: -item[1]))
        return (
            f"| `{self.model}` | {self.batch_size} | {self.first:.1f} | {self.second:.1f} | {self.chosen} | {best} "
            f"| {ratio:.2f} | {others} |"
        )


def measure_choice(name: str, batch_size: int, args: argparse.Namespace) -> Choice:
    """Both calls of `optimize`, and every way to compute: each once, the fastest ones in `--rounds` turns."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for _ in range(2):
            children.append(Child(OURS, name, batch_size, Path(folder)))
            children[-1].close()
    chosen, rates = children[0].choice, dict[str, list[float]]()

    def run(*ways: str) -> None:
        for way in ways or (None,):
            backends, precision = (list(BACKENDS), None) if way is None else ([way.split()[0]], way.split()[1])
            options: dict[str, Any] = {"precision": precision, "seconds": args.seconds}
            for found in bench(name, batch_sizes=[batch_size], backends=backends, **options):
                if found.error is None:
                    way = f"{found.backend} {found.precision}"
                    rates.setdefault(way, []).append(found.images_per_second)

    run()
    best = max(found[0] for found in rates.values())
    close = [way for way, found in rates.items() if way == chosen or found[0] >= 0.9 * best]
    for _ in range(args.rounds - 1 if len(close) > 1 else 0):
        run(*close)
    return Choice(name, batch_size, chosen, children[0].took, children[1].took, rates)


def report_choices(choices: list[Choice], args: argparse.Namespace) -> str:
    """The table as Markdown."""
    lines = [
        "# Choices of `optimize`",
        "",
        f"{machine(('torch', 'openvino', 'onnxruntime'))}, {torch.backends.cpu.get_cpu_capability()}. Seconds of the "
        "first call and of one in a second process; images/s of every way to compute, one process each, "
        f"{args.seconds:g} s, medians of {args.rounds} rounds for those within 10 % of the fastest.",
        "",
        "| model | batch | first call (s) | second process (s) | chosen | fastest of all | chosen to fastest | all |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | --- |",
    ]
    return "\n".join([*lines, *(choice.line() for choice in choices)]) + "\n"


def row(cell: Cell, *figures: str) -> str:
    """A line of a table."""
    return f"| `{cell.model}` | {cell.batch_size} | {' | '.join(figures)} |"


def draw(cells: list[Cell], sides: list[str], file: Path) -> None:
    """Each side's rate relative to timm's in float32, a group of bars a cell."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.5 + 1.3 * len(cells), 4), layout="constrained")
    width = 0.8 / len(sides)
    for i, side in enumerate(sides):
        heights = [cell.median(side) / cell.median("timm") for cell in cells]
        color = {OURS: "black", OURS_INT8: "dimgrey"}.get(side)
        axes.bar(
            [x + (i - (len(sides) - 1) / 2) * width for x in range(len(cells))], heights, width, label=side, color=color
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [f"{cell.model.split('_')[1]}\nbatch {cell.batch_size}" for cell in cells])
    axes.set_ylabel("images/s relative to timm, float32")
    figure.legend(loc="outside upper center", ncols=len(sides), fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
    shipped = "deit_micro_distilled_patch4_32"
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(models)}; for --choices {shipped} too")
    parser.add_argument("--families", action="store_true", help="two models of each family, as they are and optimised")
    parser.add_argument("--choices", action="store_true", help="compare what `optimize` chooses with everything")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8 32; for --families 1 8")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="default: all that are installed")
    parser.add_argument("--backend", default="auto", help="what `optimize` may choose from; one by name is quicker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side in a round; default: %(default)s")
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=4, metavar=("SIDE", "MODEL", "BATCH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, name, batch_size, folder = args.child
        answers, sys.stdout = sys.stdout, sys.stderr  # exporters print a lot
        serve(side, name, int(batch_size), Path(folder), answers)
        return
    os.environ[BACKEND] = args.backend  # the sides inherit it
    chosen = (list(FAMILIES), [1, 8], [PLAIN, OURS]) if args.families else (models, [1, 8, 32], args.sides)
    models, args.batches, args.sides = chosen[0], args.batches or chosen[1], chosen[2]
    if args.choices:
        choices: list[Choice] = []
        for name in args.models or [shipped, *models]:
            for batch_size in args.batches:
                choices.append(measure_choice(name, batch_size, args))
                print(report_choices(choices, args), flush=True)
                if args.write:
                    args.write.write_text(report_choices(choices, args), encoding="utf-8")
        return
    native = has_bf16(torch.device("cpu"))
    sides = args.sides or [
        name
        for name, side in SIDES.items()
        if name != PLAIN and importlib.util.find_spec(side.package) and (native or not side.bf16)
    ]
    cells: list[Cell] = []
    for name in args.models or models:
        for batch_size in args.batches:
            cells.append(measure(name, batch_size, sides, args))
            text = report(cells, sides, args)
            print(f"{text}\n", flush=True)
            if args.write:
                args.write.write_text(text, encoding="utf-8")
    if args.write and "timm" in sides:
        draw(cells, sides, args.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
