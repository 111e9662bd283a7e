"""Attention of packed sequences of any lengths, as in serving many prompts at once: no padding is stored or computed.

It stands beside ``attention`` because its rows have no batch axis, and because its queries are aligned with the last
keys (bottom right), where ``attention`` aligns the first ones, as ``scaled_dot_product_attention`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.kv_cache import attend, check_extras, spelled
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor? cu_k=None, Tensor? sinks=None, bool causal=True,"
    " float? scale=None, int window=0, float softcap=0.0) -> Tensor"
)


def allocate(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None = None, sinks: Tensor | None = None,
    causal: bool = True, scale: float | None = None, window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output: q's shape and dtype, contiguous.  Raises ValueError where the arguments do not fit."""
    if q.dim() != 3 or k.dim() != 3 or v.shape != k.shape or q.shape[2] != k.shape[2]:
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip("qkv", (q, k, v), strict=True))
        raise ValueError(f"attention_varlen: {shapes} are not all (total, H, D)")
    if q.shape[1] % max(k.shape[1], 1) or (q.shape[1] and not k.shape[1]):
        raise ValueError(f"attention_varlen: {q.shape[1]} heads of q are no multiple of the {k.shape[1]} of k and v")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention_varlen: q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
        if cu is not None and (cu.dim() != 1 or cu.dtype != torch.int32 or not 1 <= cu.shape[0] == cu_q.shape[0]):
            raise ValueError(f"attention_varlen: {name} {tuple(cu.shape)} is not (sequences + 1,) of int32")
    if cu_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"attention_varlen: {q.shape[0]} queries and {k.shape[0]} keys need a cu_k of their own")
    check_extras("attention_varlen", q.shape[1], sinks, window, softcap)
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),)


