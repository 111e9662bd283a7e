"""Python's garbage collector at rest while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """No collection meanwhile: planning makes hundreds of thousands of objects, none of them garbage, and a collection
    every few thousand walks all that PyTorch has loaded, a second of a U-Net's start."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
