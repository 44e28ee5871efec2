"""One process or many: rank and device of this process, sums over all of them, and models divided between them.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process and everything here is a no-op.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigError, DeitModelsError, TrainingError, first_line, shown

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Shard = Literal["ddp", "fsdp"]
BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Features of processors that compute in bfloat16, by torch's names; the last is of Arm."""


@dataclass(frozen=True, slots=True)
class Process:
    """This process among its peers.

    Attributes:
        rank: 0 to world - 1; rank 0 writes files and logs.
        world: how many processes train together.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place; any shape."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; small ones that can be pickled."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait_for_all(self) -> None:
        """Return when every process has called this."""
        if self.world > 1:
            dist.barrier()


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 natively; emulation is up to ten times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not cpu_has(*BF16):
        return False
    # oneDNN multiplies the matrices; a build may lack it, and its own settings may keep it from using the processor
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_has(*features: str, known: Mapping[str, Any] | None = None) -> bool:
    """Whether the processor has one of these features, by torch's names; `known` stands in for its own."""
    known = torch.cpu.get_capabilities() if known is None else known
    return any(known.get(name, False) for name in features)


@contextmanager
def join_processes(device: str | torch.device | None = None) -> Iterator[Process]:
    """Meet the other processes that torchrun started, for as long as the block lasts.

    Args:
        device: where to compute; default: the GPU of this process if there is one, else the CPU.

    NCCL connects GPUs, gloo CPUs. A process group that the caller has set up is used and left standing. If the block
    fails in one process, the others leave it at their next exchange, with an error that names the failure.

    Raises: ConfigError: more processes than GPUs, or they cannot meet. TrainingError: another process has failed.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world > 1 else 0  # some schedulers set a rank where there is one process
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    process = Process(rank, world, _device(device, int(os.environ.get("LOCAL_RANK", rank))))
    if world == 1 or dist.is_initialized():
        yield process
        return
    board = _meet(process)
    try:
        yield process
        process.wait_for_all()
    except BaseException as error:
        first = _first_failure(board, process, error)
        # variables in the traceback, such as a distributed model, keep the connections open at which others wait
        clear_frames(error.__traceback__)
        if first is None:
            raise
        raise TrainingError(first) from error
    finally:
        dist.destroy_process_group()
        gc.collect()


def own_device(device: str | torch.device | None) -> str | torch.device | None:
    """Under torchrun this process's GPU in the place of "cuda"; any other device as it is."""
    if str(device) != "cuda" or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    return _device(device, int(os.environ.get("LOCAL_RANK", 0)))


def _device(wanted: str | torch.device | None, local_rank: int) -> torch.device:
    """Where this process computes. Raises: ConfigError: more processes than GPUs."""
    try:
        chosen = torch.device(wanted if wanted is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={shown(wanted)}; expected a name such as 'cpu', 'cuda' or 'cuda:1'") from error
    if chosen.type != "cuda":
        return chosen
    index = local_rank if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"process {local_rank} has no GPU {index}: there are {torch.cuda.device_count()} here")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@cache
def _store(address: str | None, port: str | None) -> Store:  # noqa: ARG001
    """The key-value store of all processes; kept open, because meetings are numbered in it."""
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


def _meet(process: Process) -> Store:
    """Set up the process group, and give the store of this meeting.

    Each meeting has names of its own in the store: torch's are those of the meeting before, and a process that is
    early would find the addresses of connections that are closed.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    try:
        store = _store(os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
        board = PrefixStore(f"meeting {store.add(f'meetings of {process.rank}', 1)}", store)
        backend = "nccl" if process.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=board, rank=process.rank, world_size=process.world)
    except (ValueError, RuntimeError) as error:
        text = f"process {process.rank} cannot meet the other {process.world - 1}: {first_line(error)}"
        raise ConfigError(f"{text}; start all of them with torchrun") from error
    process.wait_for_all()  # one that fails at once would leave the others waiting for its address
    return board


def _first_failure(board: Store, process: Process, error: BaseException) -> str | None:
    """Note a failure for the other processes; the reason in words if it follows from the failure of one of them."""
    follows = isinstance(error, RuntimeError) and not isinstance(error, DeitModelsError)
    lost = follows and any(sign in str(error) for sign in ("gloo", "NCCL", "Connection"))
    first = own = f"process {process.rank} failed: {type(error).__name__}: {first_line(error)}"
    with suppress(RuntimeError):  # the process that keeps the store may be gone
        if not lost:
            first = board.compare_set("failed", "", own).decode(errors="replace")
        elif board.check(["failed"]):
            first = board.get("failed").decode(errors="replace")
    if lost and first == own:
        return f"another process has ended without a message, perhaps for lack of memory ({first_line(error)})"
    return first if follows and first != own else None


def spread(module: nn.Module, process: Process, shard: Shard, *, unused: bool) -> nn.Module:
    """The module that exchanges gradients with its copies in the other processes; itself if there are none.

    Args:
        module: on its device already.
        process: this one.
        shard: "ddp": a whole copy in each process; "fsdp": parameters, gradients and optimiser state are divided
            between them, in place, block by block; for models that do not fit otherwise.
        unused: whether some parameters take no part in the loss.
    """
    if process.world == 1:
        return module
    if shard == "ddp":
        ids = [process.device.index] if process.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)
    shard_parameters(module)
    return module


def copy_from_first(module: nn.Module, process: Process) -> None:
    """In place: the weights and buffers of the first process, in all of them."""
    if process.world == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, 0)
        tensor.detach().copy_(whole)


def shard_parameters(module: nn.Module) -> None:
    """Divide a module's parameters between the processes, in place: each repeated block as one unit, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in _blocks(module):
        fully_shard(block)
    fully_shard(module)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of the outermost sequences and lists in a module, as far as they have parameters."""
    for child in module.children():
        if not isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _blocks(child)
            continue
        for block in child:
            if isinstance(block, (nn.ModuleList, nn.ModuleDict)):  # never called, so of no use as a unit
                yield from _blocks(block)
            elif next(block.parameters(), None) is not None:
                yield block
