"""One token a row on NVIDIA GPUs: penalties and biases by many programs, then one program a row for the rest.

Thresholds are found by narrowing a bracket of keys eightfold a pass, with masses as integers, so that nothing depends
on the order in which anything is summed.  Launched with ``EXACT``; see ``kernels/sample_token.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels import sample_token as spec
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, TritonLaunch, Use, blocks, meta, power
from fusegen.kernels.gpu.noise_normal import EXACT, philox
from fusegen.kernels.gpu.token_row import after, boundary, clean, draw, largest_of, masses_of, moment_of, share
from fusegen.kernels.op import FLOATS, Kernel

WARPS = 8
BLOCK = 1024
PAIRS = 2048  # the most sparse biases a row
_TAG = tl.constexpr(spec.TAG)
_LAST = tl.constexpr(0x7F7FFFFF)  # the bits of the largest finite float
_UNIT = tl.constexpr(2.0**-spec.BITS)
_WHOLE = tl.constexpr(2.0**spec.BITS)


@triton.jit
def count_kernel(history, lengths, prompts, counts, length, size, LENGTHS: tl.constexpr, PROMPTS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """counts (B, V), zero before: bit 0 where a token is in the history, and twice its count past the prompt."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum(tl.load(lengths + b), length) if LENGTHS else tl.cast(length, tl.int64)
    start = tl.maximum(tl.load(prompts + b), 0) if PROMPTS else tl.cast(0, tl.int64)
    token = tl.load(history + b * length + at, mask=at < end, other=-1)
    inside = (token >= 0) & (token < size)
    to = counts + b * size + tl.where(inside, token, 0)
    tl.atomic_or(to, 1, mask=inside, sem="relaxed")
    tl.atomic_add(to, 2, mask=inside & (at >= start), sem="relaxed")


