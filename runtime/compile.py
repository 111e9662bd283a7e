"""``compile``: from a program to a session."""

from __future__ import annotations

import platform
from collections.abc import Collection
from pathlib import Path

import torch

from fusegen.kernels import op as registry
from fusegen.kernels.onednn import serves
from fusegen.runtime import backends
from fusegen.runtime.backends.base import Backend
from fusegen.runtime.engine import Session
from fusegen.runtime.errors import RequestError
from fusegen.runtime.prepared import Prepared
from fusegen.runtime.program import Program
from fusegen.runtime.quantize import described
from fusegen.runtime.quantize import quantize as quantized
from fusegen.runtime.rewrite import rewrite
from fusegen.runtime.rewrite.cast import cast

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"  # the device's best
NO_BFLOAT16 = "this CPU has no bfloat16 instructions"


def compile(
    program: Program,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    deterministic: bool = False,
    quantize: str | None = None,
    without: Collection[str] = (),
    cache: str | Path | None = None,
) -> Session:
    """Rewrite ``program`` and make it a :class:`~fusegen.runtime.engine.Session`.

    ``device``: ``"cpu"`` or ``"cuda"``; ``backend``: ``"cpu"``, ``"cuda"``, or ``"eager"``, the reference; the
    default is the device's own.  ``dtype`` (a ``torch.dtype`` or its name): what the network computes in; None keeps
    the program's own, but for float16 on a CPU without such arithmetic, and ``"auto"`` is :func:`default_dtype`.
    ``deterministic``: a sample's bits depend on nothing else in its batch, or planning raises :class:`GraphError` with
    the node that cannot promise it.  ``quantize``: ``"int8"`` for int8 weights and products in the layers that pay
    (:mod:`fusegen.runtime.quantize`; a bundle that ``fusegen quantize`` wrote has them already).  ``without``: ops
    (``kernels/<op>.py``) whose kernels are left alone, for less memory (``winograd_conv2d``, whose filters in float32
    are larger than the weights) or to find the one that is at fault.  ``cache``: a folder that keeps what a CPU session
    makes of a file's weights for the next start (:class:`Prepared`).  Raises :class:`RequestError` for what is unknown.
    """
    if device not in ("cpu", "cuda"):
        raise RequestError(f"no device is called {device!r}", mend="use 'cpu' or 'cuda'")
    chosen = backends.get(backend or device)
    if chosen.device != device:
        raise RequestError(f"the backend {chosen.name!r} runs on {chosen.device}, not on {device}")
    for name in without:
        if name not in registry.ops():
            raise RequestError(f"no op is called {name!r}", mend=f"there are {', '.join(sorted(registry.ops()))}")
    prepared = _prepared(cache, chosen)
    if quantize is not None:
        program = quantized(program, quantize)
    wanted, notes = _dtype(program, dtype, device)
    notes += tuple(n for n in (described(program),) if n)
    if chosen.fuses:
        program = rewrite(program, wanted)
    elif wanted is not None:
        program = cast(program, wanted)[0]
    return Session(program, chosen, deterministic, notes=notes, without=frozenset(without), prepared=prepared)


def _prepared(cache: str | Path | None, backend: Backend) -> Prepared | None:
    if cache is not None and backend.name != "cpu":
        raise RequestError(f"the backend {backend.name!r} prepares no weights", "cache", "leave it out")
    return None if cache is None else Prepared(cache)


def _dtype(
    program: Program, dtype: torch.dtype | str | None, device: str
) -> tuple[torch.dtype | None, tuple[str, ...]]:
    """The dtype to compute in, and what to tell the caller of the choice."""
    if dtype == AUTO:
        best = default_dtype(device)
        slow = device == "cpu" and best is torch.float32
        return best, (f"computes in float32: {NO_BFLOAT16}",) if slow else ()
    wanted = FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in FLOATS.values():
        raise RequestError(f"dtype {dtype!r} is not offered", mend=f"use one of {', '.join(FLOATS)}, {AUTO}")
    own = any(w.dtype == torch.float16 for w in program.weights.values())
    if device == "cpu" and (wanted is torch.float16 or (wanted is None and own)) and not native("float16"):
        better = torch.bfloat16 if native("bfloat16") else torch.float32
        name = str(better).removeprefix("torch.")
        return better, (f"computes in {name}: this CPU has no float16 arithmetic",)
    return wanted, ()


def default_dtype(device: str) -> torch.dtype:
    """What a network computes in unless told: bfloat16 where the device has such arithmetic, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if native("bfloat16") else torch.float32


def native(dtype: str) -> bool:
    """Whether this CPU has instructions for matrix products of ``"float16"`` or ``"bfloat16"``.

    oneDNN takes bfloat16 on any x86 CPU with AVX-512; one without such products widens it, slower than float32.
    """
    if dtype == "float16":
        return serves(torch.float16)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    missing = x86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return not missing and serves(torch.bfloat16)
