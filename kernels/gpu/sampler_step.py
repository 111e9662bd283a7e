"""One sampler step on NVIDIA GPUs: one kernel; before it a small one for the deviations where guidance is rescaled, and
two for the quantile where the prediction is thresholded.

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

TENSORS = dict(enumerate(("x", "out", "row", "history", "seeds", "guidance"))) | {8: "mask", 9: "known"}  # by position
BLOCK = 512
PARTIALS = 256  # at most so many partial statistics a sample
_P_X, _P_OUT, _CLIP, _X, _D = (tl.constexpr(i) for i in (spec.P_X, spec.P_OUT, spec.CLIP, spec.X, spec.D))
_NOISE, _INPUT, _STEP = (tl.constexpr(i) for i in (spec.NOISE, spec.INPUT, spec.STEP))
_STORE_X, _STORE_D, _HX0 = (tl.constexpr(i) for i in (spec.STORE_X, spec.STORE_D, spec.HX0))
_SLOTS = tl.constexpr(spec.SLOTS)
_KNOWN, _KNOWN_NOISE, _KNOWN_STEP = (tl.constexpr(i) for i in (spec.KNOWN, spec.KNOWN_NOISE, spec.KNOWN_STEP))
_LARGEST = tl.constexpr(spec.LARGEST)
_LAST = tl.constexpr(0x7F7FFFFF)  # its bits
WIDE = 4096  # elements a program looks at together for a quantile


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
def _predicted(
    x, out, row, guidance, partial, b, batch, count, span, spans, rescale, element, keep,
    TWICE: tl.constexpr, RESCALE: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(x, denoised prediction) of BLOCK elements, neither thresholded nor clamped."""
    at = b * count + element
    here = tl.load(x + at, mask=keep, other=0.0)
    if TWICE:
        _, o = _guided(out, guidance, b, batch, count, element, keep)
    else:
        o = tl.load(out + at, mask=keep, other=0.0).to(tl.float32)
    if RESCALE:
        o = o * _factor(partial, b, count, span, spans, rescale, PARTIALS)
    nothing = tl.zeros((BLOCK,), tl.float32)
    return here, _term(_term(nothing, tl.load(row + _P_X), here), tl.load(row + _P_OUT), o)