def bounds(cu: Tensor, total: int) -> list[tuple[int, int]]:
    """Each sequence's rows [first, last), inside [0, total)."""
    ends = [min(max(c, 0), total) for c in cu.tolist()]
    return [(first, max(first, last)) for first, last in zip(ends, ends[1:], strict=False)]


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None = None, sinks: Tensor | None = None,
    causal: bool = True, scale: float | None = None, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of packed q (Tq, Hq, D) over k and v (Tk, Hkv, D), in float32, or float64 where q is.

    ``cu_q`` (sequences + 1,) int32, from 0 on, never falling: sequence s has the rows cu_q[s] to cu_q[s + 1] of q, and
    those of ``cu_k`` (cu_q where None) of k and v.  Query i of a sequence of n queries and L keys stands at p = L - n +
    i.  ``causal``: it attends the keys j <= p; ``window`` > 0: only j > p - window and, where not causal, j < p +
    window.  ``sinks``, ``softcap`` and ``scale`` are as in ``attention_decode``.  A query with nothing to attend, and a
    row of no sequence, gives zeros.  A sequence's result depends on its own rows alone, to the bit."""
    (out,) = allocate(q, k, v, cu_q, cu_k, sinks, causal, scale, window, softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    sinks = None if sinks is None else sinks.to(wide)
    out.zero_()
    of_q = bounds(cu_q, q.shape[0])
    for (first, last), (begin, end) in zip(of_q, of_q if cu_k is None else bounds(cu_k, k.shape[0]), strict=True):
        keys, values = (x[begin:end].transpose(0, 1).to(wide) for x in (k, v))
        step = max(1, 2**25 // max(1, q.shape[1] * (end - begin)))
        for i in range(first, last, step):  # in pieces: the scores of a long prompt would take gigabytes
            rows = slice(i, min(i + step, last))
            part = attend(
                q[rows].transpose(0, 1).to(wide), keys, values, causal, sinks, scale, window, softcap, last - rows.stop
            )
            out[rows] = part.transpose(0, 1)
    return out


def cost(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None = None, sinks: Tensor | None = None,
    causal: bool = True, scale: float | None = None, window: int = 0, softcap: float = 0.0,
) -> Cost:  # fmt: skip
    """As if the sequences were equally long: their lengths are data."""
    count = max(1, cu_q.shape[0] - 1)
    queries, keys = -(-q.shape[0] // count), -(-k.shape[0] // count)
    pairs = queries * keys
    if causal:
        open_rows = min(queries, keys)
        pairs -= open_rows * (open_rows - 1) // 2 + (queries - open_rows) * keys
    if window:
        pairs = min(pairs, queries * (window if causal else 2 * window - 1))
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    return Cost(flops=4 * pairs * count * q.shape[1] * q.shape[2], bytes=moved)


def _case(
    name: str, heads: int, dim: int, queries: tuple[int, ...], keys: tuple[int, ...] | None = None, *,
    kv_heads: int | None = None, causal: bool = True, layout: str = "contiguous", sinks: bool = False,
    scale: float | None = None, window: int = 0, softcap: float = 0.0, size: float = 1.0, spare: int = 0,
    bench: bool = False, small: bool = False,
) -> Case:  # fmt: skip
    """``queries`` and ``keys``: the sequences' lengths.  ``layout``: contiguous, packed (one projection of q, k and v)
    or unaligned.  ``spare``: rows of q past the last sequence.  ``size``: the deviation of q."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        kv = kv_heads or heads
        counts = (sum(queries) + spare, *[sum(queries if keys is None else keys) + (spare if keys is None else 0)] * 2)
        made = [torch.randn(n, h, dim, generator=g) for n, h in zip(counts, (heads, kv, kv), strict=True)]
        made[0] = made[0] * size
        made = [x.to(dtype) for x in made]
        if layout == "packed":
            made = list(torch.cat(made, 1).split([heads, kv, kv], 1))
        elif layout == "unaligned":
            made = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in made]
        cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (queries, keys or queries)]
        sink = torch.randn(heads, generator=g).to(dtype) if sinks else None
        return (*made, cu[0], None if keys is None else cu[1], sink, causal, scale, window, softcap)

    return Case(name, build, FLOATS, bench, small)


CASES = [
    *(_case(f"head dim {d}", 2, d, (33, 5), small=d == 40) for d in (1, 7, 40, 64, 72, 80, 96, 128, 160, 256)),
    _case("no sequences", 2, 40, ()),
    _case("no rows", 2, 40, (0, 0)),
    _case("one row", 2, 64, (1,), small=True),
    _case("lengths", 2, 64, (0, 70, 1, 0, 33, 2, 0), small=True),
    _case("prime", 1, 40, (509, 3)),
    _case("not causal", 2, 40, (60, 0, 37), causal=False, small=True),
    _case("grouped", 6, 64, (19, 40), kv_heads=2, small=True),
    _case("more keys", 2, 64, (5, 40, 1), (90, 43, 300), small=True),
    _case("more queries", 2, 40, (90, 7), (5, 0), small=True),
    _case("other keys, not causal", 2, 40, (20, 33), (77, 13), causal=False, small=True),
    _case("window", 2, 64, (150, 40), window=33, small=True),
    _case("window of one", 2, 40, (40, 9), window=1),
    _case("window, not causal", 2, 40, (300, 21), window=65, causal=False, small=True),
    _case("window, more keys", 2, 64, (45, 3), (300, 290), window=100, small=True),
    _case("softcap", 2, 64, (60, 33), softcap=30.0, size=20.0, small=True),
    _case("small softcap", 2, 40, (60, 33), softcap=0.5, size=4.0, causal=False),
    _case("sinks", 4, 64, (60, 1), kv_heads=2, sinks=True, small=True),
    _case("everything", 4, 80, (60, 0, 300), (100, 7, 290), kv_heads=2, sinks=True, window=90, softcap=20.0, size=10.0),
    _case("spare rows", 2, 40, (20, 30), spare=7, small=True),
    _case("large logits", 2, 64, (40, 90), size=60.0),
    *(_case(f"scale {scale}", 2, 40, (20, 33), scale=scale) for scale in (0.5, -0.7, 0.0)),
    _case("packed projections", 2, 40, (33, 65), layout="packed"),
    _case("unaligned", 2, 40, (33, 65), layout="unaligned"),
    _case("8 of 512, 32x128", 32, 128, (512,) * 8, kv_heads=8, bench=True),
    _case("8 of 17 to 1024, 32x128", 32, 128, (17, 1024, 300, 60, 511, 777, 128, 90), kv_heads=8, bench=True),
    _case("32 of 128, 12x64 not causal", 12, 64, (128,) * 32, causal=False, bench=True),
]  # fmt: skip


def _eager(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, sinks: Tensor | None, causal: bool,
    scale: float | None, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """PyTorch's own attention, sequence after sequence."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    of_q = bounds(cu_q, q.shape[0])
    for (first, last), (begin, end) in zip(of_q, of_q if cu_k is None else bounds(cu_k, k.shape[0]), strict=True):
        at = torch.arange(last - first, device=q.device)[:, None] + (end - begin - last + first)
        key = torch.arange(end - begin, device=q.device)
        keep = key <= at if causal else torch.ones_like(key <= at)
        if window:
            keep &= (key > at - window) & (key < at + window)
        rows, keys, values = (x.transpose(0, 1)[None] for x in (q[first:last], k[begin:end], v[begin:end]))
        out[first:last] = spelled(rows, keys, values, keep, sinks, scale, softcap)[0].transpose(0, 1)
    return out


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    count, kv, share, dim = draw.integer(0, 4), draw.integer(1, 2), draw.integer(1, 3), draw.integer(1, 90)
    queries, keys = ([draw.integer(0, 50) for _ in range(count)] for _ in range(2))
    shared = draw.flag()
    rows = (sum(queries), sum(queries if shared else keys))
    layouts = ("contiguous", "unaligned", "padded", "transposed")
    q, k, v = (draw.tensor((rows[i > 0], kv * (1 if i else share), dim), dtype, layouts=layouts) for i in range(3))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (queries, keys))
    sinks = draw.maybe((kv * share,), (dtype, torch.float32))
    options = (draw.flag(), None, draw.choice((0, 1, 20)), draw.choice((0.0, 5.0)))
    return (q, k, v, cu_q, None if shared else cu_k, sinks, *options)


OP = register(
    Op(
        name="attention_varlen",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={  # attention's
            torch.float32: Tolerance(rms=8e-6, peak=3e-5),
            torch.bfloat16: Tolerance(rms=4e-3, peak=8e-3),
            torch.float16: Tolerance(rms=5e-4, peak=1e-3),
        },
        cases=CASES,
        eager=_eager,
        alone=None,  # its rows are packed: see the sequences' own test
        draw=_draw,
        formula="softmax(cap(scale q k^T), sinks) v for each packed sequence; cap(s) = softcap tanh(s / softcap)",
        source="Vaswani et al. 2017, arXiv:1706.03762; packed as by Dao 2023, arXiv:2307.08691",
    )
)
