"""Importing vLLM or DeepSpeed takes many seconds of every process's start; up to a fifth of them goes here."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Without garbage collections, which look again and again at modules that stay. Wrap imports only: nothing else is
    freed meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
