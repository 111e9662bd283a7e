"""One step of any sampler: guidance, denoised prediction, linear combination, noise, next model input.

A sampler is a table of coefficients (Karras et al. 2022, Lu et al. 2022 and the others are all linear in what is
listed here).  Row ``i`` says how evaluation ``i`` of the model turns into the next ``x``:

    o        = out, or with guidance u + g (c - u) of out = [u; c] (Ho & Salimans 2022),
               times rescale std(c) / std(o) + 1 - rescale (Lin et al. 2023, equations 15-16)
    denoised = P_X x + P_OUT o
    denoised   clamped to [-s, s], over s              with ``threshold`` p: s = max(1, p-quantile of the sample's
                                                       |denoised|) (dynamic thresholding, Saharia et al. 2022, 2.3)
    denoised   clamped to [-CLIP, CLIP]
    next     = X x + D denoised + sum_j HX_j history[j] + sum_j HD_j history[SLOTS + j] + NOISE n
    next     = mask next + (1 - mask) (KNOWN known + KNOWN_NOISE k)     with ``mask`` and ``known`` (inpainting: Lugmayr
                                                       et al. 2022, equation 8; 1 is where the model paints)
    input    = INPUT next                        in out's dtype, twice where out is [u; c]
    then     history[STORE_X] = x, history[SLOTS + STORE_D] = denoised   (-1 stores nothing)

``n`` is ``noise_normal`` at (seed of the sample, step STEP, sample 0), ``k`` at (seed, step KNOWN_STEP, sample 0): step
0 keeps the known part on the path that starts at the loop's first state, STEP draws it anew as RePaint does.  The
quantile lies on a line between two of the sorted values (``torch.quantile``); infinities and NaN count there as the
largest finite number.  A term whose coefficient is zero is not read,
so an infinity or a NaN there does no harm.  ``history`` is read before it is written.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.noise_normal import normal_numpy
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = (
    "(Tensor x, Tensor out, Tensor row, Tensor(a!) history, Tensor seeds, Tensor guidance, float rescale=0.0, "
    "float threshold=0.0, Tensor? mask=None, Tensor? known=None) -> (Tensor, Tensor, Tensor)"
)
SLOTS = 4
P_X, P_OUT, CLIP, X, D, NOISE, INPUT, STEP, STORE_X, STORE_D = range(10)
HX0, HX1, HX2, HX3, HD0, HD1, HD2, HD3 = range(10, 18)
KNOWN, KNOWN_NOISE, KNOWN_STEP = 18, 19, 20
ROW = 21
_NAMES = ("P_X", "P_OUT", "CLIP", "X", "D", "NOISE", "INPUT", "STEP", "STORE_X", "STORE_D")
NAMES = _NAMES + tuple(f"HX{j}" for j in range(SLOTS)) + tuple(f"HD{j}" for j in range(SLOTS))
NAMES += ("KNOWN", "KNOWN_NOISE", "KNOWN_STEP")
LARGEST = torch.finfo(torch.float32).max


def make_row(**coefficients: float) -> list[float]:
    """A row by name: what is not named is zero, but INPUT is 1, CLIP is infinite and nothing is stored.

    Raises KeyError for a name that is not in ``NAMES``.
    """
    row = [0.0] * ROW
    row[INPUT], row[CLIP], row[STORE_X], row[STORE_D] = 1.0, math.inf, -1.0, -1.0
    for name, value in coefficients.items():
        if name not in NAMES:
            raise KeyError(f"sampler_step: a row has no {name!r}; it has {', '.join(NAMES)}")
        row[NAMES.index(name)] = float(value)
    return row


def allocate(
    x: Tensor, out: Tensor, row: Tensor, history: Tensor, seeds: Tensor, guidance: Tensor, rescale: float = 0.0,
    threshold: float = 0.0, mask: Tensor | None = None, known: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised (next, model input, denoised): of x's, out's and x's shape and dtype, contiguous.

    Raises ValueError naming the argument whose shape does not fit x (B, *).
    """
    batch, inner = x.shape[0], tuple(x.shape[1:])
    fits = {
        "out": tuple(out.shape[1:]) == inner and out.shape[0] in (batch, 2 * batch),
        "row": tuple(row.shape) == (ROW,),
        "history": tuple(history.shape) == (2 * SLOTS, batch, *inner),
        "seeds": tuple(seeds.shape) == (batch,) and seeds.dtype == torch.int64,
        "guidance": tuple(guidance.shape) == (batch,),
        "mask": mask is None or mask.shape == x.shape,
        "known": known is None or known.shape == x.shape,
    }
    given: dict[str, Any] = {"out": out, "row": row, "history": history, "seeds": seeds, "guidance": guidance}
    given |= {"mask": mask, "known": known}
    for name in (name for name, fit in fits.items() if not fit):
        what = f"{name}, {given[name].dtype} of shape {tuple(given[name].shape)}"
        raise ValueError(f"sampler_step: {what}, does not fit x {tuple(x.shape)}")
    if (mask is None) != (known is None):
        raise ValueError("sampler_step: mask and known go together; one of them is None")
    if not 0 <= threshold <= 1:
        raise ValueError(f"sampler_step: threshold is {threshold}; it is a quantile from 0 (off) to 1")
    made = ((x.shape, x.dtype), (out.shape, out.dtype), (x.shape, x.dtype))
    return tuple(torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in made)


