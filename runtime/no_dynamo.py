"""Shape functions without importing PyTorch's compiler.

PyTorch's Python shape functions are wrapped so that its compiler leaves them alone, and at the first call the wrapper
imports that compiler (``torch._dynamo``, about two seconds, and onnx and onnxruntime with it where they are installed)
only to ask it for the mark.  A program that is never compiled by it need not wait for that.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAME = "torch._dynamo"


class _StandIn(types.ModuleType):
    """Answers ``disable`` with the function itself; whatever else is asked of it comes from the real module."""

    @staticmethod
    def disable(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        _withdraw(self)
        return getattr(importlib.import_module(_NAME), name)


def _withdraw(stand_in: _StandIn) -> None:
    if sys.modules.get(_NAME) is stand_in:
        del sys.modules[_NAME]
    if torch.__dict__.get("_dynamo") is stand_in:
        del torch.__dict__["_dynamo"]


@contextmanager
def no_dynamo() -> Iterator[None]:
    """Within, shape functions run without ``torch._dynamo``; if it is loaded already, nothing changes."""
    if _NAME in sys.modules:
        yield
        return
    stand_in = _StandIn(_NAME)
    sys.modules[_NAME] = stand_in
    torch.__dict__["_dynamo"] = stand_in
    try:
        yield
    finally:
        _withdraw(stand_in)