@triton.jit
def predict_kernel(
    x, out, row, guidance, denoised, partial, batch, count, span, spans, rescale,
    TWICE: tl.constexpr, RESCALE: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The denoised prediction of BLOCK elements of one sample, for :func:`limit_kernel`."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    keep = element < count
    _, clean = _predicted(
        x, out, row, guidance, partial, b, batch, count, span, spans, rescale, element, keep, TWICE, RESCALE, PARTIALS,
        BLOCK,
    )  # fmt: skip
    tl.store(denoised + b * count + element, clean, mask=keep)


@triton.jit
def _sizes(denoised, first, count, WIDE: tl.constexpr):
    """The bits of |denoised|, and of what is infinite or NaN those of the largest number; -1 where there is nothing."""
    element = first + tl.arange(0, WIDE)
    size = tl.abs(tl.load(denoised + element, mask=element < count, other=0.0))
    size = tl.where(size < _LARGEST, size, _LARGEST)
    return tl.where(element < count, size.to(tl.int32, bitcast=True), -1)


@triton.jit
def limit_kernel(denoised, limit, count, rank, part, WIDE: tl.constexpr):
    """max(1, quantile of |denoised|) of each sample: its bits by bisection, then the next value that is there."""
    b = tl.program_id(0).to(tl.int64)
    denoised += b * count
    low, high = tl.cast(0, tl.int32), tl.cast(_LAST, tl.int32)
    while low < high:
        step = (high - low) // 4 + 1
        n0, n1, n2 = tl.zeros((WIDE,), tl.int32), tl.zeros((WIDE,), tl.int32), tl.zeros((WIDE,), tl.int32)
        for first in range(0, count, WIDE):
            size = _sizes(denoised, first, count, WIDE)
            there, key = size >= 0, size - low
            n0 += (there & (key < step)).to(tl.int32)
            n1 += (there & (key < 2 * step)).to(tl.int32)
            n2 += (there & (key < 3 * step)).to(tl.int32)
        below = (tl.sum(n0, axis=0) <= rank).to(tl.int32) + (tl.sum(n1, axis=0) <= rank).to(tl.int32)
        below += (tl.sum(n2, axis=0) <= rank).to(tl.int32)
        low += below * step
        high = tl.minimum(high, low + step - 1)
    upto, above = tl.zeros((WIDE,), tl.int32), tl.full((WIDE,), _LAST, tl.int32)
    for first in range(0, count, WIDE):
        size = _sizes(denoised, first, count, WIDE)
        upto += ((size >= 0) & (size <= high)).to(tl.int32)
        above = tl.where(size > high, tl.minimum(above, size), above)
    following = tl.where(tl.sum(upto, axis=0) > tl.minimum(rank + 1, count - 1), high, tl.min(above, axis=0))
    value = high.to(tl.float32, bitcast=True)
    value += part * (following.to(tl.float32, bitcast=True) - value)
    tl.store(limit + b, tl.maximum(value, 1.0))


@triton.jit
def step_kernel(
    x, out, row, history, seeds, guidance, mask, known, following, scaled, denoised, partial, limit, table,
    batch, count, span, spans, rescale, TWICE: tl.constexpr, RESCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    INPAINT: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one sample; the formulas are those of ``kernels/sampler_step.py``."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    keep = element < count
    at = b * count + element
    nothing = tl.zeros((BLOCK,), tl.float32)
    if THRESHOLD:
        here = tl.load(x + at, mask=keep, other=0.0)
        clean, s = tl.load(denoised + at, mask=keep, other=0.0), tl.load(limit + b) + nothing
        clean = tl.div_rn(tl.clamp(clean, -s, s, propagate_nan=tl.PropagateNan.ALL), s)
    else:
        here, clean = _predicted(
            x, out, row, guidance, partial, b, batch, count, span, spans, rescale, element, keep, TWICE, RESCALE,
            PARTIALS, BLOCK,
        )  # fmt: skip
    clip = tl.load(row + _CLIP)
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
    if INPAINT:
        kept = _term(nothing, tl.load(row + _KNOWN), tl.load(known + at, mask=keep, other=0.0))
        strength = tl.load(row + _KNOWN_NOISE)
        if strength != 0.0:
            step = tl.load(row + _KNOWN_STEP).to(tl.int64).to(tl.uint32)
            kept += strength * normals(tl.load(seeds + b), first, step, 0, table, BLOCK)
        paint = tl.load(mask + at, mask=keep, other=0.0)
        total = paint * total + (1.0 - paint) * kept
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
    """One launch; before it one where guidance is rescaled, and two where the prediction is thresholded."""
    x, out, rescale, threshold, mask = args[0], args[1], args[6], args[7], args[8]
    batch = x.shape[0]
    if not x.numel():
        return ()
    count, twice = x.numel() // batch, out.shape[0] != batch
    rescaled, span = twice and rescale != 0.0, BLOCK * blocks(count, BLOCK * PARTIALS)
    spans, (rank, part) = blocks(count, span), spec.rank(threshold, count)
    values: dict[str, Any] = {name: Use(0 if args[i] is None else i) for i, name in TENSORS.items()}
    values |= dict(zip(("following", "scaled", "denoised"), outs, strict=True))
    values |= {"table": table(x.device), "count": count, "batch": batch, "span": span, "spans": spans}
    partial = torch.empty((batch, spans, 4), dtype=torch.float32, device=x.device) if rescaled else Use(0)
    limit = torch.empty((batch,), dtype=torch.float32, device=x.device) if threshold else Use(0)
    values |= {"partial": partial, "limit": limit, "rescale": float(rescale), "rank": rank, "part": part}
    values |= {"TWICE": twice, "RESCALE": rescaled, "THRESHOLD": threshold != 0.0, "INPAINT": mask is not None}
    values |= {"PARTIALS": PARTIALS, "BLOCK": BLOCK, "WIDE": WIDE}

    def stage(kernel: Any, *grid: int) -> Stage:
        warps = {limit_kernel: 16, predict_kernel: 8}.get(kernel, 4)  # with 4 predict_kernel spills on an sm_80
        return Stage(kernel, grid, {name: values[name] for name in kernel.arg_names}, {"num_warps": warps, **EXACT})

    whole = (blocks(count, BLOCK), batch)
    before = (stage(deviation_kernel, spans, batch),) if rescaled else ()
    limits = (stage(predict_kernel, *whole), stage(limit_kernel, batch)) if threshold else ()
    return (*before, *limits, stage(step_kernel, *whole))


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    """See :class:`fusegen.kernels.op.Kernel`."""
    return TritonLaunch(args, stages(outs, args))


def decline(*args: Any) -> str | None:
    """Anything not dense, x, row, history, guidance, mask or known not float32, and batches beyond the grid's second
    dimension."""
    for index, name in TENSORS.items():
        tensor = args[index]
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} of strides {tuple(tensor.stride())} is not contiguous"
        if tensor is not None and name not in ("out", "seeds") and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
    batch = args[0].shape[0]
    return f"a batch of {batch} is beyond the grid's second dimension (65535)" if batch > 65535 else None


def specimens() -> Iterator[Named]:
    x, seeds = meta(2, 4, 64, 64), meta(2, dtype=torch.int64)
    for dtype, kind in SHORT.items():
        for rescale in (0.0, 0.7):
            args = (x, meta(4, 4, 64, 64, dtype=dtype), meta(spec.ROW), meta(8, 2, 4, 64, 64), seeds, meta(2), rescale)
            plain, all_of_it = (*args, 0.0, None, None), (*args, 0.995, x, x)
            yield f"{kind} rescale {rescale}", lambda args=plain: args  # type: ignore[misc]
        yield f"{kind} threshold, inpainting", lambda args=all_of_it: args  # type: ignore[misc]


KERNELS = [Kernel("sampler_step.triton", "cuda", decline, bind)]
