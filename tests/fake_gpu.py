"""A GPU without one: its tensors are fake, tensors of the CPU are real, and whatever waits for the GPU is noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)


class FakeGpu(TorchDispatchMode):
    """Operators run on fake tensors where the GPU has a part in them; one whose shape depends on values fails.

    Attributes:
        waits: operators that made the CPU wait: copies that block, and what reads a value, which then is 1.
        read_backs: copies from the GPU that go on by themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.read_backs = 0
        self._pinned: list[Tensor] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if not any(_on_gpu(leaf) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return self._on_the_cpu(name, func, args, kwargs)
        if (
            torch.is_inference_mode_enabled() and func.namespace == "aten"
        ):  # which leaves operators whole that otherwise come here in parts
            with self:
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        if name == "_fused_sgd_":
            return None  # works in place, and has no fake form
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except DynamicOutputShapeException as error:
            raise AssertionError(f"{func} waits for the GPU") from error
        except DataDependentOutputException:
            self.waits.append(str(func))
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name in ("_to_copy", "copy_"):
            self._note_copy(func, out, args, kwargs)
        return out

    def _on_the_cpu(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name in ("pin_memory", "_pin_memory"):
            return self.pin(args[0].clone())
        return self._is_pinned(args[0]) if name == "is_pinned" else func(*args, **kwargs)

    def pin(self, tensor: Tensor) -> Tensor:
        """Have this tensor of the CPU lie where a copy to the GPU may go on in the background."""
        self._pinned.append(tensor)  # kept, so that no other takes its place
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage().data_ptr()
        return any(place == other.untyped_storage().data_ptr() for other in self._pinned)

    def _note_copy(self, func: Any, out: Tensor, args: Any, kwargs: Any) -> None:
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        if source.device.type == out.device.type:
            return
        behind = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        goes_on = {**behind, **kwargs}.get("non_blocking", False)
        if goes_on and _on_gpu(source):
            self.read_backs += 1
        elif not goes_on or not self._is_pinned(source):
            self.waits.append(f"{func} of {tuple(source.shape)}")


def _on_gpu(value: Any) -> bool:
    device = value.device if isinstance(value, Tensor) else value
    return isinstance(device, torch.device) and device.type == "cuda"


class _Functions(TorchFunctionMode):
    """Functions of torch that no dispatcher sees: `torch.tensor` on a GPU, `deepcopy`, and backward passes."""

    def __init__(self, trained: list[nn.Module]) -> None:
        super().__init__()
        self.trained = trained

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if func is Tensor.backward:
            return self._backward(args[0])
        if func is Tensor.__deepcopy__ and _on_gpu(args[0]):
            tensor, memo = args
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = copy = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
            return copy
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """Torch's engine needs a real device, so every parameter gets some gradient."""
        assert loss.requires_grad
        for module in self.trained:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)


@contextmanager
def fake_gpu(patch: pytest.MonkeyPatch, *trained: nn.Module) -> Iterator[FakeGpu]:
    """Everything in the block may use `GPU`; backward passes give the parameters of `trained` gradients of zeros."""
    gpu = FakeGpu()
    with patch.context() as autocast:
        # autocast asks for both
        autocast.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        autocast.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        # beside a mode that fakes, torch does not look for a GPU
        with FakeTensorMode(allow_non_fake_inputs=True), _Functions(list(trained)), gpu:
            yield gpu
