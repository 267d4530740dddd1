"""Pauses the garbage collector during heavy imports."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector while torch, transformers or vllm is imported (saves about 1 s).

    They create up to a million permanent objects, and the collector would scan them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