@triton.jit
def prepare_kernel(
    logits, y, counts, repetition, frequency, presence, bias, mask, size, logits_row, bias_row, mask_row,
    HISTORY: tl.constexpr, REPETITION: tl.constexpr, FREQUENCY: tl.constexpr, PRESENCE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (B, V) float32 but for sparse biases; leaves ``counts`` zero.  MASK: 0 none, 1 bool, 2 bits."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < size
    v = clean(tl.load(logits + b * logits_row + i, mask=keep, other=0.0).to(tl.float32))
    if HISTORY:
        count = tl.load(counts + b * size + i, mask=keep, other=0)
        tl.store(counts + b * size + i, 0, mask=keep)
        many = count >> 1
        if REPETITION:
            r = tl.load(repetition + b)
            v = tl.where(count > 0, tl.where(v < 0.0, v * r, tl.div_rn(v, tl.zeros_like(v) + r)), v)
        if FREQUENCY:
            v = tl.where(many > 0, v - many.to(tl.float32) * tl.load(frequency + b), v)
        if PRESENCE:
            v = tl.where(many > 0, v - tl.load(presence + b), v)
    if BIAS:
        v = v + tl.load(bias + b * bias_row + i, mask=keep, other=0.0)
    v = clean(v)
    if MASK == 1:
        v = tl.where(tl.load(mask + b * mask_row + i, mask=keep, other=0) != 0, v, -float("inf"))
    if MASK == 2:
        word = tl.load(mask + b * mask_row + i // 32, mask=keep, other=0)
        v = tl.where(((word >> (i % 32)) & 1) != 0, v, -float("inf"))
    tl.store(y + b * size + i, v, mask=keep)


@triton.jit
def bias_kernel(y, ids, values, size, pairs, row, BLOCK: tl.constexpr):
    """Sparse biases of one row.  Each pair sums all those of its id in their order, so equal ids write equal sums."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    mine = tl.load(ids + b * row + n, mask=n < pairs, other=-1)
    inside = (mine >= 0) & (mine < size)
    total = tl.load(y + b * size + mine, mask=inside, other=0.0)
    for j in range(pairs):
        value = tl.load(values + b * row + j)
        same = (tl.load(ids + b * row + j) == mine) & (total != -float("inf"))
        total = tl.where(same, clean(total + value), total)
    tl.debug_barrier()
    tl.store(y + b * size + mine, total, mask=inside)


@triton.jit
def row_kernel(
    y, logits, seeds, positions, requests, temperature, top_k, top_p, min_p, typical_p, token, logprob, settings,
    least_of, size, REQUESTS: tl.constexpr, TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, TYPICAL: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Thresholds, draw and log-probability of row b; ``settings`` (B, 8) is what ``top_kernel`` needs of them."""
    b = tl.program_id(0).to(tl.int64)
    y += b * size
    largest, picked = largest_of(y, size)
    farthest, centre, away, least = float("inf"), 0.0, float("inf"), tl.cast(0, tl.int64)
    heat = tl.load(temperature + b) if TEMPERATURE else 1.0
    inverse = tl.div_rn(1.0, tl.where(heat > 0.0, heat, 1.0))
    greedy = (heat <= 0.0) | (heat != heat) | (inverse == float("inf")) | (largest == -float("inf"))
    inverse = tl.where(greedy, 1.0, inverse)
    norm, reach = 0.0, 0.0
    if not greedy:
        if TOP_K:
            k = tl.load(top_k + b)
            if k > 0:
                farthest = boundary(y, size, largest, inverse, farthest, least, 0.0, k, _LAST, True, False)
        if TOP_P:
            p = tl.load(top_p + b)
            if p < 1.0:
                mass = tl.sum(masses_of(y, size, largest, inverse, farthest, least, centre, away), axis=0)
                farthest = boundary(
                    y, size, largest, inverse, farthest, least, 0.0, share(mass, p), _LAST, False, False
                )
        if MIN_P:
            p = tl.load(min_p + b)
            least = tl.where(p > 0.0, (tl.minimum(p, 1.0) * _WHOLE).to(tl.int64), 0)
        if TYPICAL:
            p = tl.load(typical_p + b)
            if p < 1.0:
                mass = tl.sum(masses_of(y, size, largest, inverse, farthest, least, centre, away), axis=0)
                moment = moment_of(y, size, largest, inverse, farthest, least)
                centre = tl.div_rn(moment.to(tl.float32), mass.to(tl.float32))
                limit = share(mass, p)
                away = boundary(y, size, largest, inverse, farthest, least, centre, limit, _LAST, False, True)
        masses = masses_of(y, size, largest, inverse, farthest, least, centre, away)
        total = tl.sum(masses, axis=0)
        c0 = tl.zeros((1,), tl.uint32) + tl.load(positions + b).to(tl.uint32)
        who = tl.load(requests + b) if REQUESTS else tl.cast(0, tl.int64)
        c1, c2 = tl.zeros_like(c0) + who.to(tl.uint32), tl.zeros_like(c0) + (who >> 32).to(tl.uint32)
        high, low, _, _ = philox(c0, c1, c2, tl.zeros_like(c0) + _TAG, tl.load(seeds + b))
        random = tl.max((high.to(tl.uint64) << 32) | low.to(tl.uint64), axis=0)
        goal = tl.umulhi(random, total.to(tl.uint64)).to(tl.int64)
        picked = draw(y, size, largest, inverse, farthest, least, centre, away, masses, total, goal)
        norm = tl.log(total.to(tl.float64) * _UNIT).to(tl.float32)
        reach = (largest - tl.load(y + picked)) * inverse
    none = largest == -float("inf")
    if MODEL:
        logits += b * size
        largest, _ = largest_of(logits, size)
        everything = masses_of(logits, size, largest, 1.0, float("inf"), tl.cast(0, tl.int64), 0.0, float("inf"))
        norm = tl.log(tl.sum(everything, axis=0).to(tl.float64) * _UNIT).to(tl.float32)
        reach = largest - clean(tl.load(logits + picked).to(tl.float32))
        inverse, farthest, centre, away, least = 1.0, float("inf"), 0.0, float("inf"), tl.cast(0, tl.int64)
    tl.store(token + b, tl.where(none, -1, picked.to(tl.int64)))
    tl.store(logprob + b, tl.where(none, -float("inf"), 0.0 - reach - norm))
    settings += b * 8
    tl.store(settings, largest)
    tl.store(settings + 1, inverse)
    tl.store(settings + 2, farthest)
    tl.store(settings + 3, centre)
    tl.store(settings + 4, away)
    tl.store(settings + 5, norm)
    tl.store(settings + 6, 0.0 if MODEL else greedy.to(tl.float32))
    tl.store(least_of + b, least)


@triton.jit
def top_kernel(y, settings, least_of, ids, logprobs, size, row, top):
    """The ``top`` likeliest kept tokens of a row, one after the other: by value, then by id."""
    b = tl.program_id(0).to(tl.int64)
    y += b * row
    settings += b * 8
    largest, inverse, farthest = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    centre, away, norm = tl.load(settings + 3), tl.load(settings + 4), tl.load(settings + 5)
    alone, least = tl.load(settings + 6) != 0.0, tl.load(least_of + b)
    value, last = float("inf"), tl.cast(-1, tl.int32)
    for n in range(top):
        value, last = after(y, size, largest, inverse, farthest, least, centre, away, value, last)
        found = (value > -float("inf")) & ((n == 0) | (alone == 0))
        tl.store(ids + b * top + n, tl.where(found, last, -1).to(tl.int64))
        tl.store(logprobs + b * top + n, tl.where(found, 0.0 - (largest - value) * inverse - norm, -float("inf")))


def _count(a: spec.Arguments, counts: Tensor | Use, use: dict[str, Any]) -> Stage:
    assert a.history is not None
    batch, length = a.history.shape
    values = {"history": use["history"], "lengths": use["history_lengths"], "prompts": use["prompt_lengths"]}
    values |= {"counts": counts, "length": length, "size": a.logits.shape[1], "BLOCK": BLOCK}
    values |= {"LENGTHS": a.history_lengths is not None, "PROMPTS": a.prompt_lengths is not None}
    return Stage(count_kernel, (blocks(length, BLOCK), batch), values, {"num_warps": 4})


def _prepare(a: spec.Arguments, counts: Tensor | Use, y: Tensor, use: dict[str, Any]) -> Stage:
    names = ("logits", "repetition", "frequency", "presence", "bias", "mask")
    values: dict[str, Any] = {name: use[name] for name in names} | {"y": y, "counts": counts}
    values |= {"size": a.logits.shape[1], "logits_row": a.logits.stride(0), "BLOCK": BLOCK}
    for name in ("bias", "mask"):
        tensor = getattr(a, name)
        values[f"{name}_row"] = tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0
    values |= {name.upper(): getattr(a, name) is not None for name in names[1:5]} | {"HISTORY": a.history is not None}
    values["MASK"] = 0 if a.mask is None else 1 if a.mask.dtype == torch.bool else 2
    return Stage(
        prepare_kernel, (blocks(a.logits.shape[1], BLOCK), a.logits.shape[0]), values, {"num_warps": 4, **EXACT}
    )


def _biases(a: spec.Arguments, y: Tensor, use: dict[str, Any]) -> Stage:
    assert a.bias_ids is not None
    pairs = a.bias_ids.shape[-1]
    values = {"y": y, "ids": use["bias_ids"], "values": use["bias_values"], "size": a.logits.shape[1]}
    values |= {"pairs": pairs, "row": pairs if a.bias_ids.dim() == 2 else 0, "BLOCK": power(pairs)}
    return Stage(bias_kernel, (a.logits.shape[0] if pairs else 0,), values, {"num_warps": 4, **EXACT})


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """Counts of the history, y, sparse biases, the row, and the likeliest tokens, as far as they are asked for."""
    a = spec.Arguments(*args)
    (batch, size), device = a.logits.shape, a.logits.device
    use: dict[str, Any] = {name: Use(0 if getattr(a, name) is None else i) for i, name in enumerate(spec.ARGUMENTS)}
    y = torch.empty((batch, size), dtype=torch.float32, device=device)
    given = torch.empty_like(y) if a.model else y  # the model's own logits: converted once, like y
    counts = Use(0) if a.history is None else torch.zeros((batch, size), dtype=torch.int32, device=device)
    settings = torch.empty((batch, 8), dtype=torch.float32, device=device)
    least = torch.empty((batch,), dtype=torch.int64, device=device)
    names = ("seeds", "positions", "requests", "temperature", "top_k", "top_p", "min_p", "typical_p")
    row: dict[str, Any] = {name: use[name] for name in names} | {"y": y, "token": outs[0], "logprob": outs[1]}
    row |= {"settings": settings, "least_of": least, "size": size, "logits": given, "MODEL": a.model}
    row |= {name.upper(): getattr(a, name) is not None for name in names[2:7]} | {"TYPICAL": a.typical_p is not None}
    top: dict[str, Any] = {"y": given if a.model else y, "settings": settings, "least_of": least, "ids": outs[2]}
    top |= {"logprobs": outs[3], "size": size, "row": size, "top": a.top}
    wide = {"num_warps": WARPS, **EXACT}
    made: tuple[Stage, ...] = () if a.history is None else (_count(a, counts, use),)
    made += (_prepare(a, counts, y, use),) + (() if a.bias_ids is None else (_biases(a, y, use),))
    if a.model:
        made += (_prepare(spec.Arguments(a.logits, a.seeds, a.positions), Use(0), given, use),)
    made += (Stage(row_kernel, (batch,), row, wide),)
    return made + ((Stage(top_kernel, (batch,), top, wide),) if a.top else ())


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    """See :class:`fusegen.kernels.op.Kernel`."""
    return TritonLaunch(args, stages(outs, args))


def decline(*args: Any) -> str | None:
    """Strided arguments, but for the rows of logits; parameters that are not float32; more pairs than a tile."""
    a = spec.Arguments(*args)
    if a.logits.dtype not in FLOATS:
        return f"logits is {a.logits.dtype}"
    if a.logits.shape[1] > 1 and a.logits.stride(1) != 1:
        return "the vocabulary is strided"
    for name in spec.ARGUMENTS[1:]:
        tensor = getattr(a, name)
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} of strides {tuple(tensor.stride())} is not contiguous"
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
    if a.bias_ids is not None and a.bias_ids.shape[-1] > PAIRS:
        return f"{a.bias_ids.shape[-1]} sparse biases a row (limit {PAIRS})"
    return (
        f"a batch of {a.logits.shape[0]} is beyond the grid's second dimension (65535)"
        if a.logits.shape[0] > 65535
        else None
    )


def specimens() -> Iterator[Named]:
    whole, real = meta(4, dtype=torch.int64), meta(4)
    for dtype, kind in SHORT.items():
        logits = meta(4, 131072, dtype=dtype)
        plain = tuple(spec.Arguments(logits, whole, whole))
        yield f"{kind} plain", lambda args=plain: args  # type: ignore[misc]
        full = spec.Arguments(logits, whole, whole, whole, real, whole, real, real, real)
        full = full._replace(history=meta(4, 4096, dtype=torch.int64), repetition=real, frequency=real, presence=real)
        full = full._replace(mask=meta(4, 4096, dtype=torch.int32), bias_ids=meta(4, 300, dtype=torch.int64))
        full = full._replace(bias_values=meta(4, 300), bias=meta(131072), top=20, history_lengths=whole, model=True)
        yield f"{kind} everything", lambda args=tuple(full): args  # type: ignore[misc]


KERNELS = [Kernel("sample_token.triton", "cuda", decline, bind)]
