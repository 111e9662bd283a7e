"""Triton kernels bound to their arguments.

An op's kernel is a tuple of :class:`Stage`: a Triton function, a grid and values by parameter name.  The same stages
run on a GPU, run under Triton's interpreter, and are compiled for a GPU that is not there (:mod:`.compile`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fusegen.kernels.op import Launch

ALIGNMENT = 16  # bytes; what Triton specialises pointers on, and the widest load a thread can do


# (name, arguments as meta tensors in schema order): what a kernel's ``specimens()`` yields, see compile.py.
Named = tuple[str, Callable[[], tuple[Any, ...]]]


@dataclass(frozen=True)
class Use:
    """Stands for the op's positional argument ``index`` among a stage's values."""

    index: int


@dataclass(frozen=True)
class Stage:
    """One launch: ``values`` are every parameter of ``fn`` by name, constants included, in any order."""

    fn: Any
    grid: tuple[int, ...]
    values: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def positional(self, args: Sequence[Any]) -> list[Any]:
        """The values in parameter order, with every :class:`Use` replaced by the argument it stands for."""
        if missing := set(self.fn.arg_names) ^ set(self.values):
            raise TypeError(f"{self.fn.__name__}: parameters and values differ in {sorted(missing)}")
        picked = (self.values[name] for name in self.fn.arg_names)
        return [args[v.index] if isinstance(v, Use) else v for v in picked]


class _Bound:
    """One stage with its tensors; keeps the compiled kernel, which Triton can launch several times as fast."""

    def __init__(self, stage: Stage, args: Sequence[Any]):
        self.stage, self.values, self.runner = stage, stage.positional(args), None
        names = stage.fn.arg_names
        self.places: dict[int, list[int]] = {}
        for position, name in enumerate(names):
            if isinstance(stage.values[name], Use):
                self.places.setdefault(stage.values[name].index, []).append(position)

    def prepare(self) -> None:
        """Compile and load for these values, so that the first ``run`` is as fast as the rest."""
        if isinstance(self.stage.fn, JITFunction):
            kernel = self.stage.fn.warmup(*self.values, grid=self.stage.grid, **self.stage.options)
            self.runner = kernel[self.stage.grid]

    def run(self) -> None:
        if self.runner is not None:
            self.runner(*self.values)
        else:
            self.stage.fn[self.stage.grid](*self.values, **self.stage.options)


class TritonLaunch(Launch):
    """Stages run in order on the current stream of the arguments' device."""

    def __init__(self, args: Sequence[Any], stages: Sequence[Stage]):
        full = [s for s in stages if all(s.grid)]  # an empty output needs no launch
        grids = [(*s.grid, 1, 1)[:3] for s in full]
        self._bound = [_Bound(Stage(s.fn, g, s.values, s.options), args) for s, g in zip(full, grids, strict=True)]
        self._device = next(a.device for a in args if isinstance(a, Tensor))
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                for bound in self._bound:
                    bound.prepare()

    def run(self) -> None:
        if self._device.type != "cuda" or torch.cuda.current_device() == self._device.index:
            for bound in self._bound:
                bound.run()
        else:
            with torch.cuda.device(self._device):
                for bound in self._bound:
                    bound.run()

    def move(self, index: int, tensor: Tensor) -> None:
        for bound in self._bound:
            for position in bound.places.get(index, ()):
                old, bound.values[position] = bound.values[position], tensor
                if _aligned(old) != _aligned(tensor) and bound.runner is not None:
                    bound.prepare()  # compiled for the other alignment


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def unit(dtype_bytes: int, *strides: int) -> int:
    """The largest power of two that divides all ``strides`` (in elements), at most :data:`ALIGNMENT` bytes' worth.

    Kernels take strides divided by it and multiply by it again as a constant: Triton then knows that rows start on
    wide boundaries, which it cannot see from a stride such as 40 (it only specialises on multiples of 16 elements).
    """
    size = ALIGNMENT // dtype_bytes
    while size > 1 and any(s % size for s in strides):
        size //= 2
    return size


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data, for specimens to be compiled."""
    return torch.empty(shape, dtype=dtype, device="meta")


SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # dtypes as specimens' names have them


def power(n: int) -> int:
    """The least power of two not below ``n`` (at least 1)."""
    return int(triton.next_power_of_2(max(n, 1)))


def blocks(n: int, size: int) -> int:
    """How many blocks of ``size`` cover ``n``."""
    return -(-n // size)
