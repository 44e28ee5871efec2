"""A GPU without one: its tensors are fake, tensors of the CPU are real, and whatever waits for the GPU is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)


class FakeGpu(TorchDispatchMode):
    """Operators run on fake tensors where the GPU has a part in them; one whose shape depends on values fails.

    Attributes:
        waits: operators that made the CPU wait: copies that block, and what reads a value, which then is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: list[Tensor] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(_on_gpu(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        if _copies(func) and not self._in_background(func, args, kwargs):
            self.waits.append(f"{func} of {tuple(args[0].shape)}")
        if func is torch.ops.aten._fused_sgd_.default:
            return None  # works in place, and has no fake form
        try:
            with self._fake:
                return func(*args, **kwargs)
        except DynamicOutputShapeException as error:
            raise AssertionError(f"{func} waits for the GPU") from error
        except DataDependentOutputException:
            self.waits.append(str(func))
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1

    def pin(self, tensor: Tensor) -> Tensor:
        """Have this tensor of the CPU lie where a copy to the GPU may go on in the background."""
        self._pinned.append(tensor)  # kept, so that no other takes its place
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage().data_ptr()
        return any(place == other.untyped_storage().data_ptr() for other in self._pinned)

    def _in_background(self, func: Any, args: Any, kwargs: Any) -> bool:
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        target = args[0] if func is torch.ops.aten.copy_.default else kwargs.get("device")
        if _on_gpu(source):
            return target is None or _on_gpu(target)
        blocking = not (args[2:] or [kwargs.get("non_blocking")])[0]
        return not _on_gpu(target) or (not blocking and self._is_pinned(source))


def _copies(func: Any) -> bool:
    return func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def _on_gpu(value: Any) -> bool:
    device = value.device if isinstance(value, Tensor) else value
    return isinstance(device, torch.device) and device.type == "cuda"


class _Functions(TorchFunctionMode):
    """Functions of torch that no dispatcher sees: `torch.tensor` on a GPU, a copy that blocks, and `deepcopy`."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if func is Tensor.__deepcopy__ and _on_gpu(args[0]):
            tensor, memo = args
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = copy = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
            return copy
        return func(*args, **kwargs)


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: ARG001
    """`nn.Module._apply` for fake tensors, whose places cannot be swapped."""
    for child in module.children():
        _apply(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _gradients_of(parameters: list[nn.Parameter]) -> Callable[..., None]:
    """`Tensor.backward`: torch's engine needs a real device, so every parameter gets some gradient."""

    def backward(loss: Tensor, **_: Any) -> None:
        assert loss.requires_grad
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    return backward


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Everything in the block may use `GPU`."""
    gpu = FakeGpu()

    if torch.cuda.is_available():
        torch.cuda.init()  # or torch would believe in the initialisation that is left out below
    with (
        FakeTensorMode(),
        mock.patch("torch.cuda._lazy_init"),
    ):
        torch.empty((), device=GPU)
    with (
        mock.patch("torch.cuda._lazy_init"),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: gpu.pin(tensor.clone())),
        mock.patch("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        _Functions(gpu),
        gpu,
    ):
        yield gpu


@contextmanager
def fake_backward(module: nn.Module) -> Iterator[None]:
    """Backward passes in the block give every parameter of the module a gradient of zeros."""
    with mock.patch.object(Tensor, "backward", _gradients_of(list(module.parameters()))):
        yield
