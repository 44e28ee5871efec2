"""Counts what would make the program wait for a GPU, without one: fake tensors that claim to be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")


class Waits(TorchDispatchMode):
    """Counts operations that wait for a GPU; used inside `FakeTensorMode`.

    These are reads of a number, operations whose output's size is a result, and copies between the CPU and a GPU that
    are not asked to go on by themselves, or cannot, because the memory of the CPU is not pinned.

    Attributes:
        found: how often each occurred, by name.
        read_backs: copies from the GPU that go on by themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.read_backs = 0
        self._pinned: list[Tensor] = []  # kept, so that no other tensor gets their place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if name in ("_pin_memory", "pin_memory"):  # which fake tensors do not know
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if name == "is_pinned":
            return any(args[0] is tensor for tensor in self._pinned)
        if name in ("_local_scalar_dense", "item", "is_nonzero"):  # the last two in inference mode
            self.found[name] += 1
            return 0
        out = func(*args, **kwargs)
        if name in ("nonzero", "_unique2", "masked_select") and _on_gpu(tree_leaves(args)):
            self.found[name] += 1
        if name in ("_to_copy", "to", "copy_"):  # the second in inference mode
            self._note_copy(name, out, args, kwargs)
        return out

    def _note_copy(self, name: str, out: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
        source = args[1] if name == "copy_" else args[0]
        if source.device.type == out.device.type:
            return
        goes_on = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        if out.device.type == "cpu":
            self.read_backs += goes_on
        else:
            goes_on = goes_on and any(source is tensor for tensor in self._pinned)
        if not goes_on:
            self.found[f"{name} to {out.device.type}"] += 1


def _on_gpu(leaves: Iterable[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in leaves)


def put_on_fake_gpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """In place: every parameter and buffer becomes one without numbers, on a GPU that need not be there."""
    with mode:
        for part in module.modules():
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    part._parameters[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            for name, tensor in part._buffers.items():
                if tensor is not None:
                    part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
