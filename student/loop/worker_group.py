"""The process group of a training: collectives, and DDP or FSDP2 around a module. One process needs neither."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainingSpec

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Rank of this process, world size and device. With a world size of 1 no collective is called."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes logs and checkpoints."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; `values` may be overwritten."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def all_gather(self, value: Value) -> list[Value]:
        """The picklable value of every rank, on every rank."""
        gathered = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world_size > 1:
            dist.barrier()

    def parallelize(self, module: nn.Module, parallel: str, blocks: nn.ModuleList) -> nn.Module:
        """Wrap the module so that gradients are averaged over ranks: replicated (`ddp`) or sharded (`fsdp2`).

        `fsdp2` makes each of `blocks` a communication group of its own.
        """
        if self.world_size == 1:
            return module
        if parallel == "ddp":
            on_gpu = self.device.type == "cuda"
            return DistributedDataParallel(module, device_ids=[self.device] if on_gpu else None)
        for block in blocks:
            fully_shard(block)
        fully_shard(module)
        return module


def default_device(training: TrainingSpec) -> torch.device:
    """Device of a process outside Ray Train: its GPU if it has one and `training.gpus_per_worker` is not 0."""
    on_gpu = training.gpus_per_worker != 0 and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@contextmanager
def no_grad_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Accumulate gradients on this rank without communication, if `enabled`: all but a step's last backward pass."""
    if isinstance(module, DistributedDataParallel) and enabled:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not enabled)
    yield


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter is sharded over ranks (a DTensor)."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather_full(tensor: Tensor) -> Tensor:
    """Copy a parameter or optimizer state to a full CPU tensor. Collective for a DTensor: every rank must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True).contiguous()


def distribute_like(target: Tensor, values: Tensor) -> Tensor:
    """The full tensor on the device of `target`, sharded like it."""
    values = values.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(values, target.device_mesh, target.placements)
    return values
