"""Part `compiled`: the KD step of `training` under torch.compile, compared with the same step without it.

A part with a time limit of its own, since compilation may take most of it. At tiny sizes the graph is traced and not
compiled (backend `eager`): compilation takes minutes on a CPU, and a test of the training job covers it.
"""

import gc
import tempfile
import time
from pathlib import Path

from gpu.records import Records
from gpu.synthetic_cache import write_synthetic_cache
from gpu.training import FULL, TINY_SIZES, Trainer, record, training_spec


def run(records: Records, tiny: bool) -> None:
    """Measure the step without torch.compile, then compile it and measure again."""
    sizes = TINY_SIZES if tiny else FULL
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder, records.catch_failure("torch.compile"):
        reader = write_synthetic_cache(Path(folder), sizes.shape, sizes.sequences, sizes.sequence_length, sizes.k)
        trainer = Trainer(reader, sizes, training_spec(sizes))
        uncompiled = trainer.steps("kd", sizes.steps)
        del trainer
        gc.collect()  # frees its weights and optimizer, half of the memory
        trainer = Trainer(reader, sizes, training_spec(sizes, compile_=True))
        if tiny:  # replaces the backend that `prepare_for_training` has chosen
            trainer.student.model.base_model.compile(dynamic=True, backend="eager")
        start_s = time.perf_counter()
        trainer.steps("kd", 1)
        compilation_s = time.perf_counter() - start_s
        compiled = trainer.steps("kd", sizes.steps)
        peak_bytes = trainer.peak_bytes
        record(records, sizes, "torch.compile", "kd", compiled, peak_bytes, baseline=uncompiled, to="uncompiled")
        records.figure("torch.compile", "first two steps", ms=1000 * compilation_s, note="with compilation")