def guided(out: Tensor, guidance: Tensor, rescale: float) -> Tensor:
    """Classifier-free guidance of out = [u; c] (2B, *), with the rescale of Lin et al. where it is not zero.

    A sample whose guided prediction has no deviation is left as it is.
    """
    uncond, cond = out.chunk(2)
    each = (-1,) + (1,) * (out.dim() - 1)
    o = uncond + guidance.to(out.dtype).reshape(each) * (cond - uncond)
    if rescale != 0.0 and o.numel():
        std_cond, std = (t.flatten(1).std(1, correction=0) for t in (cond, o))
        factor = torch.where(std > 0, rescale * std_cond / std + (1 - rescale), torch.ones_like(std))
        o = o * factor.reshape(each)
    return o


def reference(
    x: Tensor, out: Tensor, row: Tensor, history: Tensor, seeds: Tensor, guidance: Tensor, rescale: float = 0.0,
    threshold: float = 0.0, mask: Tensor | None = None, known: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(next, model input, denoised) in x's dtype (float32; float64 in tests) but the input in out's; writes history."""
    outs = allocate(x, out, row, history, seeds, guidance, rescale, threshold, mask, known)
    r = [float(v) for v in row.tolist()]
    twice = out.shape[0] != x.shape[0]
    o = guided(out.to(x.dtype), guidance, rescale) if twice else out.to(x.dtype)
    denoised = thresholded(_sum(x, [(r[P_X], x), (r[P_OUT], o)]), threshold).clamp(-r[CLIP], r[CLIP])
    terms = [(r[X], x), (r[D], denoised)]
    terms += [(r[HX0 + j], history[j]) for j in range(2 * SLOTS)]
    if r[NOISE] != 0.0:
        terms.append((r[NOISE], _noise(x, seeds, int(r[STEP]))))
    following = _sum(x, terms)
    if mask is not None and known is not None:
        terms = [(r[KNOWN], known)]
        if r[KNOWN_NOISE] != 0.0:
            terms.append((r[KNOWN_NOISE], _noise(x, seeds, int(r[KNOWN_STEP]))))
        following = mask * following + (1 - mask) * _sum(x, terms)
    for first, slot, value in ((0, int(r[STORE_X]), x), (SLOTS, int(r[STORE_D]), denoised)):
        if slot >= 0:
            history[first + slot] = value
    scaled = r[INPUT] * following
    outs[0].copy_(following)
    outs[1].copy_(torch.cat([scaled, scaled]) if twice else scaled)
    outs[2].copy_(denoised)
    return outs[0], outs[1], outs[2]


def rank(threshold: float, count: int) -> tuple[int, float]:
    """Between which two of ``count`` sorted values the quantile lies: the lower one's index, and how far it is on."""
    place = threshold * (count - 1)
    return int(place), place - int(place)


def thresholded(denoised: Tensor, threshold: float) -> Tensor:
    """Dynamic thresholding of denoised (B, *): see the module's text; as it is where threshold is 0."""
    if threshold == 0 or not denoised.numel():
        return denoised
    size = denoised.flatten(1).abs()
    ordered = torch.where(size < LARGEST, size, LARGEST).sort(1).values
    k, part = rank(threshold, size.shape[1])
    low, high = ordered[:, k], ordered[:, min(k + 1, size.shape[1] - 1)]
    s = (low + part * (high - low)).clamp(min=1).reshape(-1, *(1,) * (denoised.dim() - 1))
    return denoised.clamp(-s, s) / s


def _noise(x: Tensor, seeds: Tensor, step: int) -> Tensor:
    return torch.from_numpy(normal_numpy(seeds.cpu().numpy(), tuple(x.shape[1:]), step)).to(x)


def _sum(like: Tensor, terms: list[tuple[float, Tensor]]) -> Tensor:
    total = torch.zeros_like(like)
    for coefficient, tensor in terms:
        if coefficient != 0.0:
            total = total + coefficient * tensor
    return total


def cost(
    x: Tensor, out: Tensor, row: Tensor, history: Tensor, seeds: Tensor, guidance: Tensor, rescale: float = 0.0,
    threshold: float = 0.0, mask: Tensor | None = None, known: Tensor | None = None,
) -> Cost:  # fmt: skip
    """The least a step can do: x, out, mask and known read, the three outputs written; history and noise depend on the
    row."""
    guide = (3 + (6 if rescale else 0)) if out.shape[0] != x.shape[0] else 0
    read = 12 + (8 if mask is not None else 0)
    return Cost(flops=(guide + 8) * x.numel(), bytes=read * x.numel() + 2 * out.numel() * out.element_size())


def _case(
    name: str,
    shape: tuple[int, ...],
    row: dict[str, float],
    *,
    twice: bool = True,
    rescale: float = 0.0,
    threshold: float = 0.0,
    inpaint: bool = False,
    poison: tuple[int, ...] = (),
    bench: bool = False,
    small: bool = True,
) -> Case:
    """``twice``: out is [u; c].  ``poison``: slots of history that hold NaN, which the row must not read."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(shape, generator=g)
        out = torch.randn((shape[0] * (1 + twice), *shape[1:]), generator=g).to(dtype)
        history = torch.randn((2 * SLOTS, *shape), generator=g)
        for slot in poison:
            history[slot] = math.nan
        seeds = torch.randint(-(2**63), 2**63 - 1, (shape[0],), generator=g, dtype=torch.int64)
        guidance = 1 + 6 * torch.rand(shape[0], generator=g)
        mask, known = (torch.rand(shape, generator=g) for _ in range(2)) if inpaint else (None, None)
        if mask is not None:
            mask = torch.where(mask < 0.4, 0.0, torch.where(mask < 0.8, 1.0, mask))
        return (x, out, torch.tensor(make_row(**row)), history, seeds, guidance, rescale, threshold, mask, known)

    return Case(name, build, dtypes=FLOATS, bench=bench, small=small)


_EULER = {"P_X": 1.0, "P_OUT": -3.7, "X": 0.8, "D": 0.2, "INPUT": 0.31}
_ANCESTRAL = {**_EULER, "NOISE": 0.6, "STEP": 11.0}
_MULTISTEP = {**_EULER, "HD0": -0.21, "HD2": 0.07, "STORE_D": 1.0}
_ALL = {**_ANCESTRAL, "CLIP": 1.5, "STORE_X": 3.0, "STORE_D": 0.0, "HX0": 0.1, "HX1": -0.2, "HX2": 0.3, "HX3": 0.15}
_ALL |= {"HD0": 0.05, "HD1": -0.15, "HD2": 0.25, "HD3": -0.35}
_KNOWN = {**_ANCESTRAL, "KNOWN": 0.8, "KNOWN_NOISE": 0.6, "KNOWN_STEP": 3.0}

CASES = [
    _case("euler", (2, 3, 8, 8), _EULER, poison=tuple(range(8))),
    _case("euler without guidance", (2, 3, 8, 8), _EULER, twice=False),
    _case("ancestral", (3, 3, 7, 5), _ANCESTRAL),
    _case("multistep", (2, 3, 8, 8), _MULTISTEP, poison=(0, 1, 2, 3, 5, 7)),
    _case("every term", (2, 4, 11, 13), _ALL),
    _case("every term without guidance", (3, 331), _ALL, twice=False),
    _case("every term, rescaled", (2, 4, 11, 13), _ALL, rescale=0.7),
    _case("clipped", (2, 3, 8, 8), {**_EULER, "CLIP": 1.0}),
    _case("threshold", (2, 3, 8, 8), _EULER, threshold=0.995),
    _case("threshold of few, clipped", (5, 7), {**_EULER, "CLIP": 0.9}, threshold=0.5, rescale=0.5),
    _case("threshold of everything", (2, 3, 11, 13), _ALL, threshold=1.0, twice=False),
    _case("threshold below one", (2, 301), {"P_OUT": 0.1, "D": 1.0}, threshold=0.9),
    _case("inpainting", (2, 3, 7, 9), _KNOWN, inpaint=True),
    _case("inpainting, the last step", (2, 70), {**_EULER, "KNOWN": 1.0}, inpaint=True, twice=False),
    _case("inpainting, thresholded", (2, 4, 11, 13), {**_ALL, **_KNOWN}, inpaint=True, threshold=0.95, rescale=0.7),
    _case("x is not used", (2, 70), {"P_OUT": 1.0, "D": 1.0, "STORE_X": 0.0}),
    _case("a stored slot is read and written", (2, 70), {**_EULER, "HX2": 0.5, "STORE_X": 2.0}),
    _case("no batch", (0, 3, 4), _ANCESTRAL),
    _case("no elements", (2, 0), _ANCESTRAL, rescale=0.5),
    _case("one element", (1, 1), _ANCESTRAL),
    _case("one element, rescaled", (1, 1), _ANCESTRAL, rescale=0.5),
    _case("one element, thresholded", (1, 1), {**_KNOWN, "X": 2.0}, threshold=0.5, inpaint=True),
    _case("no elements, thresholded", (2, 0), _KNOWN, threshold=0.5, inpaint=True),
    _case("many short samples", (37, 5), _ALL, rescale=0.3),
    _case("large sample", (1, 4, 96, 96), _ALL, rescale=0.7, small=False),
    _case("1x4x64x64 euler", (1, 4, 64, 64), _EULER, bench=True),
    _case("1x4x64x64 ancestral, rescaled", (1, 4, 64, 64), _ANCESTRAL, rescale=0.7, bench=True),
    _case("4x3x64x64 threshold", (4, 3, 64, 64), _EULER, threshold=0.995, bench=True, small=False),
    _case("1x4x64x64 inpainting", (1, 4, 64, 64), _KNOWN, inpaint=True, bench=True, small=False),
    _case("16x3x32x32 multistep", (16, 3, 32, 32), _MULTISTEP, bench=True, small=False),
    _case("4x4x128x128 ancestral", (4, 4, 128, 128), _ANCESTRAL, bench=True, small=False),
]


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, out, row, history, seeds, guidance, rescale, threshold, mask, known = args
    own = out[b :: x.shape[0]].contiguous()  # the unconditional and the conditional prediction of sample b
    one = slice(b, b + 1)
    inpaint = (None, None) if mask is None else (mask[one], known[one])
    return (x[one], own, row, history[:, one].contiguous(), seeds[one], guidance[one], rescale, threshold, *inpaint)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, inner = draw.integer(0, 3), draw.shape(*[60] * draw.integer(1, 2))
    coefficients, whole = (0.0, 1.0, -0.5, 0.125), ("CLIP", "STEP", "KNOWN_STEP", "STORE_X", "STORE_D")
    row = {name: draw.choice(coefficients) for name in NAMES if name not in whole}
    row |= {"STEP": draw.integer(0, 2**24), "KNOWN_STEP": draw.integer(0, 9), "CLIP": draw.choice((1.0, float("inf")))}
    row |= {name: draw.integer(-1, SLOTS - 1) for name in ("STORE_X", "STORE_D")}
    x = draw.dense((batch, *inner), torch.float32)
    out = draw.dense((batch * draw.integer(1, 2), *inner), dtype)
    history = draw.dense((2 * SLOTS, batch, *inner), torch.float32)
    seeds, guidance = torch.arange(batch) * 3 - 1, draw.dense((batch,), torch.float32, mean=2.0)
    options = (draw.choice((0.0, 0.5)), draw.choice((0.0, 0.0, 0.5, 0.995, 1.0)))
    inpaint = [draw.dense(x.shape, torch.float32).sigmoid() for _ in range(2)] if draw.flag() else (None, None)
    return (x, out, torch.tensor(make_row(**row)), history, seeds, guidance, *options, *inpaint)


OP = register(
    Op(
        name="sampler_step",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=1e-6, peak=2e-6),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        mutates=("history",),
        alone=_alone,
        draw=_draw,
        formula="next x: a linear combination of x, earlier x's, guided denoised predictions and noise",
        source="Karras et al. 2022, arXiv:2206.00364; Ho & Salimans 2022, arXiv:2207.12598; Saharia et al. 2022, "
        "arXiv:2205.11487; Lugmayr et al. 2022, arXiv:2201.09865",
    )
)
