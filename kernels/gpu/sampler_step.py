"""One sampler step on NVIDIA GPUs: one kernel, before it a small one for the deviations where guidance is rescaled.

The row of coefficients is read in the kernel, so that a captured graph serves every step of a trajectory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels import sampler_step as spec
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, TritonLaunch, Use, blocks, meta
from fusegen.kernels.gpu.noise_normal import EXACT, normals, table
from fusegen.kernels.op import Kernel

BLOCK = 512
PARTIALS = 256  # at most so many partial statistics a sample
_P_X, _P_OUT, _CLIP, _X, _D = (tl.constexpr(i) for i in (spec.P_X, spec.P_OUT, spec.CLIP, spec.X, spec.D))
_NOISE, _INPUT, _STEP = (tl.constexpr(i) for i in (spec.NOISE, spec.INPUT, spec.STEP))
_STORE_X, _STORE_D, _HX0 = (tl.constexpr(i) for i in (spec.STORE_X, spec.STORE_D, spec.HX0))
_SLOTS = tl.constexpr(spec.SLOTS)


@triton.jit
def _guided(out, guidance, b, batch, count, element, keep):
    """(conditional, guided) predictions of sample ``b``, float32."""
    uncond = tl.load(out + b * count + element, mask=keep, other=0.0).to(tl.float32)
    cond = tl.load(out + (batch + b) * count + element, mask=keep, other=0.0).to(tl.float32)
    return cond, uncond + tl.load(guidance + b) * (cond - uncond)


@triton.jit
def _merge(count, mean, square, n, value, keep):
    """Running (count, mean, squared deviations) joined with those of one block (Chan, Golub & LeVeque 1983)."""
    there = tl.sum(tl.where(keep, value, 0.0), axis=0) / n
    away = tl.where(keep, value - there, 0.0)
    total, shift = count + n, there - mean
    square += tl.sum(away * away, axis=0) + shift * shift * (count * n / total)
    return mean + shift * (n / total), square


@triton.jit
def deviation_kernel(out, guidance, partial, batch, count, span, BLOCK: tl.constexpr):
    """One span of one sample -> partial (B, spans, 4): mean and squared deviations of cond, then of guided."""
    b, spans = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, count)
    seen, mean_c, square_c, mean_g, square_g = 0.0, 0.0, 0.0, 0.0, 0.0
    for first in range(begin, end, BLOCK):
        element = first + tl.arange(0, BLOCK)
        keep = element < end
        cond, guided = _guided(out, guidance, b, batch, count, element, keep)
        n = tl.sum(keep.to(tl.float32), axis=0)
        mean_c, square_c = _merge(seen, mean_c, square_c, n, cond, keep)
        mean_g, square_g = _merge(seen, mean_g, square_g, n, guided, keep)
        seen += n
    to = partial + (b * spans + tl.program_id(0)) * 4
    tl.store(to, mean_c)
    tl.store(to + 1, square_c)
    tl.store(to + 2, mean_g)
    tl.store(to + 3, square_g)


@triton.jit
def _squares(partial, n, count, keep):
    """The squared deviations of a whole sample from its spans' means, squared deviations and lengths ``n``."""
    means = tl.load(partial, mask=keep, other=0.0)
    away = means - tl.sum(n * means, axis=0) / count
    inside = tl.load(partial + 1, mask=keep, other=0.0)
    return tl.sum(tl.where(keep, inside + n * away * away, 0.0), axis=0)


@triton.jit
def _factor(partial, b, count, span, spans, rescale, PARTIALS: tl.constexpr):
    """rescale std(cond) / std(guided) + 1 - rescale, or 1 where the guided prediction has no deviation."""
    at = tl.arange(0, PARTIALS)
    keep = at < spans
    n = tl.where(keep, tl.minimum(span, count - at.to(tl.int64) * span), 0).to(tl.float32)
    total = tl.sum(n, axis=0)
    base = partial + (b * spans + at) * 4
    cond, guided = _squares(base, n, total, keep), _squares(base + 2, n, total, keep)
    ratio = tl.sqrt(cond / tl.where(guided > 0.0, guided, 1.0))
    return tl.where(guided > 0.0, rescale * ratio + (1.0 - rescale), 1.0)


@triton.jit
def _term(total, coefficient, value):
    """total + coefficient * value; a coefficient of zero hides an infinity or NaN in the value."""
    return total + tl.where(coefficient != 0.0, coefficient * value, 0.0)


