"""Part 5, second half: the KD step of `training` compiled by torch.compile, beside the same step uncompiled.

A process of its own, since compiling may take most of its limit. At tiny sizes the graph is traced, but not compiled
(backend `eager`): that would take minutes on a CPU, and a test of the training job does it.
"""

import gc
import tempfile
import time
from pathlib import Path

from gpu.made_up_cache import write_cache
from gpu.records import Records
from gpu.training import FULL, TINY_SIZES, Trainer, record, training_spec


def run(records: Records, tiny: bool) -> None:
    """Measure the uncompiled step, then compile and measure again."""
    sizes = TINY_SIZES if tiny else FULL
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder, records.guard("torch.compile"):
        reader = write_cache(Path(folder), sizes.shape, sizes.sequences, sizes.sequence_length, sizes.k)
        trainer = Trainer(reader, sizes, training_spec(sizes))
        plain = trainer.steps("kd", sizes.steps)
        del trainer
        gc.collect()  # its weights and optimizer take half of the memory
        trainer = Trainer(reader, sizes, training_spec(sizes, compile_=True))
        if tiny:
            trainer.student.model.base_model.compile(dynamic=True, backend="eager")  # replaces that of `prepare`
        start_s = time.perf_counter()
        trainer.steps("kd", 1)
        compiling_s = time.perf_counter() - start_s
        compiled = trainer.steps("kd", sizes.steps)
        record(records, sizes, "torch.compile", {"kd": compiled}, trainer.peak_bytes, beside=plain, to="uncompiled")
        records.figure("torch.compile", "first two steps", ms=1000 * compiling_s, note="compiling included")
