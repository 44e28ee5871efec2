"""How long a call takes here, and what there is to know about the machine it was timed on."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingExtraError

_LIBRARIES = ("deit-models", "torch", "openvino", "onnxruntime", "nncf")


def call_times(run: Runner, example: Tensor, *, seconds: float, warm_up: int = 1) -> list[float]:
    """Seconds of each call, two at least, until they add up to `seconds`; the first `warm_up` calls are not counted.

    A call ends when its answer has reached the CPU, so that nothing of it is left to a GPU, nor of the calls before.
    """
    times: list[float] = []
    with torch.no_grad():
        for _ in range(warm_up):
            run(example).cpu()
        while sum(times) < seconds or len(times) < 2:
            start = time.perf_counter()
            run(example).cpu()
            times.append(time.perf_counter() - start)
    return times


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What speed depends on, as JSON takes it: the processor, its threads, the versions of all that computes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions(),
    }


def processor_name() -> str:
    """The model of this machine's processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """The versions of this package and of what computes for it; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself; one that imitates it is slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def has_int8_products() -> bool:
    """Whether the processor sums products of 8-bit numbers in 32 bits at once, as OpenVINO's int8 wants it."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("amx_int8", "avx512_vnni", "avx_vnni"))


Runner = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to logits (B, num_classes) in float32, for any B from 1."""


@contextmanager
def extra_needed(what: str) -> Iterator[None]:
    """Import an optional library inside. Raises: MissingExtraError: it is not installed."""
    try:
        with quiet():
            yield
    except ImportError as error:
        raise MissingExtraError(f"{what} needs {error.name or error}; pip install 'deit-models[export]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of other libraries from users, who can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
