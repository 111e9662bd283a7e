"""fusegen: exported generative models, run by fused kernels.

``import fusegen`` is cheap: PyTorch is imported with the first name that needs it.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the layers stand beside this folder; in a wheel they stand inside it.  Adding the checkout's root keeps
# ``import fusegen.kernels`` true to these files even when a wheel is installed elsewhere on the path.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "kernels" / "op.py").exists() and (_ROOT / "runtime" / "program.py").exists():
    __path__ = [str(_Path(__file__).parent), str(_ROOT)]

if TYPE_CHECKING:
    from fusegen.models.load import load as load
    from fusegen.models.load import save as save
    from fusegen.runtime.api import capture as capture
    from fusegen.runtime.api import compile as compile
    from fusegen.runtime.api import read as read
    from fusegen.runtime.errors import Error as Error

_LAZY = {
    "load": "fusegen.models.load",
    "save": "fusegen.models.load",
    "read": "fusegen.runtime.api",
    "capture": "fusegen.runtime.api",
    "compile": "fusegen.runtime.api",
    "Error": "fusegen.runtime.errors",
}
__all__ = ["Error", "capture", "compile", "load", "read", "save"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fusegen' has no attribute {name!r}; it has {', '.join(sorted(_LAZY))}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
