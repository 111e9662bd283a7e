"""Scaled dot-product attention: softmax(scale q k^T + mask) v (Vaswani et al. 2017, section 3.2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.attention_cases import CASES
from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Cost, Op, Spelling, Tolerance, register

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? key_lengths=None, bool causal=False, float? scale=None)"
    " -> Tensor"
)


def heads(x: Tensor) -> Tensor:
    """(B, H, L, D) as it is; (N, L, D) as N batches of one head, (N, 1, L, D).  A view."""
    return x.unsqueeze(1) if x.dim() == 3 else x


def spread_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """``mask`` as a view of shape (B, Hq, Lq, Lk), its stride 0 where it is broadcast; q and k have any rank."""
    return heads(mask.expand((*q.shape[:-1], k.shape[-2])))


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_lengths: Tensor | None) -> None:
    """Raises ValueError, one line, where the arguments do not fit together."""
    if q.dim() not in (3, 4) or k.dim() != q.dim() or v.shape != k.shape:
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip("qkv", (q, k, v), strict=True))
        raise ValueError(f"attention: {shapes} are not all (B, H, L, D)")
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dimension")
    if q.dim() == 4 and (q.shape[1] % max(k.shape[1], 1) or (q.shape[1] and not k.shape[1])):
        raise ValueError(f"attention: {q.shape[1]} heads of q are no multiple of the {k.shape[1]} of k and v")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"attention: q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise ValueError(f"attention: the mask has dtype {mask.dtype}; it is bool (True attends) or float (added)")
        want = (*q.shape[:-1], k.shape[-2])
        short = want[len(want) - mask.dim() :]
        if mask.dim() > len(want) or any(m not in (1, w) for m, w in zip(mask.shape, short, strict=True)):
            raise ValueError(f"attention: a mask of {tuple(mask.shape)} does not broadcast to {tuple(want)}")
    if key_lengths is not None and (
        tuple(key_lengths.shape) != (q.shape[0],) or key_lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"attention: key_lengths is not ({q.shape[0]},) of int32 or int64")


def allocate(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, key_lengths: Tensor | None = None,
    causal: bool = False, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output: q's shape, laid out (B, Lq, Hq, D): joining the heads is free.  Raises ValueError."""
    _check(q, k, v, mask, key_lengths)
    if q.dim() == 3:
        return (torch.empty(q.shape, dtype=q.dtype, device=q.device),)
    return (torch.empty(q.transpose(1, 2).shape, dtype=q.dtype, device=q.device).transpose(1, 2),)


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, key_lengths: Tensor | None = None,
    causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q (B, Hq, Lq, D) over k and v (B, Hkv, Lk, D), computed in float32, or float64 where q is.

    Rank 3, (N, L, D), stands for one head a batch.  ``mask``: bool, True attends, or float, added to the scaled scores;
    broadcast to (B, Hq, Lq, Lk).  ``key_lengths`` (B,): keys from there on do not exist.  ``causal``: query i attends
    keys j <= i.  ``scale``: D ** -0.5 where None.  A query with nothing to attend gives zeros."""
    (out,) = allocate(q, k, v, mask, key_lengths, causal, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, step = k.shape[-2], max(1, 2**25 // max(1, q[..., 0, 0].numel() * k.shape[-2])) if q.numel() else 1
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    target, full = heads(out), None if mask is None else spread_mask(mask, q, k)
    q, k, v = heads(q), heads(k).to(wide), heads(v).to(wide)
    at = torch.arange(keys, device=q.device)
    if key_lengths is not None:  # what lies past the end may be anything, NaN included
        past = (at >= key_lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(past, 0), v.masked_fill(past, 0)
    k, v = (x.repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1) for x in (k, v))
    for i in range(0, q.shape[2], step):  # in pieces: the scores of 4096 pixels would take gigabytes
        rows = slice(i, i + step)
        scores = q[:, :, rows].to(wide) @ k.transpose(-1, -2) * scale
        if full is not None:
            part = full[:, :, rows]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.to(wide)
        if key_lengths is not None:
            scores = scores.masked_fill(past.transpose(-1, -2), -torch.inf)
        if causal:
            scores = scores.masked_fill(at > torch.arange(i, i + scores.shape[2], device=q.device)[:, None], -torch.inf)
        target[:, :, rows] = _softmax(scores) @ v
    return out


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; zeros where every score is -inf or there is none."""
    if scores.shape[-1] == 0:
        return scores
    empty = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def cost(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, key_lengths: Tensor | None = None,
    causal: bool = False, scale: float | None = None,
) -> Cost:  # fmt: skip
    """Two products of 2 D operations for each pair of a query and a key (the open half where causal)."""
    queries, keys = q.shape[-2], k.shape[-2]
    open_rows = min(queries, keys)
    pairs = queries * keys if not causal else open_rows * (open_rows + 1) // 2 + (queries - open_rows) * keys
    extra = 0 if mask is None else mask.numel() * mask.element_size()
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size() + extra
    return Cost(flops=4 * pairs * q.shape[:-2].numel() * q.shape[-1], bytes=moved)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Any, key_lengths: Any, causal: bool, scale: float | None) -> Tensor:
    if key_lengths is not None:
        keep = torch.arange(k.shape[2], device=k.device)[None, None, None] < key_lengths[:, None, None, None]
        if mask is None:
            mask = keep
        else:
            mask = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    q, k, v, mask, lengths, *rest = args
    if mask is not None and mask.dim() == q.dim() and mask.shape[0] > 1:
        mask = mask[b : b + 1]
    lengths = None if lengths is None else lengths[b : b + 1]
    return (q[b : b + 1], k[b : b + 1], v[b : b + 1], mask, lengths, *rest)


