"""How fast this machine is with a model: every backend in a process of its own, as a table for an issue."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from ..errors import ConfigError, first_line
from ..macs import count_macs
from ..models import create_model
from ..models.layers import ImageClassifier
from .network import prepare
from .runtimes import BACKENDS, BackendName, Job, Precision, network_dtype, precisions_here
from .timing import Runner, call_times, machine, quiet

_WARM_UP = 3


class Case(NamedTuple):
    """What is measured: `backend` "model" is the model as it is, without what `optimize` does."""

    model: str
    backend: BackendName | Literal["model"]
    precision: Precision
    batch_size: int
    device: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one process found.

    Attributes:
        backend: what computed; "model" is the model as it is.
        precision: in what.
        batch_size: images a call.
        images_per_second: over all timed calls; 0 where it failed, as the others.
        p50_ms: the median of a call.
        p95_ms: what 95 of 100 calls stay below.
        peak_mb: in MiB. On a GPU the most of its memory that torch held while calls were timed, weights and CUDA graphs
            included, compiling not; else the most resident memory the process had.
        error: why there are no figures, in one line.
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
    precision: Precision | None = None,
    device: str = "cpu",
    seconds: float = 3.0,
) -> Iterator[Measurement]:
    """Measure a model with random weights, each backend, precision and batch size in a fresh process.

    Args:
        model: a name or an architecture file, as `create_model` takes it; speed does not depend on the weights.
        batch_sizes: images a call.
        backends: of those `optimize` knows, and "model" for the model as it is; all if empty.
        precision: "float32", "bf16" or "int8", whose ranges random images give; by default float32, and bf16 where the
            device computes in it by itself.
        device: where to run.
        seconds: how long each is timed; two calls at least.

    Raises: ConfigError: an unknown backend or precision, a batch below 1. UnknownModelError: the name.
    """
    known = ("model", *BACKENDS)
    for name in backends:
        if name not in known:
            raise ConfigError(f"backend {name!r}; expected one of {', '.join(known)}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"batch_sizes={list(batch_sizes)}; expected numbers of images, 1 or more")
    if precision not in (None, *get_args(Precision)):
        raise ConfigError(f"precision={precision!r}; expected one of {', '.join(get_args(Precision))}")
    create_model(model, device="meta")  # an unknown name is told here, not by every process
    ways = _ways(backends or known, precision, torch.device(device))
    cases = [Case(model, *way, batch_size, device, seconds) for batch_size in batch_sizes for way in ways]
    return map(_in_own_process, cases)


def _ways(
    wanted: Sequence[str], precision: Precision | None, device: torch.device
) -> list[tuple[BackendName | Literal["model"], Precision]]:
    kinds = (precision,) if precision else precisions_here(device)
    ways: list[tuple[BackendName | Literal["model"], Precision]] = [("model", "float32")] if "model" in wanted else []
    for name, backend in BACKENDS.items():
        if name in wanted and device.type in backend.devices:
            ways += [(name, kind) for kind in backend.precisions if kind in kinds]
    return ways


def _in_own_process(case: Case) -> Measurement:
    # thread pools of several runtimes would disturb each other, and peak memory is a process's own
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, case).result()
    except BrokenProcessPool:
        return _failed(case, "the process died, most often for want of memory")


def _failed(case: Case, reason: str) -> Measurement:
    return Measurement(backend=case.backend, precision=case.precision, batch_size=case.batch_size, error=reason)


def measure(case: Case) -> Measurement:
    """Build what a case asks for, and time it, in this process."""
    device = torch.device(case.device)
    try:
        with quiet(), torch.no_grad():
            model = create_model(case.model).eval().to(device)
            images = torch.randn(case.batch_size, model.config.in_chans, *model.config.image_hw, device=device)
            run = _runner(model, case, images)
            call_times(run, images, seconds=0, warm_up=_WARM_UP)
            _forget_peak(device)
            times = call_times(run, images, seconds=case.seconds, warm_up=0)
    except Exception as error:  # noqa: BLE001  # whatever a compiler or a runtime raises is a row of the table
        return _failed(case, first_line(error))
    return Measurement(
        backend=case.backend,
        precision=case.precision,
        batch_size=case.batch_size,
        images_per_second=case.batch_size * len(times) / sum(times),
        p50_ms=1000 * statistics.median(times),
        p95_ms=1000 * statistics.quantiles(times, n=20, method="inclusive")[-1],
        peak_mb=_peak_mb(device),
    )


def _runner(model: ImageClassifier, case: Case, images: torch.Tensor) -> Runner:
    if case.backend == "model":
        return lambda x: model(x)
    prepared = prepare(model, dtype=network_dtype(case.backend, case.precision))
    return BACKENDS[case.backend].build(Job(prepared, images, case.precision, calibration=images))


def _forget_peak(device: torch.device) -> None:
    """Begin a GPU's peak anew, without what building and compiling took."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        # not what is allocated: the memory that a CUDA graph computes in is reserved for it, and counts as free
        return torch.cuda.max_memory_reserved(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, in KiB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def table(model: str, rows: Sequence[Measurement], device: str = "cpu") -> str:
    """What was measured as Markdown, with all that the figures depend on."""
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
