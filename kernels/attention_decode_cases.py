"""The cases of attention_decode: layouts of the cache, lengths, windows, caps and sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.op import FLOATS, Case


def _case(
    name: str, q: tuple[int, int, int, int], most: int, lengths: tuple[int, ...] | None = None, *,
    kv_heads: int | None = None, layout: str = "BHLD", block: int = 0, sinks: str = "", scale: float | None = None,
    window: int = 0, softcap: float = 0.0, size: float = 1.0, integer: torch.dtype = torch.int32,
    dtypes: tuple[torch.dtype, ...] = FLOATS, bench: bool = False, small: bool = False,
) -> Case:  # fmt: skip
    """``q`` (B, Hq, n, D); ``most``: the capacity; ``lengths``: that where None.  ``layout`` of a contiguous cache:
    BHLD, BLHD, joined (k and v in one tensor), unaligned.  ``block``: a paged cache of such blocks, in shuffled order.
    ``sinks``: "same" dtype as q or "fp32".  ``size``: the deviation of q.  What lies past a length is NaN."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        batch, heads, n, dim = q
        kv = kv_heads or heads
        own = [most] * batch if lengths is None else list(lengths)
        full = [torch.randn(batch, kv, most, dim, generator=g).to(dtype) for _ in range(2)]
        if lengths is not None:
            for tensor in full:
                for b, length in enumerate(own):
                    tensor[b, :, max(length, 0) :] = torch.nan
        queries = (size * torch.randn(batch, n, heads, dim, generator=g)).to(dtype).transpose(1, 2)
        table = None
        if block:
            table = torch.randperm(batch * (most // block), generator=g).to(torch.int32).view(batch, most // block)
            full = [_page(x, table, block) for x in full]
        else:
            full = _lay(full, layout)
        sink = torch.randn(heads, generator=g).to(torch.float32 if sinks == "fp32" else dtype) if sinks else None
        return (queries, *full, torch.tensor(own, dtype=integer), table, sink, scale, window, softcap)

    return Case(name, build, dtypes, bench, small)


def _page(x: Tensor, table: Tensor, block: int) -> Tensor:
    """(B, H, L, D) as blocks (count + 1, block, H, D), placed by ``table``; the last one is nobody's."""
    batch, heads, most, dim = x.shape
    pieces = x.view(batch, heads, most // block, block, dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    cache = x.new_full((pieces.shape[0] + 1, *pieces.shape[1:]), torch.nan)
    cache[table.flatten().long()] = pieces
    return cache


def _lay(pair: list[Tensor], layout: str) -> list[Tensor]:
    """The two caches in the memory order ``layout``."""
    if layout == "BHLD":
        return pair
    if layout == "unaligned":
        return [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in pair]
    rows = [x.transpose(1, 2).contiguous() for x in pair]
    if layout == "joined":
        both = torch.cat(rows, -2)
        rows = [both[:, :, : rows[0].shape[2]], both[:, :, rows[0].shape[2] :]]
    return [x.transpose(1, 2) for x in rows]


CASES = [
    *(_case(f"head dim {d}", (2, 2, 1, d), 65, small=d in (40, 64)) for d in (1, 7, 40, 64, 72, 80, 96, 128, 160, 256)),
    *(_case(f"no {n}", q, most) for n, q, most in (("queries", (1, 2, 0, 40), 5), ("batch", (0, 2, 3, 40), 5))),
    _case("no capacity", (2, 2, 1, 40), 0),
    _case("one key", (2, 3, 1, 64), 1, small=True),
    _case("lengths", (5, 4, 1, 64), 1300, (1300, 0, 1, 1025, 256), kv_heads=2, small=True),
    _case("lengths out of bounds", (3, 2, 1, 40), 70, (71, -3, 33), integer=torch.int64),
    _case("grouped", (2, 8, 1, 64), 300, (300, 129), kv_heads=2, small=True),
    _case("one kv head", (2, 12, 1, 128), 300, (299, 17), kv_heads=1),
    _case("odd groups", (2, 21, 1, 64), 150, (149, 150), kv_heads=3, small=True),
    _case("wide groups", (2, 36, 1, 72), 301, (299, 77), kv_heads=2, block=7, window=130, sinks="same", small=True),
    *(_case(f"eight heads a key head, dim {d}", (2, 24, 1, d), 1061, (1061, 45), kv_heads=3) for d in (32, 96, 256)),
    _case("ten heads a key head", (2, 20, 2, 64), 300, (300, 7), kv_heads=2, window=90, sinks="same", softcap=20.0),
    _case("ten heads a key head, paged", (2, 20, 3, 128), 637, (637, 12), kv_heads=2, block=7),
    _case("eight heads a key head, rows first", (2, 16, 1, 64), 65, (65, 30), kv_heads=2, layout="BLHD"),
    _case("two queries", (2, 4, 2, 64), 300, (300, 2), kv_heads=2, small=True),
    _case("eight queries", (3, 8, 8, 72), 600, (600, 5, 8), kv_heads=2, small=True),
    _case("many queries", (2, 4, 37, 40), 600, (600, 31), kv_heads=2),
    _case("window", (3, 4, 1, 64), 1300, (1300, 30, 1055), kv_heads=2, window=100, small=True),
    _case("window of one", (2, 2, 3, 40), 70, (70, 2), window=1),
    _case("window past the length", (2, 2, 3, 40), 70, (70, 41), window=500),
    _case("softcap", (2, 4, 2, 64), 300, (300, 77), kv_heads=2, softcap=30.0, size=20.0, small=True),
    _case("small softcap", (2, 4, 1, 40), 100, (100, 33), softcap=0.5, size=4.0),
    _case("sinks", (3, 4, 1, 64), 300, (300, 0, 5), kv_heads=2, sinks="same", small=True),
    _case("float32 sinks, window", (2, 8, 2, 64), 300, (300, 150), kv_heads=2, sinks="fp32", window=128),
    _case("everything", (2, 8, 3, 80), 640, (640, 321), kv_heads=2, block=32, sinks="fp32", window=200, softcap=20.0,
          size=10.0, small=True),
    _case("paged", (3, 4, 1, 64), 640, (640, 17, 300), kv_heads=2, block=16, small=True),
    _case("paged, odd blocks", (3, 4, 2, 40), 637, (637, 0, 14), kv_heads=2, block=7, integer=torch.int64, small=True),
    _case("paged, blocks of one", (2, 2, 1, 40), 33, (33, 20), block=1),
    _case("paged, large blocks", (2, 4, 1, 128), 1200, (1200, 601), kv_heads=2, block=600),
    _case("large logits", (1, 2, 1, 64), 300, size=60.0),
    *(_case(f"scale {scale}", (1, 2, 1, 40), 33, scale=scale) for scale in (0.5, -0.7, 0.0)),
    _case("rows first", (2, 3, 1, 40), 65, (65, 30), layout="BLHD", small=True),
    _case("joined", (2, 3, 2, 40), 65, (65, 30), layout="joined"),
    _case("unaligned", (2, 3, 1, 40), 65, (65, 30), layout="unaligned"),
    _case("1x32x1x128 on 4096", (1, 32, 1, 128), 4096, kv_heads=8, bench=True),
    _case("8x32x1x128 on 4096", (8, 32, 1, 128), 4096, kv_heads=8, bench=True),
    _case("8x32x1x128 on 4096, paged", (8, 32, 1, 128), 4096, kv_heads=8, block=16, bench=True),
    _case("4x32x4x128 on 4096", (4, 32, 4, 128), 4096, kv_heads=8, bench=True),
    _case("1x12x1x64 on 1024", (1, 12, 1, 64), 1024, bench=True),
    _case("4x8x1x256 on 4096, softcap", (4, 8, 1, 256), 4096, kv_heads=4, window=4096, softcap=50.0, bench=True),
    _case("4x64x1x64 on 4096, sinks", (4, 64, 1, 64), 4096, kv_heads=8, sinks="same", bench=True),
]  # fmt: skip