_Eager = Callable[..., Tensor]
_SCORES: Mapping[str, _Eager] = {
    "scaled scores": lambda q, kt, scale: q @ kt * scale,
    "scaled queries": lambda q, kt, scale: (q * scale) @ kt,
    "divided scores": lambda q, kt, scale: q @ kt / scale,
}


def _inputs(masked: bool, rank: int = 4) -> Callable[[], tuple[Tensor, ...]]:
    lead = (2, 3) if rank == 4 else (3,)
    return lambda: tuple(torch.zeros(*lead, *s) for s in ((4, 6), (5, 6), (5, 6), (4, 5))[: 4 if masked else 3])


def _sdpa(masked: bool, causal: bool, grouped: bool) -> Spelling:
    def plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 0.3) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)

    def with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float = 0.3) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)

    words = [w for w, on in (("masked", masked), ("causal", causal), ("grouped", grouped)) if on]
    name = " ".join(["scaled_dot_product_attention", *words])
    return Spelling(name, with_mask if masked else plain, _inputs(masked), lambda **c: {**c, "causal": causal})


def _composed(form: str, masked: bool, upcast: bool) -> Spelling:
    scores = _SCORES[form]

    def weights(s: Tensor, q: Tensor) -> Tensor:
        return s.softmax(-1, dtype=torch.float32).to(q.dtype) if upcast else s.softmax(-1)

    def plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 0.3) -> Tensor:
        return weights(scores(q, k.transpose(-1, -2), scale), q) @ v

    def with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float = 0.3) -> Tensor:
        return weights(scores(q, k.transpose(-1, -2), scale) + mask, q) @ v

    def call(scale: float, **captures: Any) -> Mapping[str, Any]:
        return {**captures, "scale": 1 / scale if form.startswith("divided") else scale}

    name = " ".join([form, *(["masked"] if masked else []), *(["softmax in float32"] if upcast else [])])
    return Spelling(name, with_mask if masked else plain, _inputs(masked), call)


def _unscaled(masked: bool, upcast: bool) -> Spelling:
    """As T5 has it: its relative position bias is the mask."""

    def weights(s: Tensor, q: Tensor) -> Tensor:
        return s.float().softmax(-1).type_as(q) if upcast else s.softmax(-1)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights(q @ k.transpose(-1, -2), q) @ v

    def with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return weights(q @ k.transpose(-1, -2) + mask, q) @ v

    name = " ".join(["unscaled scores", *(["masked"] if masked else []), *(["softmax in float32"] if upcast else [])])
    return Spelling(name, with_mask if masked else plain, _inputs(masked), lambda **c: {**c, "scale": 1.0})


def _baddbmm(masked: bool) -> Spelling:
    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float = 0.3) -> Tensor:
        scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=1 if masked else 0, alpha=scale)
        return torch.bmm(scores.softmax(-1), v)

    def call(bias: Any, **captures: Any) -> Mapping[str, Any]:
        return {**captures, "mask": bias} if masked else captures  # beta 0: the bias is not read

    return Spelling("baddbmm masked" if masked else "baddbmm", eager, _inputs(True, rank=3), call)


_BOTH = (False, True)
SPELLINGS = [
    *(_sdpa(masked, False, grouped) for masked in _BOTH for grouped in _BOTH),
    *(_sdpa(False, True, grouped) for grouped in _BOTH),
    *(_composed(form, masked, upcast) for form in _SCORES for masked in _BOTH for upcast in _BOTH),
    *(_unscaled(masked, upcast) for masked in _BOTH for upcast in _BOTH),
    *(_baddbmm(masked) for masked in _BOTH),
]


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, kv_heads, repeats = draw.integer(1, 2), draw.integer(1, 2), draw.integer(1, 3)
    queries, keys, dim = draw.integer(0, 70), draw.integer(0, 90), draw.integer(1, 130)
    layouts = ("contiguous", "unaligned", "padded", "strided", "transposed")
    q = draw.tensor((batch, queries, kv_heads * repeats, dim), dtype, layouts=layouts).transpose(1, 2)
    k, v = (draw.tensor((batch, kv_heads, keys, dim), dtype, layouts=layouts) for _ in range(2))
    kind = draw.choice(("none", "bool", "float"))
    mask = None if kind == "none" else draw.dense((batch, 1, queries, keys), draw.choice((dtype, torch.float32)))
    mask = mask > -0.5 if mask is not None and kind == "bool" else mask
    lengths = torch.tensor(draw.shape(*[keys] * batch)) if draw.flag() else None
    return (q, k, v, mask, lengths, draw.flag(), None)


OP = register(
    Op(
        name="attention",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={  # at "large logits" the reference itself, run in float32, is off by rms 3.7e-6, peak 1.4e-5
            torch.float32: Tolerance(rms=8e-6, peak=3e-5),
            torch.bfloat16: Tolerance(rms=4e-3, peak=8e-3),
            torch.float16: Tolerance(rms=5e-4, peak=1e-3),
        },
        cases=CASES,
        spellings=SPELLINGS,
        eager=_eager,
        alone=_alone,
        draw=_draw,
        formula="softmax(scale q k^T + mask) v",
        source="Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1",
    )
)
