"""Rows counted in nested loops without integer division: it would be a third of what an elementwise kernel does."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from fusegen.kernels.gpu.launch import blocks, power

MANY = 2**31  # rows (and programs) are counted below this


@triton.jit
def quotient(n, by, shift):
    """n // d for 0 <= n < 2^31, with what :func:`divider` gives for d: a multiplication, an addition and a shift."""
    n = tl.cast(n, tl.uint32)
    return ((tl.umulhi(n, tl.cast(by, tl.uint32)) + n) >> tl.cast(shift, tl.uint32)).to(tl.int32)


@triton.jit
def indices(row, n1, n2, by1, shift1, by2, shift2, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Row numbers as their indices in three loops (.., n1, n2), of int64 where WIDE; FLAT: the innermost is the only
    one."""
    i0, i1, i2 = row * 0, row * 0, row
    if not FLAT:
        outer = quotient(row, by2, shift2)
        i2 = row - outer * n2
        i0 = quotient(outer, by1, shift1)
        i1 = outer - i0 * n1
    if WIDE:
        i0, i1, i2 = i0.to(tl.int64), i1.to(tl.int64), i2.to(tl.int64)
    return i0, i1, i2


def divider(d: int) -> tuple[int, int]:
    """(multiplier as an int32, shift) that divide by ``d``, 0 < d < 2^31 (Granlund & Montgomery 1994, figure 4.1)."""
    shift = (d - 1).bit_length()
    by = (((1 << shift) - d) << 32) // d + 1
    return by - (by >> 31 << 32), shift


def three(n0: int, n1: int, n2: int) -> Mapping[str, int | bool]:
    """What :func:`indices` takes for three loops of these sizes, by its parameters' names, but WIDE."""
    by1, shift1 = divider(n1)
    by2, shift2 = divider(n2)
    return {"n1": n1, "n2": n2, "by1": by1, "shift1": shift1, "by2": by2, "shift2": shift2, "FLAT": n0 * n1 == 1}


def wide(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> bool:
    """Whether some tensor that moves by ``strides`` in loops of these sizes has offsets from 2^31 on."""
    return any(sum((n - 1) * step for n, step in zip(sizes, steps, strict=True)) >= MANY for steps in strides)


def cover(n: int, most: int) -> int:
    """The largest power of two up to ``most`` whose blocks leave at most a seventh of ``n`` unused; where there is none
    the one that leaves least."""
    sizes = [size for size in (8192, 4096, 2048, 1024, 512, 256, 128, 64) if size <= min(most, power(n))]
    unused = {size: blocks(n, size) * size - n for size in sizes or [min(most, power(n))]}
    return next((size for size in unused if 7 * unused[size] <= n), min(unused, key=lambda size: unused[size]))
