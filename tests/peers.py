"""Classes of diffusers and transformers, as oracles.

Both ask whether a package called ``kernels`` is installed.  Run from the checkout's root, Python would show them our
folder of that name, which refuses to be imported so: the root is taken off the path (fusegen is imported already, and
finds its layers by its own ``__path__``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


def diffusers() -> Any:
    """The package ``diffusers``."""
    _leave_root()
    import diffusers

    return diffusers


def transformers() -> Any:
    """The package ``transformers``."""
    _leave_root()
    import transformers

    return transformers


def _leave_root() -> None:
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]
