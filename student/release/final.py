"""The finished student as a folder of plain files: weights, config, tokenizer."""

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
    """Put `final/`: weights in the dtype that they were trained in. Every rank must call it; one writes."""
    if not (group.leads or is_sharded(model)):
        return
    merge_lora(model)
    weights = {name: gather_full(value) for name, value in _once(model).items()}
    if not group.leads:
        return
    with tempfile.TemporaryDirectory(prefix="stillhouse-final-") as folder:
        model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
        for file in sorted(Path(folder).iterdir()):
            store.put(f"{FINAL}/{file.name}", file.read_bytes())
            fault_point("mid_final", steps, group.rank)
    for path in cache.store.list(TOKENIZER):
        store.put(f"{FINAL}/{Path(path).name}", cache.store.read(path))


def _once(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the model holds, tied weights under one of their names."""
    seen: dict[int, str] = {}
    kept = model.state_dict(keep_vars=True)
    return {name: value for name, value in kept.items() if seen.setdefault(id(value), name) == name}


def merge_lora(model: nn.Module) -> None:
    """Add low-rank additions into the weights that they belong to, and take them out of the model."""
    adapters = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name, adapter in adapters:
        adapter.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.get_base_layer())


@contextmanager
def local_final(store: Store) -> Iterator[Path]:
    """`final/` as a local folder: itself, or a copy for as long as the block runs."""
    local = store.local_path()
    if local is not None:
        yield local / FINAL
        return
    with tempfile.TemporaryDirectory(prefix="stillhouse-final-") as folder:
        for path in store.list(FINAL):
            Path(folder, Path(path).name).write_bytes(store.read(path))
        yield Path(folder)


def load_final(store: Store) -> PreTrainedModel:
    """The trained student, in evaluation mode. Raises ModelError, StorageError."""
    with local_final(store) as folder:
        model = load_model(folder)
    model.eval()
    return model
