"""CUDA graphs without CUDA: recorded operations are computed again, into the same memory, at each replay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """Operations and the tensors that they read and wrote, in order."""

    def __init__(self, cuda: ImitatedCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.busy = threading.Lock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        assert self.busy.acquire(blocking=False), "replayed while another thread replays it"
        try:
            self.cuda.replays += 1
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


class ImitatedCuda:
    """The part of `torch.cuda` that `deploy.hardware` uses; counts replays of all graphs.

    With `fails`, nothing can be recorded.
    """

    Event = Event
    Stream = Stream

    def __init__(self, *, fails: bool = False) -> None:
        self.replays = 0
        self.fails = fails

    def CUDAGraph(self) -> Graph:  # noqa: N802  # torch's name
        return Graph(self)

    @contextmanager
    def graph(self, graph: Graph, **options: object) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")
        with graph:
            yield

    def current_stream(self, _: object = None) -> Stream:
        return Stream()

    def stream(self, _: Stream) -> nullcontext[None]:
        return nullcontext()

    def device(self, _: object) -> nullcontext[None]:
        return nullcontext()
