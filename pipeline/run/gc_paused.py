"""How the heavy libraries are imported where a job needs them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Garbage is not looked for meanwhile.

    For imports of torch, transformers and vllm: they make up to a million objects that stay, and Python would go
    through all of them time and again while their number grows.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
