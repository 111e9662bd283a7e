"""New keys and values written into a key-value cache, in place: what a decode step does before it attends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.kv_cache import cache_view, capacity, check_cache, check_integers
from fusegen.kernels.op import Case, Cost, Op, Tolerance, register

SCHEMA = (
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? block_table=None) -> ()"
)


def allocate(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, block_table: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Nothing: the caches are written in place.  Raises ValueError where the arguments do not fit together."""
    if k.dim() != 4 or v.shape != k.shape:
        raise ValueError(f"kv_append: k {tuple(k.shape)} and v {tuple(v.shape)} are not both (B, Hkv, n, D)")
    check_cache("kv_append", k_cache, v_cache, k.shape[0], block_table)
    cache = cache_view(k_cache, block_table)
    if (cache.shape[1], cache.shape[3]) != (k.shape[1], k.shape[3]):
        raise ValueError(f"kv_append: k {tuple(k.shape)} and the cache {tuple(k_cache.shape)} differ in heads or size")
    if not k.dtype == v.dtype == k_cache.dtype:
        raise ValueError(f"kv_append: k, v and the caches have dtypes {k.dtype}, {v.dtype}, {k_cache.dtype}")
    check_integers("kv_append", "positions", positions, k.shape[0])
    return ()


def reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, block_table: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Row i of k and v (B, Hkv, n, D) becomes key and value positions[b] + i of sequence b.

    The caches are as in ``attention_decode``: (B, Hkv, Lmax, D), or, with ``block_table`` (B, max_blocks) int32,
    (blocks, block_size, Hkv, D).  ``positions`` (B,) int32 or int64.  A row whose position is outside the capacity, or
    whose table entry is no block (below 0: a sequence that has not got it yet), is dropped.
    """
    outs = allocate(k, v, k_cache, v_cache, positions, block_table)
    most = capacity(k_cache, block_table)
    for new, target in ((k, k_cache), (v, v_cache)):
        cache = cache_view(target, block_table)
        for b, start in enumerate(positions.tolist()):
            for i in range(max(0, -start), min(k.shape[2], most - start)):
                block, row = (b, start + i) if block_table is None else divmod(start + i, cache.shape[2])
                if block_table is not None:
                    block = int(block_table[b, block])
                if 0 <= block < cache.shape[0]:
                    cache[block, :, row] = new[b, :, i]
    return outs


def cost(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, block_table: Tensor | None = None
) -> Cost:
    """No arithmetic; the rows read and written once."""
    return Cost(flops=0, bytes=4 * k.numel() * k.element_size())


def _case(
    name: str, k: tuple[int, int, int, int], most: int, positions: tuple[int, ...], *, block: int = 0,
    rows: bool = False, holes: bool = False, packed: bool = False, integer: torch.dtype = torch.int32,
    bench: bool = False, small: bool = True,
) -> Case:  # fmt: skip
    """``block``: a paged cache; ``rows``: a cache laid out (B, Lmax, Hkv, D); ``holes``: table entries of -1;
    ``packed``: the new rows are slices of a joined projection."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        batch, heads, n, dim = k
        joined = torch.randn(batch, n, 3 * heads, dim, generator=g).to(dtype).transpose(1, 2)
        new = [joined[:, heads : 2 * heads], joined[:, 2 * heads :]]
        new = new if packed else [x.contiguous() for x in new]
        shape = (batch * (most // block) + 2, block, heads, dim) if block else (batch, heads, most, dim)
        caches = [torch.randn(shape, generator=g).to(dtype) for _ in range(2)]
        if rows:
            caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
        table = torch.randperm(batch * (most // block), generator=g).to(torch.int32).view(batch, -1) if block else None
        if table is not None and holes:
            table[:, -1] = -1
        return (*new, *caches, torch.tensor(positions, dtype=integer), table)

    return Case(name, build, bench=bench, small=small)


CASES = [
    _case("one row", (2, 2, 1, 64), 33, (0, 32)),
    _case("eight rows", (3, 2, 8, 40), 50, (42, 0, 7), rows=True),
    _case("no rows", (2, 2, 0, 40), 5, (0, 1)),
    _case("no batch", (0, 2, 1, 40), 5, ()),
    _case("no capacity", (2, 2, 1, 40), 0, (0, 1)),
    _case("past the end", (4, 2, 3, 40), 9, (7, 9, 1000, -2), integer=torch.int64),
    _case("odd dimension", (2, 3, 2, 7), 11, (4, 5), rows=True),
    _case("one element", (1, 1, 1, 1), 1, (0,)),
    _case("a prompt", (2, 2, 37, 64), 64, (0, 13), packed=True),
    _case("paged", (3, 2, 1, 64), 64, (0, 15, 63), block=16, packed=True),
    _case("paged, across blocks", (3, 2, 9, 40), 63, (0, 5, 60), block=7, integer=torch.int64),
    _case("paged, holes", (2, 2, 6, 40), 16, (10, 2), block=4, holes=True),
    _case("8x8x1x128 into 4096", (8, 8, 1, 128), 4096, (4095, 0, 100, 7, 9, 2048, 33, 1), bench=True, small=False),
    _case("1x8x2048x128 into 4096", (1, 8, 2048, 128), 4096, (1000,), packed=True, rows=True, bench=True, small=False),
    _case("1x8x2048x128, paged", (1, 8, 2048, 128), 4096, (1000,), block=16, packed=True, bench=True, small=False),
]


def _eager(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, block_table: Tensor | None
) -> tuple[Tensor, ...]:
    """Two indexed writes, every row inside the capacity."""
    n, b = k.shape[2], torch.arange(k.shape[0], device=k.device)[:, None]
    at = positions.long()[:, None] + torch.arange(n, device=k.device)
    if block_table is None:
        k_cache[b, :, at], v_cache[b, :, at] = k.transpose(1, 2), v.transpose(1, 2)
    else:
        size = k_cache.shape[1]
        block = block_table.long().gather(1, at // size)
        k_cache[block, at % size], v_cache[block, at % size] = k.transpose(1, 2), v.transpose(1, 2)
    return ()


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, heads, n, dim, most = draw.shape(3, 3, 9, 40, 30)
    table, shape = None, (batch, heads, most, dim)
    if draw.flag():
        block = draw.integer(1, 9)
        shape = (batch * (most // block), block, heads, dim)
        table = torch.randperm(shape[0], generator=draw.generator()).to(torch.int32).view(batch, most // block)
        table[table % 5 == 4] = -1
    k, v, k_cache, v_cache = (draw.tensor(s, dtype) for s in ((batch, heads, n, dim),) * 2 + (shape,) * 2)
    return (k, v, k_cache, v_cache, torch.tensor(draw.shape(*[most] * batch), dtype=torch.int64), table)


OP = register(
    Op(
        name="kv_append",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={dtype: Tolerance(0.0, 0.0) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
        cases=CASES,
        mutates=("k_cache", "v_cache"),
        eager=_eager,
        alone=None,  # it has no output
        draw=_draw,
        formula="cache[positions + i] = row i",
        source="Kwon et al. 2023, arXiv:2309.06180",
    )
)
