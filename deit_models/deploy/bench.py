"""`bench`: speed of a model on this machine, each backend in a process of its own, as a table for an issue."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..distributed import has_bf16
from ..errors import ConfigError, first_line
from ..models import create_model
from ..registry import count_macs
from .hardware import Runner, call_times, machine, quiet
from .network import prepare
from .runtimes import BACKENDS, Backend, BackendName, InferencePrecision, Job, ways_on

_WARM_UP = 3


class Case(NamedTuple):
    """One measurement to make; the backend "model" is the model itself, not prepared for inference."""

    model: str
    backend: BackendName | Literal["model"]
    precision: InferencePrecision
    batch_size: int
    device: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Figures of one case; zeros, and the reason as `error`, if it failed.

    Attributes:
        images_per_second: over all timed calls.
        p50_ms: median of a call.
        p95_ms: 95 of 100 calls are faster.
        peak_mb: in MiB. On a GPU the most memory that torch reserved while calls were timed, with weights and CUDA
            graphs, without compiling; else the peak of the process's resident memory.
    """

    backend: str
    precision: str
    batch_size: int
    images_per_second: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    peak_mb: float = 0.0
    error: str | None = None


def bench(
    model: str,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    backends: Sequence[str] = (),
    precision: InferencePrecision | None = None,
    device: str = "cpu",
    seconds: float = 3.0,
) -> Iterator[Measurement]:
    """Measure a model with random weights, each backend, precision and batch size in a fresh process.

    Args:
        model: a name or an architecture file, as for `create_model`; speed does not depend on the weights.
        batch_sizes: images in a call.
        backends: of those of `optimize`, and "model" for the model itself; all if empty.
        precision: "float32", "bf16", or "int8" with ranges from random images; by default float32, and bf16 where the
            device computes in it natively.
        device: to run on.
        seconds: time for each, at least two calls.

    Raises: ConfigError: an unknown backend or precision, a batch below 1. UnknownModelError: the name.
    """
    known = ("model", *BACKENDS)
    for name in backends:
        if name not in known:
            raise ConfigError(f"backend {name!r}; expected one of {', '.join(known)}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"batch_sizes={list(batch_sizes)}; expected numbers of images, 1 or more")
    if precision not in (None, *get_args(InferencePrecision)):
        raise ConfigError(f"precision={precision!r}; expected one of {', '.join(get_args(InferencePrecision))}")
    create_model(model, device="meta")  # an unknown name is an error here, not in each process
    cases = _cases(model, batch_sizes, backends or known, precision, device=device, seconds=seconds)
    return map(_in_own_process, cases)


def _cases(
    model: str,
    batch_sizes: Sequence[int],
    wanted: Sequence[str],
    precision: InferencePrecision | None,
    *,
    device: str,
    seconds: float,
    native_bf16: Callable[[torch.device], bool] = has_bf16,
) -> list[Case]:
    ways: list[tuple[BackendName | Literal["model"], InferencePrecision]] = []
    if "model" in wanted:
        ways.append(("model", "float32"))
    named = {name: backend for name, backend in BACKENDS.items() if name in wanted}
    ways += ways_on(torch.device(device), backends=named, precision=precision, native_bf16=native_bf16)
    return [Case(model, *way, batch_size, device, seconds) for batch_size in batch_sizes for way in ways]


def _in_own_process(case: Case, run: Callable[[Case], Measurement] | None = None) -> Measurement:
    # thread pools of several runtimes disturb each other, and a process has one peak of memory
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(run or measure, case).result()
    except BrokenProcessPool:
        return _failed(case, "the process died, most often for want of memory")


def _failed(case: Case, reason: str) -> Measurement:
    return Measurement(backend=case.backend, precision=case.precision, batch_size=case.batch_size, error=reason)


class PeakMemory:
    """Peak of memory: of torch on a GPU since `forget`, else of this process."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda if device.type == "cuda" else None
        self.device = device

    def forget(self) -> None:
        """Start the peak of a GPU anew, without the memory for building and compiling."""
        if self.cuda:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats(self.device)

    def mb(self) -> float:
        """The peak in MiB."""
        if self.cuda:
            # reserved, not allocated: the memory of a CUDA graph is reserved for it and counts as free
            return self.cuda.max_memory_reserved(self.device) / 2**20
        status = Path("/proc/self/status")
        if status.exists():
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**10
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, in KiB elsewhere
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(
    case: Case,
    *,
    memory: PeakMemory | None = None,
    backends: Mapping[BackendName, Backend] = BACKENDS,
    timer: Callable[..., list[float]] = call_times,
) -> Measurement:
    """Build the network of a case and time it in this process."""
    device = torch.device(case.device)
    memory = memory or PeakMemory(device)
    try:
        with quiet(), torch.no_grad():
            model = create_model(case.model).eval().to(device)
            images = torch.randn(case.batch_size, model.config.in_chans, *model.config.image_hw, device=device)
            if case.backend == "model":
                run: Runner = model
            else:
                backend = backends[case.backend]
                prepared = prepare(model, dtype=backend.dtype(case.precision))
                run = backend.build(Job(prepared, images, case.precision, calibration=images))
            timer(run, images, seconds=0, warm_up=_WARM_UP)
            memory.forget()
            times = timer(run, images, seconds=case.seconds, warm_up=0)
    except Exception as error:  # noqa: BLE001  # compilers and runtimes raise many types: each is a row of the table
        return _failed(case, first_line(error))
    return Measurement(
        backend=case.backend,
        precision=case.precision,
        batch_size=case.batch_size,
        images_per_second=case.batch_size * len(times) / sum(times),
        p50_ms=1000 * statistics.median(times),
        p95_ms=1000 * statistics.quantiles(times, n=20, method="inclusive")[-1],
        peak_mb=memory.mb(),
    )


def table(model: str, rows: Sequence[Measurement], device: str = "cpu") -> str:
    """Measurements as Markdown, with the machine and the versions they depend on."""
    config = create_model(model, device="meta").config
    height, width = config.image_hw
    about = ", ".join(f"{key} {value}" for key, value in machine(torch.device(device)).items() if value is not None)
    lines = [
        f"{model}, {height}x{width} pixels, {count_macs(config) / 1e9:.2f} G MACs, random weights, {device}",
        about,
        "",
        "| backend | precision | batch | images/s | p50 (ms) | p95 (ms) | peak memory (MB) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        figures = f"{row.images_per_second:.1f} | {row.p50_ms:.1f} | {row.p95_ms:.1f} | {row.peak_mb:.0f}"
        cells = "- | - | - | -" if row.error else figures
        lines.append(f"| {row.backend} | {row.precision} | {row.batch_size} | {cells} |")
    failed = {f"{row.backend} in {row.precision}: {row.error}": None for row in rows if row.error}
    return "\n".join([*lines, *([""] if failed else []), *failed])
