"""Loads every op, then the kernels this machine can run.

An op is any ``kernels/<op>.py`` (long lists may stand in ``<op>_cases.py`` and ``<op>_spellings.py``); its kernels are
the files of the same stem in ``cpu/`` and ``gpu/``, each with one ``KERNELS`` list.  Nothing is listed by hand.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path

import torch

_HERE = Path(__file__).parent
GPU = _HERE / "gpu"
NOT_OPS = {"__init__", "op", "catalogue", "channel_moments", "draw", "kv_cache", "onednn", "rows", "strides"}


def names() -> tuple[str, ...]:
    """The stems of the op files, sorted."""
    stems = (p.stem for p in _HERE.glob("*.py"))
    return tuple(sorted(s for s in stems if s not in NOT_OPS and not s.endswith(("_cases", "_spellings"))))


def triton_names() -> tuple[str, ...]:
    """The ops that have a Triton kernel, whether or not this machine can run it."""
    return tuple(name for name in names() if (GPU / f"{name}.py").exists())


@functools.cache
def load() -> None:
    """Import each op's module (it registers itself), then append its kernels.

    The CPU kernels need the compiled library, the Triton ones a GPU or the interpreter; ``fusegen doctor`` says what
    is missing.
    """
    from fusegen.kernels import op as registry
    from fusegen.kernels.cpu import library

    folders = []
    if library.available():
        folders.append("cpu")
    if importlib.util.find_spec("triton") and torch.cuda.is_available():
        folders.append("gpu")
    for name in names():
        op = importlib.import_module(f"fusegen.kernels.{name}").OP
        assert registry._OPS[op.name] is op
        for folder in folders:
            if (_HERE / folder / f"{name}.py").exists():
                op.kernels.extend(importlib.import_module(f"fusegen.kernels.{folder}.{name}").KERNELS)
