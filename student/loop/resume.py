"""A training's state as tensors by name, out of the live objects and back into them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pipeline.cache.storage.store import Store
from pipeline.errors import TrainingError
from student.loop.checkpoint import Found, Snapshot, find_newest, load_exactly
from student.loop.distiller import Distiller
from student.loop.worker_group import WorkerGroup, distribute_like, gather_full, is_sharded, load_full_

Sections = dict[str, dict[str, Tensor]]


def agreed_snapshot(store: Store, group: WorkerGroup, say: Callable[[str], None]) -> Snapshot | None:
    """The newest whole checkpoint as the leading rank finds it, on every rank; what it passes over is said.

    Raises TrainingError on a rank that sees another checkpoint in its place.
    """
    found = find_newest(store) if group.leads else Found(None, ())
    for note in found.notes:
        say(note)
    step = -1 if found.snapshot is None else found.snapshot.step
    digest = bytes.fromhex(found.marker_sha256) or bytes(32)
    step, *said = group.from_leader(torch.tensor([step, *digest])).tolist()
    if group.leads or step < 0:
        return found.snapshot
    return load_exactly(store, step, bytes(said).hex())


def sections_of(distiller: Distiller, optimizer: torch.optim.Optimizer, group: WorkerGroup) -> Sections | None:
    """Everything that a training moves on, copied to the CPU for the leading rank. Every rank must call it."""
    if not (group.leads or is_sharded(distiller)):
        return None
    names = {id(parameter): name for name, parameter in distiller.named_parameters()}
    moments = {
        f"{slot}/{names[id(parameter)]}": gather_full(value)
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }
    return {
        "model": {name: gather_full(value) for name, value in _moving(distiller.student).items()},
        "projections": {name: gather_full(value) for name, value in _moving(distiller.projections).items()},
        "optimizer": moments,
    }


def restore(distiller: Distiller, optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    """Put a snapshot back. Raises TrainingError where it is of another student."""
    for section, module in (("model", distiller.student), ("projections", distiller.projections)):
        _fill(_moving(module), snapshot.sections.get(section, {}), snapshot.step)
    parameters = dict(distiller.named_parameters())
    optimizer.state.clear()
    for key, value in snapshot.sections.get("optimizer", {}).items():
        slot, _, name = key.partition("/")
        parameter = parameters[name]
        if slot == "step":  # counts lie beside the parameters only where the fused kernel reads them there
            device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.state[parameter][slot] = value.to(device, copy=True)
        else:
            optimizer.state[parameter][slot] = distribute_like(parameter, value.clone())


def _moving(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that are trained, and buffers that a checkpoint of the model would hold."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    kept = module.state_dict(keep_vars=True)
    return trained | {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _fill(into: Mapping[str, Tensor], values: Mapping[str, Tensor], step: int) -> None:
    if set(into) != set(values):
        odd = sorted(set(into) ^ set(values))[0]
        raise TrainingError(f"checkpoint of step {step}: expected the parameters of this student, {odd} does not match")
    for name, target in into.items():
        load_full_(target, values[name])
