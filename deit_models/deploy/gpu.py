"""Exact float32 on a GPU, and CUDA graphs: all kernels of a batch launched at once, from any thread."""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from .timing import Runner, quiet

logger = logging.getLogger(__name__)

_WARM_UP = 3
"""Calls before the recording: libraries choose their kernels and make their workspaces in the first ones."""
_capture_lock = threading.Lock()  # CUDA records one graph at a time in a process


class _ExactFloat32(AbstractContextManager[None]):
    """TF32 off while any thread is inside; the last one to leave puts back what was set before the first came.

    The switches belong to the process: other threads compute without TF32 meanwhile, and a switch that one of them sets
    meanwhile is lost.
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


_exact_float32 = _ExactFloat32()


def _switch_tf32_off() -> ExitStack:
    """Convolutions and matrix products in all bits of float32; closing the result restores the switches.

    torch has old switches (allow_tf32, set_float32_matmul_precision) and new ones (fp32_precision), and raises where an
    old one is read that the new ones contradict. So both are set, unless the user has contradicted them already.
    """
    new: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
    before = ExitStack()
    with quiet():  # some versions of torch warn of the old ones
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


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Compute in all 24 bits of float32, where TF32 would keep 11 of a factor; nothing to do but on CUDA.

    torch allows TF32 in convolutions by default, which moves logits by 3e-3 and more.
    """
    return _exact_float32 if device.type == "cuda" else nullcontext()


def exactly(run: Runner, device: torch.device) -> Runner:
    """The same runner, always in exact float32."""

    def run_exactly(images: Tensor) -> Tensor:
        with exact_float32(device):
            return run(images)

    return run_exactly


class GraphRunner:
    """Batches of one shape by a CUDA graph; (B, C, H, W) -> (B, num_classes), a copy that no later call changes.

    A graph reads and writes fixed memory, so calls take turns: threads by a lock, streams by an event.
    """

    def __init__(self, run: Runner, example: Tensor) -> None:
        """Record a runner's kernels for batches like `example`. Raises: whatever torch does where it cannot."""
        self._run = run  # whose weights the graph reads
        self._lock, self._free = threading.Lock(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        device = example.device
        with _capture_lock, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            self._input = example.clone(memory_format=torch.contiguous_format)
            stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream(device)
            stream.wait_stream(current)
            # torch.cuda.graph leaves its stream set where the recording fails; this one does not
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run(self._input)
                self._graph = torch.cuda.CUDAGraph()
                # other threads may allocate memory meanwhile
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._output = run(self._input)
            current.wait_stream(stream)

    def fits(self, images: Tensor) -> bool:
        """Whether a batch is like the example."""
        return images.shape == self._input.shape and images.dtype == self._input.dtype

    def __call__(self, images: Tensor) -> Tensor:
        """The logits of a batch that fits."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            stream = torch.cuda.current_stream(self._input.device)
            stream.wait_event(self._free)
            self._input.copy_(images, non_blocking=True)
            self._graph.replay()
            logits = self._output.clone()
            self._free.record(stream)
            return logits


def launched_at_once(run: Runner, example: Tensor, *, plain: Runner) -> Runner:
    """Batches like the example by a CUDA graph of `run`, all others by `plain`.

    Where the kernels cannot be recorded, one log line says so and they are launched one by one.
    """
    run(example)  # what fails here is no matter of graphs
    try:
        graph = GraphRunner(run, example)
    except Exception as error:  # noqa: BLE001  # whatever CUDA or a compiled network raises while it is recorded
        logger.warning("no CUDA graph, kernels are launched one by one: %s", first_line(error))
        return lambda images: run(images) if images.shape == example.shape else plain(images)
    return lambda images: graph(images) if graph.fits(images) else plain(images)
