"""CUDA graphs without CUDA: what is recorded is computed again, into the same memory, each time it is replayed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """Operations and the tensors that they read and wrote, in order."""

    replays = 0
    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.busy = threading.Lock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        assert self.busy.acquire(blocking=False), "replayed while another thread replays it"
        try:
            type(self).replays += 1
            for func, args, kwargs, out in self.steps:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)
        finally:
            self.busy.release()


class Event:
    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...


class Stream:
    def __init__(self, *_: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...


@contextmanager
def recording(graph: Graph, **options: object) -> Iterator[None]:
    assert options["capture_error_mode"] == "thread_local"
    if Graph.fails:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long story")
    with graph:
        yield


def imitate(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Replace what `deploy.gpu` takes from torch.cuda; gives the graphs' class, which counts replays."""
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(Graph, "fails", False)
    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda _=None: Stream(),
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "graph": recording,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Graph