@triton.jit
def step_kernel(
    x, out, row, history, seeds, guidance, following, scaled, denoised, partial, table,
    batch, count, span, spans, rescale, TWICE: tl.constexpr, RESCALE: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one sample; the formulas are those of ``kernels/sampler_step.py``."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    keep = element < count
    at = b * count + element
    here = tl.load(x + at, mask=keep, other=0.0)
    if TWICE:
        _, o = _guided(out, guidance, b, batch, count, element, keep)
    else:
        o = tl.load(out + at, mask=keep, other=0.0).to(tl.float32)
    if RESCALE:
        o = o * _factor(partial, b, count, span, spans, rescale, PARTIALS)
    nothing = tl.zeros((BLOCK,), tl.float32)
    clip = tl.load(row + _CLIP)
    clean = _term(_term(nothing, tl.load(row + _P_X), here), tl.load(row + _P_OUT), o)
    clean = tl.clamp(clean, -clip + nothing, clip + nothing, propagate_nan=tl.PropagateNan.ALL)
    total = _term(_term(nothing, tl.load(row + _X), here), tl.load(row + _D), clean)
    plane = tl.cast(batch, tl.int64) * count
    for slot in tl.static_range(2 * _SLOTS):
        coefficient = tl.full((BLOCK,), tl.load(row + _HX0 + slot), tl.float32)
        stored = tl.load(history + slot * plane + at, mask=keep & (coefficient != 0.0), other=0.0)
        total = _term(total, coefficient, stored)
    strength = tl.load(row + _NOISE)
    if strength != 0.0:
        step = tl.load(row + _STEP).to(tl.int64).to(tl.uint32)
        total += strength * normals(tl.load(seeds + b), first, step, 0, table, BLOCK)
    store_x, store_d = tl.load(row + _STORE_X).to(tl.int32), tl.load(row + _STORE_D).to(tl.int32)
    if store_x >= 0:
        tl.store(history + store_x * plane + at, here, mask=keep)
    if store_d >= 0:
        tl.store(history + (_SLOTS + store_d) * plane + at, clean, mask=keep)
    tl.store(following + at, total, mask=keep)
    tl.store(denoised + at, clean, mask=keep)
    fed = (tl.load(row + _INPUT) * total).to(scaled.dtype.element_ty)
    tl.store(scaled + at, fed, mask=keep)
    if TWICE:
        tl.store(scaled + plane + at, fed, mask=keep)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """One launch, or two where guidance is rescaled."""
    x, out, _, _, _, _, rescale = args
    batch = x.shape[0]
    if not x.numel():
        return ()
    count, twice = x.numel() // batch, out.shape[0] != batch
    use = {name: Use(i) for i, name in enumerate(("x", "out", "row", "history", "seeds", "guidance"))}
    grid, rescaled = (blocks(count, BLOCK), batch), twice and rescale != 0.0
    span = BLOCK * blocks(count, BLOCK * PARTIALS)
    spans = blocks(count, span)
    values: dict[str, Any] = use | dict(zip(("following", "scaled", "denoised"), outs, strict=True))
    values |= {"table": table(x.device), "count": count, "batch": batch, "span": span, "spans": spans}
    partial = torch.empty((batch, spans, 4), dtype=torch.float32, device=x.device) if rescaled else Use(0)
    values |= {"partial": partial, "rescale": float(rescale), "TWICE": twice, "RESCALE": rescaled}
    values |= {"PARTIALS": PARTIALS, "BLOCK": BLOCK}
    last = Stage(step_kernel, grid, values, {"num_warps": 4, **EXACT})
    if not rescaled:
        return (last,)
    names = ("out", "guidance", "partial", "batch", "count", "span", "BLOCK")
    return (Stage(deviation_kernel, (spans, batch), {n: values[n] for n in names}, {"num_warps": 4, **EXACT}), last)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    """See :class:`fusegen.kernels.op.Kernel`."""
    return TritonLaunch(args, stages(outs, args))


def decline(
    x: Tensor, out: Tensor, row: Tensor, history: Tensor, seeds: Tensor, guidance: Tensor, _: float
) -> str | None:
    """Anything not dense, x, row, history or guidance not float32, and batches beyond the grid's second dimension."""
    given = {"x": x, "out": out, "row": row, "history": history, "seeds": seeds, "guidance": guidance}
    for name, tensor in given.items():
        if not tensor.is_contiguous():
            return f"{name} of strides {tuple(tensor.stride())} is not contiguous"
        if name not in ("out", "seeds") and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
    return f"a batch of {x.shape[0]} is beyond the grid's second dimension (65535)" if x.shape[0] > 65535 else None


def specimens() -> Iterator[Named]:
    x, seeds = meta(2, 4, 64, 64), meta(2, dtype=torch.int64)
    for dtype, kind in SHORT.items():
        for rescale in (0.0, 0.7):
            args = (x, meta(4, 4, 64, 64, dtype=dtype), meta(18), meta(8, 2, 4, 64, 64), seeds, meta(2), rescale)
            yield f"{kind} rescale {rescale}", lambda args=args: args  # type: ignore[misc]


KERNELS = [Kernel("sampler_step.triton", "cuda", decline, bind)]
