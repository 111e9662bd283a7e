"""Normal noise on NVIDIA GPUs, equal to the bit to ``kernels/noise_normal.py``'s numpy form.

Everything here is integer arithmetic and IEEE float32 multiply and add.  Kernels that call :func:`normals` must be
launched with ``EXACT``: fused multiply-add would round once where numpy rounds twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels import noise_normal as spec
from fusegen.kernels.gpu.launch import Named, Stage, TritonLaunch, Use, blocks, meta
from fusegen.kernels.op import Kernel

SEEDS = 0  # position in the schema
EXACT = {"enable_fp_fusion": False}
BLOCK = 1024
_ROUNDS = tl.constexpr(spec.ROUNDS)
_DEGREE = tl.constexpr(spec.DEGREE)
_M0, _M1 = (tl.constexpr(m) for m in spec.MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in spec.WEYL)


@triton.jit
def _to_normal(u, table):
    """Uniform 32-bit words -> standard normal numbers; ``table`` holds a row of coefficients for each octave."""
    m = u & 0x7FFFFFFF
    clear = m & ((m >> 1) ^ 0xFFFFFFFF)
    leading = clear.to(tl.float32).to(tl.uint32, bitcast=True) >> 23
    octave = tl.minimum(157 - leading.to(tl.int32), 31).to(tl.uint32)
    mantissa = ((((m << 1) | 1) << octave) >> 8) & 0x7FFFFF
    t = (mantissa | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    row = table + octave.to(tl.int32) * (_DEGREE + 1)
    z = tl.load(row + _DEGREE)
    for k in tl.static_range(_DEGREE - 1, -1, -1):
        z = z * t + tl.load(row + k)
    return (z.to(tl.uint32, bitcast=True) ^ (u & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox-4x32-10 of a counter of four uint32 tensors under the key ``seed`` (int64)."""
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, high1 = tl.umulhi(c0, _M0), tl.umulhi(c2, _M1)
        low0, low1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def normals(seed, first, step, sample, table, BLOCK: tl.constexpr):
    """The normals of BLOCK elements from ``first`` (a multiple of 4) on.  seed: int64; step, sample: uint32 scalars."""
    c0 = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    c0, c1, c2, c3 = philox(c0, tl.zeros_like(c0) + step, tl.zeros_like(c0) + sample, tl.zeros_like(c0), seed)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # so that lane = element % 4 once flat
    return _to_normal(tl.reshape(words, (BLOCK,)), table)


@triton.jit(do_not_specialize=["step", "sample"])
def noise_kernel(seeds, out, table, count, step, sample, BLOCK: tl.constexpr):
    """BLOCK elements of one sample; step and sample are the 32 bits of each as int32."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    z = normals(tl.load(seeds + b), first, step.to(tl.uint32), sample.to(tl.uint32), table, BLOCK)
    element = first + tl.arange(0, BLOCK)
    tl.store(out + b * count + element, z, mask=element < count)


@functools.cache
def table(device: torch.device) -> Tensor:
    """The polynomial coefficients (octave-major, float32) on ``device``; one copy each."""
    return torch.from_numpy(spec.TABLE.copy()).flatten().to(device)


def signed(word: int) -> int:
    """The 32 bits of ``word`` as a signed integer, which Triton always passes as int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """One launch."""
    seeds, shape, step, sample = args
    count = math.prod(shape)
    values = {"seeds": Use(SEEDS), "out": outs[0], "table": table(seeds.device), "count": count}
    values |= {"step": signed(step), "sample": signed(sample), "BLOCK": BLOCK}
    return (Stage(noise_kernel, (blocks(count, BLOCK), seeds.shape[0]), values, {"num_warps": 4, **EXACT}),)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    """See :class:`fusegen.kernels.op.Kernel`."""
    return TritonLaunch(args, stages(outs, args))


def decline(seeds: Tensor, shape: Sequence[int], step: int, sample: int = 0) -> str | None:
    """Batches beyond the grid's second dimension; seeds that are not next to each other."""
    if seeds.shape[0] > 65535:
        return f"a batch of {seeds.shape[0]} is beyond the grid's second dimension (65535)"
    return None if seeds.is_contiguous() else f"seeds of stride {seeds.stride(0)} are not next to each other"


def specimens() -> Iterator[Named]:
    yield "4x64x64", lambda: (meta(2, dtype=torch.int64), [4, 64, 64], 7, 0)


KERNELS = [Kernel("noise_normal.triton", "cuda", decline, bind)]
