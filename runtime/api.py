"""The runtime's public functions: ``read`` a file or ``capture`` a module into a Program, and ``compile`` it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusegen.runtime.compile import compile as compile
    from fusegen.runtime.read import read as read
    from fusegen.runtime.read.capture import capture as capture

# Each is imported when first used: a process that only reads a bundle need not load torch.export.
_HOME = {
    "read": "fusegen.runtime.read",
    "capture": "fusegen.runtime.read.capture",
    "compile": "fusegen.runtime.compile",
}
__all__ = ["capture", "compile", "read"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
