"""Compile many configurations at once, in processes of their own, into Triton's cache on disk.

A launch of the same specialisation then loads in milliseconds what would take it a second or two, one after another.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A tensor without its data, to be sent to another process."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def meta(self) -> Tensor:
        return torch.empty_strided(self.size, self.strides, dtype=self.dtype, device="meta")


def _describe(value: Any) -> Any:
    return Shape(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def compile_one(op: str, given: Sequence[Any], config: Any, arch: int) -> str:
    """Compile one configuration (None: the op has no choice) for these arguments; empty, or why it did not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fusegen.kernels.gpu.compile import source

    module, spec = (importlib.import_module(f"fusegen.kernels.{folder}{op}") for folder in ("gpu.", ""))
    args = tuple(g.meta() if isinstance(g, Shape) else g for g in given)
    try:
        for stage in module.stages(spec.OP.allocate(*args), args, *([] if config is None else [config])):
            triton.compile(source(stage, args), GPUTarget("cuda", arch, 32), options=dict(stage.options))
    except Exception as error:  # the caller meets the same error when it launches, and says so there
        return f"{op}: {type(error).__name__}: {error}".splitlines()[0]
    return ""


_POOL: list[ProcessPoolExecutor] = []


def warm(jobs: Iterable[tuple[str, Sequence[Any], Any]], arch: int | None = None) -> list[str]:
    """Compile ``jobs`` (op, arguments, configuration), for this machine's GPU unless ``arch`` says another."""
    if arch is None:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    if not _POOL:  # spawned, not forked: a forked process cannot use CUDA, and must not touch its parent's
        _POOL.append(ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")))
    futures = [
        _POOL[0].submit(compile_one, op, [_describe(a) for a in args], config, arch) for op, args, config in jobs
    ]
    return [f.result() for f in futures]
