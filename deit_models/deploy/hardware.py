"""The machine that computes: what it is, timed calls, and on a GPU exact float32 and CUDA graphs."""

from __future__ import annotations

import logging
import math
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import cpu_has
from ..errors import first_line

logger = logging.getLogger(__name__)

Runner = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to logits (B, num_classes) in float32, for any B from 1."""

_LIBRARIES = ("deit-models", "torch", "openvino", "onnxruntime", "nncf")
_WARM_UP = 3
"""Calls before the recording of a graph: in the first ones, libraries choose kernels and allocate workspaces."""
_capture_lock = threading.Lock()  # CUDA records one graph at a time in a process


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings of other libraries that a user cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def no_reports() -> Iterator[None]:
    """Inside, OpenVINO's converter and NNCF do not report their use to their makers.

    Each report is a process of its own. Where processes are spawned, as in `bench` and on a Mac, it imports the main
    module again, which takes seconds from what is timed beside it.
    """
    try:
        from openvino_telemetry.utils.sender import TelemetrySender
    except ImportError:
        yield
        return
    send, TelemetrySender.send = TelemetrySender.send, lambda *_, **__: None
    try:
        yield
    finally:
        TelemetrySender.send = send


def call_times(
    run: Runner, example: Tensor, *, seconds: float = 0.5, warm_up: int = 1, give_up: float = math.inf
) -> list[float]:
    """Seconds of each call, two at least, until they add up to `seconds`; the first `warm_up` calls are not counted.

    A call ends when its logits are on the CPU, so no work of it or of an earlier call is left on a GPU. After two calls
    of more than `give_up` seconds each, there is no third one.
    """
    times: list[float] = []
    with torch.no_grad():
        for _ in range(warm_up):
            run(example).cpu()
        while sum(times) < seconds or len(times) < 2:
            start = time.perf_counter()
            run(example).cpu()
            times.append(time.perf_counter() - start)
            if len(times) > 1 and min(times) > give_up:
                break
    return times


def backends_are_ranked() -> bool:
    """Whether this is a processor as those on which the backends were compared: of Intel's kind, without AMX."""
    return platform.machine() in ("x86_64", "AMD64") and not cpu_has("amx_bf16", "amx_int8")


def machine(device: torch.device) -> dict[str, str | int | None]:
    """Processor, threads and library versions as plain values: speed depends on them. None: not installed."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
    }


def processor_name() -> str:
    """The model name of the processor, or its type if the system does not give the name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def has_int8_products() -> bool:
    """Whether the processor sums products of 8-bit numbers in 32 bits in one step; int8 in OpenVINO is made for it."""
    return cpu_has("amx_int8", "avx512_vnni", "avx_vnni")


class _WithoutTF32(ContextDecorator):
    """TF32 off while any thread is inside; the last thread to leave restores the settings. Decorates functions too.

    The switches belong to the process: other threads compute without TF32 in the meantime, and a switch that another
    thread sets in the meantime is lost.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = _switch_tf32_off()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                with quiet():
                    self._before.close()


_without_tf32 = _WithoutTF32()


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Compute in all 24 bits of float32; TF32 keeps 11 of a factor. Does nothing except on CUDA.

    torch allows TF32 in convolutions by default; that changes logits by 3e-3 and more.
    """
    return _without_tf32 if device.type == "cuda" else nullcontext()


def _switch_tf32_off() -> ExitStack:
    """Full float32 in convolutions and matrix products; closing the result restores the switches.

    torch has old switches (allow_tf32, set_float32_matmul_precision) and new ones (fp32_precision). It raises if an old
    one is read while the new ones contradict it. So both are set, unless the user's own settings contradict each other.
    """
    # torch's stubs lack these attributes
    new: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
    before = ExitStack()
    with quiet():  # some versions of torch warn of the old switches
        for switch in (*new, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            before.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
        with suppress(RuntimeError):
            before.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = False
        with suppress(RuntimeError):
            before.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        for switch in new:
            switch.fp32_precision = "ieee"
    return before


class GraphRunner:
    """Batches of one shape by a CUDA graph, since kernels are too short to be launched one by one.

    (B, C, H, W) -> (B, num_classes), a copy that no later call changes. A graph reads and writes fixed memory, so calls
    use it one by one: a lock orders threads, an event orders streams.
    """

    def __init__(self, run: Runner, example: Tensor, cuda: Any) -> None:
        """Record the kernels of `run` for batches like `example`. Raises: any error of torch during the recording."""
        self._run = run  # kept, since the graph reads its weights
        self._cuda, self._lock, self._free = cuda, threading.Lock(), cuda.Event()
        device = example.device
        with _capture_lock, cuda.device(device), torch.inference_mode(False), torch.no_grad():
            self._input = example.clone(memory_format=torch.contiguous_format)
            stream, current = cuda.Stream(device), cuda.current_stream(device)
            stream.wait_stream(current)
            # restores the stream also if the recording fails, which torch.cuda.graph alone does not
            with cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run(self._input)
                self._graph = cuda.CUDAGraph()
                # other threads may allocate memory in the meantime
                with cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._output = run(self._input)
            current.wait_stream(stream)

    def fits(self, images: Tensor) -> bool:
        """Whether a batch has the shape and dtype of the example."""
        return images.shape == self._input.shape and images.dtype == self._input.dtype

    def __call__(self, images: Tensor) -> Tensor:
        """The logits of a batch that fits."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            stream = self._cuda.current_stream(self._input.device)
            stream.wait_event(self._free)
            self._input.copy_(images, non_blocking=True)
            self._graph.replay()
            logits = self._output.clone()
            self._free.record(stream)
            return logits


def on_gpu(run: Runner, example: Tensor, *, plain: Runner, exact: bool, cuda: Any = torch.cuda) -> Runner:
    """Batches like the example by a CUDA graph of `run`, all others by `plain`; `exact`: without TF32.

    If the kernels cannot be recorded, they are launched one by one; one log line gives the reason.
    """
    if exact:
        run, plain = _without_tf32(run), _without_tf32(plain)
    run(example)  # an error here is one of the network, not of the graph
    try:
        graph = GraphRunner(run, example, cuda)
    except Exception as error:  # noqa: BLE001  # CUDA and compiled networks raise many types during a recording
        logger.warning("no CUDA graph, kernels are launched one by one: %s", first_line(error))
        return lambda images: run(images) if images.shape == example.shape else plain(images)
    return lambda images: graph(images) if graph.fits(images) else plain(images)
