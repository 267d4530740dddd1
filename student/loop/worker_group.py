"""The workers that train one student together, as the rest of this wing sees them: a rank among several, or alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainingSpec


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """One process among the `world` that train. With one of them no collective is ever called."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on each of them."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def from_leader(self, values: Tensor) -> Tensor:
        """The leading rank's values, on every rank; the others pass a tensor of the same kind."""
        if self.world > 1:
            values = values.to(self.device)
            dist.broadcast(values, 0)
        return values.cpu()

    def wait_for_all(self) -> None:
        """Return once every rank is here."""
        if self.world > 1:
            dist.barrier()

    def parallelize(self, module: nn.Module, parallel: str, blocks: nn.ModuleList) -> nn.Module:
        """The module with gradients averaged over ranks: every rank holds it whole (`ddp`) or a part (`fsdp2`)."""
        if self.world == 1:
            return module
        if parallel == "ddp":
            on_gpu = self.device.type == "cuda"
            return DistributedDataParallel(module, device_ids=[self.device] if on_gpu else None)
        for block in blocks:
            fully_shard(block)
        fully_shard(module)
        return module


def own_device(training: TrainingSpec) -> torch.device:
    """Where a process computes that is no worker of a cluster: on its GPU, unless the recipe says none."""
    on_gpu = training.gpus_per_worker != 0 and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@contextmanager
def no_grad_sync(module: nn.Module, here: bool) -> Iterator[None]:
    """Inside, gradients are added up on this rank alone if `here`: for all but a step's last backward pass."""
    if isinstance(module, DistributedDataParallel) and here:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not here)
    yield


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter lies in parts on several ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather_full(tensor: Tensor) -> Tensor:
    """A plain CPU copy of a parameter or of its state, gathered from all ranks where it is in parts.

    Where it is, every rank must call this.
    """
    plain = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return plain.detach().to("cpu", copy=True).contiguous()


def load_full_(target: Tensor, values: Tensor) -> None:
    """Write a whole tensor into a parameter or its state, each rank its part."""
    with torch.no_grad():
        target.copy_(distribute_like(target, values))


def distribute_like(target: Tensor, values: Tensor) -> Tensor:
    """A whole tensor on the device of `target`, and in parts where `target` is."""
    values = values.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(values, target.device_mesh, target.placements)
    return values
