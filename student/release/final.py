"""The trained student as a model folder: weights, config, tokenizer."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.layout import TOKENIZER
from pipeline.cache.storage.store import Store
from student.loop.fault_points import fault_point
from student.loop.worker_group import WorkerGroup, gather_full, is_sharded
from student.model.build import load_model
from student.training_job import FINAL

SHARD_SIZE = "2GB"


def write_final(store: Store, model: PreTrainedModel, cache: CacheReader, group: WorkerGroup, steps: int) -> None:
    """Write `final/` with the weights in their training dtype. Collective; rank 0 writes."""
    if not (group.is_main_process or is_sharded(model)):
        return
    merge_lora(model)
    weights = {name: gather_full(value) for name, value in _untied_state_dict(model).items()}
    if not group.is_main_process:
        return
    with tempfile.TemporaryDirectory(prefix="stillhouse-final-") as folder:
        model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
        for file in sorted(Path(folder).iterdir()):
            store.put(f"{FINAL}/{file.name}", file.read_bytes())
            fault_point("mid_final", steps, group.rank)
    for path in cache.store.list(TOKENIZER):
        store.put(f"{FINAL}/{Path(path).name}", cache.store.read(path))


def _untied_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with tied weights under the first of their names only."""
    first_name: dict[int, str] = {}
    state_dict = model.state_dict(keep_vars=True)
    return {name: value for name, value in state_dict.items() if first_name.setdefault(id(value), name) == name}


def merge_lora(model: nn.Module) -> None:
    """Merge LoRA adapters into their base layers and remove them from the model."""
    adapters = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name, adapter in adapters:
        adapter.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.get_base_layer())


@contextmanager
def local_final(store: Store) -> Iterator[Path]:
    """`final/` as a local folder: the folder itself, or a temporary download."""
    local = store.local_path()
    if local is not None:
        yield local / FINAL
        return
    with tempfile.TemporaryDirectory(prefix="stillhouse-final-") as folder:
        for path in store.list(FINAL):
            Path(folder, Path(path).name).write_bytes(store.read(path))
        yield Path(folder)


def load_final(store: Store) -> PreTrainedModel:
    """Load the trained student, in evaluation mode. Raises ModelError, StorageError."""
    with local_final(store) as folder:
        model = load_model(folder)
    model.eval()
    return model
