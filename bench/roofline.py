"""The ceilings of this machine, measured in the run they are quoted in."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fusegen.bench.timing import once
from fusegen.kernels import onednn
from fusegen.kernels.op import Cost


@dataclass(frozen=True)
class Roofline:
    """``copy``: bytes a second, read plus written, far beyond the caches; ``read``: where they are only read.

    ``peak``: dtype name -> operations a second of the fastest matrix product found (int8 on CPUs only).
    """

    copy: float
    read: float
    peak: dict[str, float]

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """The least time the ceilings allow.  What is read beyond as much as is written goes by ``read``."""
        only_read = 0 if cost.written is None else max(0, cost.bytes - 2 * cost.written)
        memory = only_read / self.read + (cost.bytes - only_read) / self.copy
        name = str(dtype).removeprefix("torch.")
        peak = self.peak.get(cost.products) or self.peak.get(name, self.peak["float32"])
        return max(memory, cost.flops / peak)


def _best(call: Callable[[], object], repeats: int, device: str) -> float:
    call()
    return min(once(call, 1, device) for _ in range(repeats))


@dataclass(frozen=True)
class Stream:
    """A call that moves ``bytes`` through memory, far beyond the caches."""

    call: Callable[[], object]
    bytes: int


def copying(device: str = "cpu") -> Stream:
    """Reads as much as it writes."""
    count = 1 << (28 if device == "cuda" else 25)
    a = torch.empty(count, dtype=torch.float32, device=device).uniform_()
    b = torch.empty_like(a)
    return Stream(lambda: b.copy_(a), 8 * count)


def reading(device: str = "cpu") -> Stream:
    """By PyTorch's sum in float32: of its reductions, and beside a plain loop of 64-byte loads in C++ with and without
    prefetching, none was found to read faster."""
    count = 1 << (28 if device == "cuda" else 26)
    return Stream(torch.empty(count, dtype=torch.float32, device=device).uniform_().sum, 4 * count)


def last_cache() -> int:
    """Bytes of this CPU's last cache, 32 MiB where the system does not say."""
    try:
        found = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):
        found = 0
    return found if found > 0 else 32 << 20


def _rate(stream: Stream, device: str) -> float:
    return stream.bytes / _best(stream.call, 9, device)


def _matmul(dtype: torch.dtype, size: int, device: str) -> float:
    """Operations a second of PyTorch's product or, on a CPU, of oneDNN's with a prepacked weight if that is faster."""
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    times = [_best(lambda: F.linear(a, b), 7, device)]
    if device == "cpu":
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        times.append(_best(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""), 7, device))
    return 2 * size**3 / min(times)


def _int8(size: int) -> float:
    a = torch.randint(0, 255, (size, size), dtype=torch.uint8)
    w = torch.randint(-128, 127, (size, size), dtype=torch.int8).t().contiguous().t()
    packed = torch.ops.onednn.qlinear_prepack(w, [size, size])
    scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int64)

    def call() -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            a, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return 2 * size**3 / _best(call, 7, "cpu")


@functools.cache
def measure(device: str = "cpu") -> Roofline:
    """Measure once a process; takes a few seconds."""
    size = 8192 if device == "cuda" else 2048
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if device == "cpu" and not onednn.serves(torch.bfloat16):
        del names["bfloat16"]  # its products are made in float32, PyTorch's own are slower: that rate is the ceiling
    peak = {name: _matmul(dtype, size, device) for name, dtype in names.items()}
    peak.setdefault("bfloat16", peak["float32"])
    if device == "cuda":
        peak["float16"] = _matmul(torch.float16, size, device)
    else:
        peak["int8"] = _int8(size)
    return Roofline(_rate(copying(device), device), _rate(reading(device), device), peak)
