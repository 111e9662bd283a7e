"""New rows of the key-value cache on NVIDIA GPUs: one program a row of one tensor, all its heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import SHORT, Named, Stage, TritonLaunch, Use, meta, power
from fusegen.kernels.kv_cache import cache_view, capacity
from fusegen.kernels.op import Kernel

K, V, K_CACHE, V_CACHE, POSITIONS, TABLE = range(6)  # positions of the tensors in the schema
TILE = 4096  # elements of a row that a program copies at a time


@triton.jit
def _copy(new, cache, new_h, new_d, cache_h, cache_d, heads, dim, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """(heads, dim) elements, ROWS heads at a time."""
    d = tl.arange(0, WIDE)[None, :]
    for first in tl.range(0, heads, ROWS):
        h = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
        keep = (h < heads) & (d < dim)
        tl.store(cache + h * cache_h + d * cache_d, tl.load(new + h * new_h + d * new_d, mask=keep), mask=keep)


@triton.jit
def append_kernel(
    k, v, k_cache, v_cache, positions, table,
    k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, kc_b, kc_h, kc_l, kc_d, vc_b, vc_h, vc_l, vc_d, t_b, t_m,
    n, heads, dim, most, block, count, PAGED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row i of sequence b: program b * n + i."""
    b, i = (tl.program_id(0) // n).to(tl.int64), (tl.program_id(0) % n).to(tl.int64)
    place = tl.load(positions + b).to(tl.int64) + i
    if (place < 0) | (place >= most):
        return
    where, inside = b, place
    if PAGED:
        where, inside = tl.load(table + b * t_b + place // block * t_m).to(tl.int64), place % block
        if (where < 0) | (where >= count):
            return
    _copy(k + b * k_b + i * k_l, k_cache + where * kc_b + inside * kc_l, k_h, k_d, kc_h, kc_d, heads, dim, ROWS, WIDE)
    _copy(v + b * v_b + i * v_l, v_cache + where * vc_b + inside * vc_l, v_h, v_d, vc_h, vc_d, heads, dim, ROWS, WIDE)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """One launch."""
    k, v, k_cache, v_cache, _, table = args
    batch, heads, n, dim = k.shape
    if not k.numel():
        return ()
    caches = [cache_view(x, table) for x in (k_cache, v_cache)]
    names = ("k", "v", "k_cache", "v_cache", "positions")
    values: dict[str, Any] = {name: Use(i) for i, name in enumerate(names)}
    values["table"] = Use(POSITIONS if table is None else TABLE)
    for name, tensor in zip(("k", "v", "kc", "vc"), (k, v, *caches), strict=True):
        values |= {f"{name}_{axis}": s for axis, s in zip("bhld", tensor.stride(), strict=True)}
    values |= dict(zip(("t_b", "t_m"), (0, 0) if table is None else table.stride(), strict=True))
    values |= {"n": n, "heads": heads, "dim": dim, "most": capacity(k_cache, table), "block": caches[0].shape[2]}
    wide = power(dim)
    values |= {"count": caches[0].shape[0], "PAGED": table is not None, "WIDE": wide}
    values["ROWS"] = max(1, min(power(heads), TILE // wide))
    return (Stage(append_kernel, (batch * n,), values, {"num_warps": 4}),)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    """See :class:`fusegen.kernels.op.Kernel`."""
    return TritonLaunch(args, stages(outs, args))


def decline(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, *rest: Any) -> str | None:
    """Rows too wide for a program, and positions that are not dense."""
    if k.shape[-1] > TILE:
        return f"a head dimension of {k.shape[-1]}: over {TILE}"
    if not positions.is_contiguous():
        return f"positions of stride {positions.stride(0)} are not contiguous"
    return None


def specimens() -> Iterator[Named]:
    """One row for each of 8 sequences, and a prompt into blocks."""
    for dtype, kind in SHORT.items():
        row, cache, at = meta(8, 8, 1, 128, dtype=dtype), meta(8, 8, 4096, 128, dtype=dtype), meta(8, dtype=torch.int32)
        yield f"{kind} one row", lambda row=row, cache=cache, at=at: (row, row, cache, cache, at, None)  # type: ignore[misc]
    prompt, blocks = (meta(*shape, dtype=torch.bfloat16) for shape in ((1, 8, 2048, 128), (257, 16, 8, 128)))
    table, start = meta(1, 256, dtype=torch.int32), meta(1, dtype=torch.int32)
    yield "bf16 a prompt, paged", lambda: (prompt, prompt, blocks, blocks, start, table)


KERNELS = [Kernel("kv_append.triton", "cuda", decline, bind)]
