"""Normal noise as a function of (seed, step, sample, element): the same bits on every device.

Bits come from Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), one block of four
32-bit words for each four elements.  A word ``u`` becomes a normal number by inverting the distribution function:

    m = u mod 2^31, x = 2 m + 1          the tail probability is p = x / 2^33, in (0, 1/2)
    e = the leading zeros of x           0..31; p lies in [2^-(e+2), 2^-(e+1))
    t = 1.f - 1.5, f the 23 bits after x's leading one; exact, in [-1/2, 1/2)
    z = c0 + t (c1 + t (c2 + ... + t c7)), c = TABLE[e]; each product and each sum rounded to float32, never fused
    the top bit of u is the sign

The largest error against the exact inverse is 5.1e-7, and |z| < 6.4.  Only IEEE float32 multiply and add and integer
operations are used, so numpy, C++ and Triton agree to the bit.  Where a machine has no count of leading zeros, take
the exponent of float(m & ~(m >> 1)): clearing the second bit keeps the conversion from rounding up to the next power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor seeds, int[] shape, int step, int sample=0) -> Tensor"
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
DEGREE = 7
OCTAVES = 32

# One octave of p a row, c0 first, as IEEE float32 words: Chebyshev fits of the inverse; tests/test_noise_normal.py
# makes them anew.
_WORDS = """
    3ea324af bf28c748 3d8dd815 bd6b6692 3c9ae2d1 bc48419d 3be4506d bb8d2ddf
    3f631c08 beedc710 3dc3f233 bd300bef 3ca3bc2b bc290db2 3bdb5dc3 bb7d10f5
    3fa8b494 bebf2fca 3dbc349f bd1f12d8 3c971cd3 bc1bdf3e 3bcb1cd8 bb6abf26
    3fd68531 bea35a60 3daeb519 bd12c029 3c8c2f5d bc1100c6 3bbd8137 bb5b699c
    3ffe6409 be90814a 3da2209e bd089fe3 3c8303b9 bc07de34 3bb20459 bb4e6e77
    401109dc be82ba8d 3d974d59 bd001d86 3c7680ba bc001a5c 3ba8355c bb4350f2
    40214fe8 be70411b 3d8e1790 bcf1bfc1 3c69362b bbf2daca 3b9fbd52 bb39b15f
    40305ae9 be5f5228 3d863791 bce54907 3c5db532 bbe74094 3b9859c0 bb314696
    403e66bd be5169ed 3d7ed7a7 bcda7176 3c53a615 bbdd11d7 3b91d7a7 bb29d862
    404b9eac be45bd5d 3d72ff01 bcd0eb49 3c4ac55a bbd40d95 3b8c0f8c bb233b21
    40582328 be3bc44d 3d6892af bcc87a7a 3c42deb1 bbcc013d 3b86e295 bb1d4ca2
    40640d3c be331fb4 3d5f5285 bcc0f03f 3c3bc918 bbc4c4fd 3b823859 bb17f1c6
    406f70ae be2b8b04 3d570c4e bcba27b9 3c35640c bbbe391e 3b7bfaab bb1314cb
    407a5d70 be24d372 3d4f9861 bcb40384 3c2f957c bbb84419 3b744383 bb0ea40e
    40827049 be1ed274 3d48d718 bcae6bf5 3c2a484b bbb2d12a 3b6d3171 bb0a911e
    40878276 be196a3c 3d42aee9 bca94dc3 3c256b2e bbadcf3e 3b66af34 bb06d00a
    408c69d3 be148354 3d3d0b00 bca49916 3c20efde bba9302f 3b60ab19 bb0356de
    40912a41 be100aff 3d37da39 bca040c6 3c1cca71 bba4e829 3b5b164b bb001d3b
    4095c717 be0bf212 3d330e57 bc9c39d3 3c18f0e6 bba0ed31 3b55e43d bafa3818
    409a4339 be082c1f 3d2e9b6d bc987af3 3c155ac4 bb9d36d0 3b510a40 baf49a8a
    409ea12d be04aedd 3d2a7766 bc94fc45 3c1200d2 bb99bdc7 3b4c7f2e baef576b
    40a2e32c be0171b4 3d2699b3 bc91b708 3c0edcde bb967bdf 3b483b22 baea65c6
    40a70b2a bdfcdac8 3d22fafd bc8ea570 3c0be98c bb936bb2 3b443745 bae5bdd4
    40ab1ae8 bdf7378c 3d1f94f3 bc8bc275 3c092238 bb908891 3b406da0 bae158cc
    40af13f4 bdf1ef2c 3d1c621a bc8909b8 3c0682d4 bb8dce64 3b3cd8f9 badd30b8
    40b2f7b4 bdecf896 3d195daf bc867765 3c0407d2 bb8b3990 3b3974b7 bad9405a
    40b6c76c bde84bee 3d168383 bc840820 3c01ae0f bb88c6ea 3b363cca bad5830f
    40ba8442 bde3e25d 3d13cfeb bc81b8f0 3bfee58e bb8673a0 3b332d97 bad1f4b6
    40be2f3e bddfb5e3 3d113fa8 bc7f0e6a 3bfaa707 bb843d31 3b3043e7 bace91a4
    40c1c955 bddbc13b 3d0ecfd9 bc7ae12c 3bf69c27 bb822163 3b2d7cdd bacb568e
    40c55364 bdd7ffbb 3d0c7dee bc76e5f9 3bf2c101 bb801e34 3b2ad5e3 bac84082
    40c8ce37 bdd46d41 3d0a479d bc731911 3bef120e bb7c63b1 3b284cab bac54cd7
