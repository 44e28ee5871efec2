"""One process or many: rank and device of this process, sums over all of them, and models divided between them.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process and everything here is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigError

Shard = Literal["ddp", "fsdp"]


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


@contextmanager
def join_processes(device: str | torch.device | None = None) -> Iterator[Process]:
    """Meet the other processes that torchrun started, for as long as the block lasts.

    Args:
        device: where to compute; default: the GPU of this process if there is one, else the CPU.

    NCCL connects GPUs, gloo CPUs. A process group that the caller has set up is used and left standing.
    Raises: ConfigError: more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world > 1 else 0  # some schedulers set a rank where there is one process
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"process {local_rank} has no GPU {index}: there are {torch.cuda.device_count()} here")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    ours = world > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(rank, world, chosen)
    finally:
        if ours:
            dist.destroy_process_group()


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
