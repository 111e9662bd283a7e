"""One token a row on NVIDIA GPUs, every pass of a row by many programs: see :mod:`.token_passes`.

A first pass finds the largest y (and writes y where anything changes the logits), one the bins in which top-k and top-p
end, two what typical-p needs, one draws, two find the likeliest tokens: each only where its argument is given.  Masses
are integers, so that nothing depends on the order in which anything is summed.  Launched with ``EXACT``; see
``kernels/sample_token.py``.
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
from fusegen.kernels.gpu.noise_normal import EXACT
from fusegen.kernels.gpu.token_passes import away_kernel, bins_kernel, moments_kernel
from fusegen.kernels.gpu.token_pick import pick_kernel, top_bins_kernel, top_kernel
from fusegen.kernels.gpu.token_row import BEST, BINS, BLOCK, CELLS, LANES, LOWEST, RAW, clean, pack
from fusegen.kernels.op import FLOATS, Kernel

WARPS = 8
PAIRS = 2048  # the most sparse biases a row
_CELLS, _LOWEST = tl.constexpr(CELLS), tl.constexpr(LOWEST)


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
def publish(cell, v, i, keep):
    """Raise a cell to the largest of the kept (value, id)."""
    tl.atomic_max(cell, tl.max(tl.where(keep, pack(v, i), _LOWEST), axis=0), sem="relaxed")


@triton.jit
def prepare_kernel(
    logits, y, cells, counts, repetition, frequency, presence, bias, mask, size, logits_row, bias_row, mask_row,
    HISTORY: tl.constexpr, REPETITION: tl.constexpr, FREQUENCY: tl.constexpr, PRESENCE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, WRITE: tl.constexpr, FIND: tl.constexpr, FIND_RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y (B, V) float32 but for sparse biases, where WRITE, its largest, and that of the logits; leaves ``counts`` zero.
    MASK: 0 none, 1 bool, 2 bits."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < size
    v = clean(tl.load(logits + b * logits_row + i, mask=keep, other=0.0).to(tl.float32))
    if FIND_RAW:
        publish(cells + b * _CELLS + RAW, v, i, keep)
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
    if WRITE:
        tl.store(y + b * size + i, v, mask=keep)
    if FIND:
        publish(cells + b * _CELLS + BEST, v, i, keep)


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


def _count(a: spec.Arguments, counts: Tensor | Use, use: dict[str, Any]) -> Stage:
    assert a.history is not None
    batch, length = a.history.shape
    values = {"history": use["history"], "lengths": use["history_lengths"], "prompts": use["prompt_lengths"]}
    values |= {"counts": counts, "length": length, "size": a.logits.shape[1], "BLOCK": BLOCK}
    values |= {"LENGTHS": a.history_lengths is not None, "PROMPTS": a.prompt_lengths is not None}
    return Stage(count_kernel, (blocks(length, BLOCK), batch), values, {"num_warps": 4})


def _prepare(a: spec.Arguments, counts: Tensor | Use, y: Tensor | Use, cells: Tensor, use: dict[str, Any]) -> Stage:
    names = ("logits", "repetition", "frequency", "presence", "bias", "mask")
    values: dict[str, Any] = {name: use[name] for name in names} | {"y": y, "cells": cells, "counts": counts}
    values |= {"size": a.logits.shape[1], "logits_row": a.logits.stride(0), "BLOCK": BLOCK}
    for name in ("bias", "mask"):
        tensor = getattr(a, name)
        values[f"{name}_row"] = tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0
    values |= {name.upper(): getattr(a, name) is not None for name in names[1:5]} | {"HISTORY": a.history is not None}
    values["MASK"] = 0 if a.mask is None else 1 if a.mask.dtype == torch.bool else 2
    changed = _changed(a)
    values |= {"WRITE": changed, "FIND": a.bias_ids is None, "FIND_RAW": changed and a.model}
    return Stage(
        prepare_kernel, (blocks(a.logits.shape[1], BLOCK), a.logits.shape[0]), values, {"num_warps": 4, **EXACT}
    )


def _biases(a: spec.Arguments, y: Tensor, use: dict[str, Any]) -> Stage:
    assert a.bias_ids is not None
    pairs = a.bias_ids.shape[-1]
    values = {"y": y, "ids": use["bias_ids"], "values": use["bias_values"], "size": a.logits.shape[1]}
    values |= {"pairs": pairs, "row": pairs if a.bias_ids.dim() == 2 else 0, "BLOCK": power(pairs)}
    return Stage(bias_kernel, (a.logits.shape[0] if pairs else 0,), values, {"num_warps": 4, **EXACT})


def _changed(a: spec.Arguments) -> bool:
    """Whether y is not the logits."""
    return any(t is not None for t in (a.history, a.bias, a.mask, a.bias_ids))


def _row(a: spec.Arguments, outs: tuple[Tensor, ...]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The passes over y, each with the values that not all of them share."""
    (batch, size), device = a.logits.shape, a.logits.device
    make = lambda width, dtype: torch.zeros((batch, width), dtype=dtype, device=device)  # noqa: E731
    cut, typical = a.top_k is not None or a.top_p is not None, a.typical_p is not None
    bins = {"masses": make(BINS, torch.int64) if cut or typical else Use(0)}
    bins["counts"] = make(BINS, torch.int32) if a.top_k is not None or a.top else Use(0)
    entries = torch.empty((batch, size), dtype=torch.int64, device=device) if cut or typical or a.top else Use(0)
    if cut:
        yield bins_kernel, bins
    if typical:
        yield moments_kernel, {"entries": entries}
        yield away_kernel, bins
    pick: dict[str, Any] = {"lanes": make(LANES, torch.int64), "entries": entries, "token": outs[0], "logprob": outs[1]}
    pick |= {"raw": Use(0), "raw_row": a.logits.stride(0), "TYPICAL": typical, "REQUESTS": a.requests is not None}
    yield pick_kernel, pick | {"PROBABILITIES": (2 if _changed(a) else 1) if a.model else 0}
    if a.top:
        source = {"y": Use(0), "row": a.logits.stride(0)} if a.model else {}
        yield top_bins_kernel, bins | source | {"top": a.top}
        yield top_kernel, source | {"entries": entries, "ids": outs[2], "logprobs": outs[3], "top": a.top}


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """Counts of the history, y, sparse biases, then the passes over y, as far as they are asked for."""
    a = spec.Arguments(*args)
    (batch, size), device = a.logits.shape, a.logits.device
    use: dict[str, Any] = {name: Use(0 if getattr(a, name) is None else i) for i, name in enumerate(spec.ARGUMENTS)}
    cells = torch.zeros((batch, CELLS), dtype=torch.int64, device=device)
    cells[:, [BEST.value, RAW.value]] = LOWEST
    changed = _changed(a)
    y = torch.empty((batch, size), dtype=torch.float32, device=device) if changed else Use(0)
    counts = Use(0) if a.history is None else torch.zeros((batch, size), dtype=torch.int32, device=device)
    made: tuple[Stage, ...] = () if a.history is None else (_count(a, counts, use),)
    made += (_prepare(a, counts, y, cells, use),)
    if isinstance(y, Tensor) and a.bias_ids is not None:
        largest = _prepare(spec.Arguments(y, a.seeds, a.positions), Use(0), Use(0), cells, use | {"logits": y})
        made += (_biases(a, y, use), largest)
    shared: dict[str, Any] = use | {"y": y, "row": size if changed else a.logits.stride(0), "size": size}
    shared |= {"cells": cells, "reals": torch.empty((batch, 8), dtype=torch.float32, device=device)}
    shared |= {name.upper(): getattr(a, name) is not None for name in ("temperature", "top_k", "top_p", "min_p")}
    for kernel, own in _row(a, outs):
        values = shared | own
        values = {name: values[name] for name in kernel.arg_names}
        made += (Stage(kernel, (blocks(size, BLOCK), batch), values, {"num_warps": WARPS, **EXACT}),)
    return made


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
