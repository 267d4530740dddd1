"""Checkpointed state of a training: collected from model and optimizer, and loaded back into them."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.cache.storage.store import Store
from pipeline.errors import TrainingError
from student.loop.checkpoint import LatestCheckpoint, Snapshot, load_latest, load_step
from student.loop.distiller import Distiller
from student.loop.worker_group import WorkerGroup, distribute_like, gather_full, is_sharded

logger = logging.getLogger(__name__)


def load_latest_on_all_ranks(store: Store, group: WorkerGroup) -> Snapshot | None:
    """Load the latest checkpoint of rank 0 on every rank; rank 0 logs a warning for each that it skips.

    Collective. Raises TrainingError on a rank that reads other content for the same checkpoint.
    """
    latest = load_latest(store) if group.is_main_process else LatestCheckpoint(None, ())
    for warning in latest.warnings:
        logger.warning("%s", warning)
    step = None if latest.snapshot is None else latest.snapshot.step
    step, sha256 = group.all_gather((step, latest.marker_sha256))[0]
    return latest.snapshot if group.is_main_process or step is None else load_step(store, step, sha256)


def collect_state_dicts(
    distiller: Distiller, optimizer: torch.optim.Optimizer, group: WorkerGroup
) -> dict[str, dict[str, Tensor]] | None:
    """Copy trained parameters, buffers and optimizer state to the CPU. Collective; None where only rank 0 copies."""
    if not (group.is_main_process or is_sharded(distiller)):
        return None
    names = {id(parameter): name for name, parameter in distiller.named_parameters()}
    optimizer_state = {
        f"{slot}/{names[id(parameter)]}": gather_full(value)
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }
    return {
        "model": {name: gather_full(value) for name, value in _trained_state(distiller.student).items()},
        "projections": {name: gather_full(value) for name, value in _trained_state(distiller.projections).items()},
        "optimizer": optimizer_state,
    }


def load_state_dicts(distiller: Distiller, optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    """Load a snapshot into model, projections and optimizer. Raises TrainingError if its parameters are others."""
    for key, module in (("model", distiller.student), ("projections", distiller.projections)):
        _load_tensors(_trained_state(module), snapshot.state_dicts.get(key, {}), snapshot.step)
    parameters = dict(distiller.named_parameters())
    optimizer.state.clear()
    for key, value in snapshot.state_dicts.get("optimizer", {}).items():
        slot, _, name = key.partition("/")
        parameter = parameters[name]
        if slot == "step":  # AdamW keeps step counts on the parameters' device only if it is fused
            device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.state[parameter][slot] = value.to(device, copy=True)
        else:
            optimizer.state[parameter][slot] = distribute_like(parameter, value.clone())


def _trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    persistent = module.state_dict(keep_vars=True)
    return trained | {name: buffer for name, buffer in module.named_buffers() if name in persistent}


@torch.no_grad()
def _load_tensors(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], step: int) -> None:
    if different := sorted(set(targets) ^ set(values)):
        where = "the checkpoint" if different[0] in values else "the student"
        raise TrainingError(f"checkpoint of step {step}: expected equal names, got {different[0]} in {where} only")
    for name, target in targets.items():
        target.copy_(distribute_like(target, values[name]))