"""
TABLE: npt.NDArray[np.float32] = np.array([int(w, 16) for w in _WORDS.split()], np.uint32).view(np.float32)
TABLE = TABLE.reshape(OCTAVES, DEGREE + 1)
TABLE.setflags(write=False)

Words = npt.NDArray[np.uint32]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox-4x32-10 of a counter of four broadcastable uint32 arrays under a key of two words."""
    c0, c1, c2, c3 = counter
    for r in range(ROUNDS):
        k0, k1 = (np.uint32((key[i] + r * WEYL[i]) & 0xFFFFFFFF) for i in (0, 1))
        p0 = c0.astype(np.uint64) * np.uint64(MULTIPLIERS[0])
        p1 = c2.astype(np.uint64) * np.uint64(MULTIPLIERS[1])
        high0, high1 = ((p >> np.uint64(32)).astype(np.uint32) for p in (p0, p1))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1.astype(np.uint32), high0 ^ c3 ^ k1, p0.astype(np.uint32)
    return c0, c1, c2, c3


def words_to_normal(u: Words) -> npt.NDArray[np.float32]:
    """Standard normal numbers from uniform 32-bit words, as the module's text says."""
    m = u & np.uint32(0x7FFFFFFF)
    leading = (m & ~(m >> np.uint32(1))).astype(np.float32).view(np.uint32) >> np.uint32(23)  # 0 where m is 0
    octave = np.minimum(np.uint32(157) - leading, np.uint32(31))
    x = (m << np.uint32(1)) | np.uint32(1)
    mantissa = ((x << octave) >> np.uint32(8)) & np.uint32(0x7FFFFF)
    t = (mantissa | np.uint32(0x3F800000)).view(np.float32) - np.float32(1.5)
    z = TABLE[octave, DEGREE]
    for k in range(DEGREE - 1, -1, -1):
        z = z * t + TABLE[octave, k]
    return (z.view(np.uint32) ^ (u & np.uint32(0x80000000))).view(np.float32)


def normal_numpy(
    seeds: Sequence[int] | npt.NDArray[np.int64], shape: Sequence[int], step: int, sample: int = 0
) -> npt.NDArray[np.float32]:
    """Noise (B, *shape), float32: row b depends on ``seeds[b]`` (64 bits), ``step`` and ``sample`` (32 bits) alone."""
    count = math.prod(shape)
    block = np.arange((count + 3) // 4, dtype=np.uint32)
    constants = [np.full_like(block, value & 0xFFFFFFFF) for value in (step, sample, 0)]
    out = np.empty((len(seeds), count), np.float32)
    for b, seed in enumerate(seeds):
        key = (int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF)
        lanes = philox((block, constants[0], constants[1], constants[2]), key)
        out[b] = words_to_normal(np.stack(lanes, axis=1).reshape(-1)[:count])
    return out.reshape(len(seeds), *shape)


def allocate(seeds: Tensor, shape: Sequence[int], step: int, sample: int = 0) -> tuple[Tensor, ...]:
    """The uninitialised output (B, *shape), float32, contiguous.  Raises ValueError where seeds is not (B,) int64."""
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"noise_normal: seeds is {seeds.dtype} of shape {tuple(seeds.shape)}; it must be (B,) int64")
    return (torch.empty((seeds.shape[0], *shape), dtype=torch.float32, device=seeds.device),)


def reference(seeds: Tensor, shape: Sequence[int], step: int, sample: int = 0) -> Tensor:
    """:func:`normal_numpy` as a tensor on the device of ``seeds``."""
    (out,) = allocate(seeds, shape, step, sample)
    return out.copy_(torch.from_numpy(normal_numpy(seeds.cpu().numpy(), shape, step, sample)))


def cost(seeds: Tensor, shape: Sequence[int], step: int, sample: int = 0) -> Cost:
    """25 integer operations (a quarter of ten rounds), 10 for the fields, 15 for the polynomial; the output written."""
    count = seeds.shape[0] * math.prod(shape)
    return Cost(flops=50 * count, bytes=4 * count + 8 * seeds.shape[0])


def _case(
    name: str,
    batch: int,
    shape: tuple[int, ...],
    step: int = 0,
    sample: int = 0,
    *,
    bench: bool = False,
    small: bool = True,
) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g, dtype=torch.int64)
        return (seeds, list(shape), step, sample)

    return Case(name, build, dtypes=(torch.float32,), bench=bench, small=small)


CASES = [
    _case("small", 2, (3, 8, 8)),
    _case("no seeds", 0, (3, 8)),
    _case("no elements", 2, (0,)),
    _case("one element", 1, (1,)),
    _case("scalar samples", 3, ()),
    _case("prime length", 3, (1013,), step=7),
    _case("length 67", 2, (67,), step=1, sample=2),
    _case("largest step and sample", 2, (130,), step=2**32 - 1, sample=2**32 - 1),
    _case("many short rows", 65, (5,), step=3),
    _case("2x4x64x64", 2, (4, 64, 64), step=19, bench=True),
    _case("16x3x32x32", 16, (3, 32, 32), step=19, bench=True),
    _case("1x4x128x128", 1, (4, 128, 128), step=19, bench=True, small=False),
]


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    seeds = [draw.integer(-(2**63), 2**63 - 1) for _ in range(draw.integer(0, 4))]
    shape = list(draw.shape(*[70] * draw.integer(0, 2)))
    return (torch.tensor(seeds, dtype=torch.int64), shape, *draw.shape(2**32 - 1, 2**32 - 1))


OP = register(
    Op(
        name="noise_normal",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={torch.float32: Tolerance(rms=0.0, peak=0.0)},
        cases=CASES,
        draw=_draw,
        formula="the inverse normal distribution at Philox-4x32-10(seed, sample, step, element)",
        source="Salmon et al. 2011, doi:10.1145/2063384.2063405",
    )
)
