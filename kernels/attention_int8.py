"""Attention whose products are of int8: softmax(scale q k^T) v with q, k, v and the weights quantized on the way.

The arithmetic is exact up to the last steps, so that kernels can be held to it closely.  From the keys their mean over
all keys is taken, which softmax does not see and which makes them far easier to quantize (Zhang et al. 2024,
SageAttention).  Codes are those of :mod:`.linear_int8`, in float32: a scale for each query, for each BLOCK of keys, for
each channel of v.  Scores are exact integers, shifted to 16 bits; a block's weights are 2^-u, u the distance from the
block's highest score in 32nds of an octave, rounded to codes of 0 to 255; they multiply v exactly, and their own sum
divides.  So the weights of a block are as fine as its largest is, however far below the row's that may be.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import attention
from fusegen.kernels.attention import heads
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import codes_of
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor q, Tensor k, Tensor v, float? scale=None) -> Tensor"
BLOCK = 128  # keys with a scale, and a highest score, of their own
FINE = 32  # steps of an octave that weights are told apart by
MOST_DIM = 256  # a score's sum then fits float32 exactly, and 16 bits after a shift of 7
LOG2E = 1.4426950408889634


def shift_of(dim: int) -> int:
    """How far scores of ``dim`` products of codes are shifted to fit 16 bits."""
    return next(s for s in range(32) if 127 * 127 * dim >> s <= 32766)


def _factor(dim: int, scale: float | None) -> float:
    """Octaves that a shifted score stands for, by unit scales of q and k."""
    return (max(dim, 1) ** -0.5 if scale is None else scale) * LOG2E * 2.0 ** shift_of(dim)


def allocate(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, ...]:
    """The uninitialised output of :func:`.attention.allocate`.  Raises ValueError also for a head dimension over
    MOST_DIM and a scale that is not positive."""
    outs = attention.allocate(q, k, v, None, None, False, scale)
    if q.shape[-1] > MOST_DIM:
        raise ValueError(f"attention_int8: a head dimension of {q.shape[-1]} is over {MOST_DIM}")
    if scale is not None and not 0.0 < scale < float("inf"):
        raise ValueError(f"attention_int8: scale is {scale}, not positive")
    return outs


def _table() -> Tensor:
    return (255 * 64 * torch.exp2(-torch.arange(FINE, dtype=torch.float64) / FINE)).round().int()


def _weights(scores: Tensor, rate: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """A block's weights as integers 0 to 255, and the exponent of 2 that they are relative to; ``scores`` (..., L, n)
    exact, ``rate`` (..., L, 1) in octaves of a shifted score, float32."""
    high = ((scores.int() + (1 << shift >> 1)) >> shift).to(torch.int32)
    top = high.amax(-1, keepdim=True)
    exponent = torch.frexp(rate * FINE).exponent.clamp(0, 15)  # what is left of the rate is below one
    factor = (rate * FINE * torch.exp2(15.0 - exponent)).clamp(max=32767.0).nan_to_num().round().int()
    far = (top - high).clamp(max=32767)
    far = torch.minimum(far, 32767 >> exponent) << exponent
    steps = (far * factor + (1 << 14)) >> 15
    halved = 512 >> (steps // FINE).clamp(max=10)
    codes = (_table().to(scores.device)[steps % FINE] * halved + (1 << 14)) >> 15
    return codes, top * rate


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of q (B, Hq, Lq, D) over k and v (B, Hkv, Lk, D), or of rank 3, by this file's arithmetic; the integers
    are exact, the rest float32, or float64 where q is.  No keys give zeros.  A query, or a channel of v, that is not
    finite gives NaN, and so do keys, for all queries of their head."""
    (out,) = allocate(q, k, v, scale)
    wide, target, keys = torch.promote_types(q.dtype, torch.float32), heads(out), k.shape[-2]
    if not keys or not out.numel():
        return out.zero_()
    q, k, v = heads(q).float(), heads(k).float(), heads(v).float()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    k = k - k.double().mean(-2, keepdim=True).float()
    codes_v, scale_v = (x.transpose(-1, -2) for x in codes_of(v.transpose(-1, -2)))
    blocks = [codes_of(part.flatten(2)) for part in k.split(BLOCK, -2)]
    codes_k = [codes.unflatten(2, (-1, q.shape[3])).float() for codes, _ in blocks]
    broken = torch.stack([0.0 * by for _, by in blocks]).sum(0)[..., None].to(wide)
    shift, factor = shift_of(q.shape[3]), torch.tensor(_factor(q.shape[3], scale), dtype=torch.float32)
    step = max(1, 2**24 // max(1, q[..., 0, 0].numel() * keys))
    for i in range(0, q.shape[2], step):  # in pieces: the scores of 4096 pixels would take gigabytes
        codes, by = codes_of(q[:, :, i : i + step])
        found = []
        for block, (_, scale_k) in zip(codes_k, blocks, strict=True):
            rate = (by * scale_k[..., None] * factor).clamp(max=2.0**64)
            found.append(_weights(codes.float() @ block.transpose(-1, -2), rate, shift))
        most = torch.stack([at for _, at in found]).amax(0).to(wide)
        weights = torch.cat([w.to(wide) * torch.exp2(at.to(wide) - most) for w, at in found], -1)
        made = weights @ codes_v.to(wide) / weights.sum(-1, keepdim=True)
        target[:, :, i : i + step] = made * scale_v.to(wide) + broken + 0.0 * by.to(wide)
    return out


def cost(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Cost:
    """Those of attention, by int8 products."""
    plain = attention.cost(q, k, v)
    return Cost(flops=plain.flops, bytes=plain.bytes, products="int8")


def _case(
    name: str, q: tuple[int, ...], keys: int | None = None, *, kv_heads: int | None = None, kind: str = "",
    scale: float | None = None, bench: bool = False, small: bool = True,
) -> Case:  # fmt: skip
    """``kind``: "packed" (q, k, v of one projection), "offset" (keys of a mean far larger than they differ), "spread"
    (scores of many octaves), "outlier" (a key far from all), "extremes" (zero, tiny and huge rows), "broken"."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        length = q[-2] if keys is None else keys
        kv = (q[0], kv_heads or q[1], length, q[3]) if len(q) == 4 else (q[0], length, q[2])
        parts = [torch.randn(shape, generator=g) for shape in (q, kv, kv)]
        _disturb(parts, kind)
        parts = [x.to(dtype) for x in parts]
        if kind == "packed":
            return (*(x.transpose(1, 2) for x in torch.cat([x.transpose(1, 2) for x in parts], -1).chunk(3, -1)), scale)
        laid = (x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for x in parts)
        return (*laid, scale)

    return Case(name, build, (torch.bfloat16,) if bench else FLOATS, bench, small)


def _disturb(parts: list[Tensor], kind: str) -> None:
    q, k, v = parts
    if kind == "offset":
        k += 40 + 5 * torch.arange(k.shape[-1])
    if kind == "spread":
        q *= 60
    if kind == "outlier":
        k[..., k.shape[-2] // 2, :] *= 30
    if kind == "extremes":
        q[..., 0, :], k[..., 1, :], v[..., 0] = 0, k[..., 1, :] * 1e-5, 0
        q[..., 1, :] *= 1e-6
        q[..., 2, :], v[..., 1] = q[..., 2, :] * 1e3, v[..., 1] * 1e3
    if kind == "broken":
        q[0, 0, 3, 1], k[0, 1, 5, 2], v[1, 0, 7, 3] = torch.inf, torch.nan, torch.inf


CASES = [
    *(_case(f"head dim {d}", (1, 2, 33, d), 65) for d in (1, 2, 7, 40, 64, 72, 80, 128, 160, 256)),
    *(_case(f"no {n}", q, keys) for n, q, keys in (("queries", (1, 2, 0, 40), 5), ("batch", (0, 2, 3, 40), 5))),
    _case("no keys", (1, 2, 3, 40), 0),
    _case("one key", (2, 3, 5, 64), 1),
    _case("one query", (2, 3, 1, 64), 131),
    _case("prime", (1, 1, 67, 40), 521, small=False),
    _case("whole blocks", (1, 2, 64, 40), 256, small=False),
    _case("grouped", (2, 6, 19, 64), 137, kv_heads=2),
    _case("rank 3", (6, 33, 40), 150),
    _case("packed projections", (2, 3, 70, 40), 70, kind="packed"),
    _case("offset keys", (1, 2, 40, 40), 300, kind="offset"),
    _case("large logits", (1, 2, 40, 64), 300, kind="spread"),
    _case("an outlier", (1, 2, 40, 40), 300, kind="outlier"),
    _case("extremes", (1, 2, 40, 40), 140, kind="extremes"),
    _case("broken", (2, 2, 40, 40), 140, kind="broken"),
    *(_case(f"scale {scale}", (1, 2, 20, 40), 33, scale=scale) for scale in (0.5, 1e-4, 30.0)),
    *(
        _case("x".join(map(str, q)), q, bench=True, small=False)
        for q in ((2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 10, 4096, 64))
    ),
]


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    return (*(x[b : b + 1] for x in args[:3]), args[3])


def _eager(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, group, kv_heads, queries = draw.shape(2, 3, 3, 40)
    keys, dim = draw.shape(200, 50)
    dim = max(dim, 1)
    shapes = ((batch, max(group, 1) * max(kv_heads, 1), queries, dim), *((batch, max(kv_heads, 1), keys, dim),) * 2)
    layouts = ("contiguous", "unaligned", "padded", "transposed")
    parts = (draw.tensor(shape, dtype, scale=draw.choice((1.0, 10.0, 0.1)), layouts=layouts) for shape in shapes)
    return (*parts, draw.choice((None, 0.5)))


OP = register(
    Op(
        name="attention_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=2e-5, peak=2e-4),
            torch.bfloat16: Tolerance(rms=3.91e-3, peak=3.91e-3),
            torch.float16: Tolerance(rms=4.9e-4, peak=4.9e-4),
        },
        cases=CASES,
        eager=_eager,
        alone=_alone,
        draw=_draw,
        formula="sum_b 2^m_b round(255 2^-u_b) round(v / s) s / sum, u_b = (max S - S) / 32 octaves, S = round(q / s) "
        "round((k - mean k) / s_b), b each block of 128 keys",
        source="Zhang et al. 2024 (SageAttention), arXiv:2410.02367",
    )
)
