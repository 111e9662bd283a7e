"""Backends: where a static program's nodes run.  A backend is a file in this folder with one ``BACKEND``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from fusegen.runtime.backends.base import Backend
from fusegen.runtime.errors import RequestError

_NOT_BACKENDS = {"__init__", "aten", "base", "batch", "binding", "lower", "onednn", "onednn_int8", "plain"}


def names() -> tuple[str, ...]:
    """The backends there are."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NOT_BACKENDS))


def get(name: str) -> Backend:
    """The backend of that name.  Raises :class:`RequestError` where there is none, or this machine cannot run it."""
    if name not in names():
        raise RequestError(f"no backend is called {name!r}", mend=f"use one of {', '.join(names())}")
    backend = cast(Backend, importlib.import_module(f"fusegen.runtime.backends.{name}").BACKEND)
    backend.check()
    return backend
