"""One token a row from logits: penalties, bias, mask, temperature, truncation, a draw, and log-probabilities.

In this order, each step with the row's own parameters (a tensor of one value a row; None leaves the step out):

    y      the logits in float32; NaN counts as -inf, +inf as the largest finite number
    y      of a token in the history: y / repetition, or y * repetition where y < 0   (Keskar et al. 2019)
    y     -= count * frequency, then -= presence    of a token in the history past ``prompt_lengths`` (OpenAI's API)
    y     += bias; y = -inf where the mask forbids; y += each of bias_values at its bias_ids, -inf staying -inf
    d      = (max y - y) * (1 / temperature)        temperature 1 where None
    top-k  keeps d <= the k-th smallest             (Fan et al. 2018; off where k <= 0)
    top-p  keeps those with less than p of the mass before them     (Holtzman et al. 2020; off where p is not < 1)
    min-p  keeps e^-d >= min_p                      (Nguyen et al. 2024; off where min_p is not > 0)
    typical-p keeps those with less than p of the mass nearer to the entropy  (Meister et al. 2023; off if not < 1)

Tokens that tie with the last one kept stay too, so that a set never depends on an order of equals.  Each truncation
takes what the one before it has left.  A temperature that is not above 0, or whose reciprocal is infinite, is greedy:
the largest y, of equals the lowest id.  A row without any y above -inf gives token -1 and log-probability -inf.

**The same token everywhere.**  Masses are integers: ``weights`` turns d into trunc(2^40 e^-d) by IEEE float32 multiply
and add alone, in a fixed order, never fused.  Sums of integers do not depend on their order, so neither threads nor
tiles nor devices move a threshold.  The draw is an inverse of the cumulated mass in the fixed order of ``draw_order``:
64 Philox bits r of (seed, request, position) pick the first token whose cumulated mass exceeds floor(r K / 2^64), K
being the mass kept.  A token below 2^-40 of the likeliest is never drawn.

Log-probabilities are of the distribution drawn from, or, with ``model``, of softmax(logits) as they were given.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakTensorKeyDictionary

from fusegen.kernels.noise_normal import philox
from fusegen.kernels.op import FLOATS, Cost, Op, Tolerance, register
from fusegen.kernels.sample_token_cases import ARGUMENTS, CASES, SCHEMA, SHARED, Arguments, check, draw

LANES = 1024  # tokens i, i + LANES, i + 2 LANES ... stand together in the draw's order
BITS = 40  # the likeliest token's weight is 2^BITS
TAG = 1  # the last word of the Philox counter; noise_normal has 0 there
FARTHEST = 30.0  # e^-d 2^BITS is below 1 from 27.73 on
MAGIC = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
LOG2E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, 2.12194440054690583e-4
TAYLOR = tuple(1.0 / math.factorial(n) for n in range(7, -1, -1))  # of e^r, |r| <= ln(2) / 2
LARGEST = torch.finfo(torch.float32).max


def allocate(*args: Any) -> tuple[Tensor, ...]:
    """The uninitialised (token (B,) int64, log-probability (B,) float32, the ``top`` likeliest tokens (B, top) int64,
    theirs (B, top) float32).  Raises ValueError naming the argument that does not fit logits (B, V)."""
    a = Arguments(*args)
    check(a)
    batch, device = a.logits.shape[0], a.logits.device
    one, several = (batch,), (batch, a.top)
    made = ((one, torch.int64), (one, torch.float32), (several, torch.int64), (several, torch.float32))
    return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in made)


def clean(y: Tensor) -> Tensor:
    """NaN becomes -inf, +inf the largest finite number."""
    return torch.where(y.isnan(), -torch.inf, y).clamp(max=LARGEST)


def weights(d: Tensor) -> Tensor:
    """trunc(2^40 e^-d) of d >= 0 (float32) as float32, in the operations that every device repeats to the bit."""
    d = d.clamp(max=FARTHEST)
    n = (d * -LOG2E + MAGIC) - MAGIC
    r = (n * -LN2_HIGH - d) + n * LN2_LOW
    p = torch.full_like(d, TAYLOR[0])
    for c in TAYLOR[1:]:
        p = p * r + c
    return (p * torch.ldexp(torch.ones_like(n), (n + BITS).to(torch.int32))).trunc()


def random_bits(seed: int, request: int, position: int) -> int:
    """64 uniform bits of Philox-4x32-10: key ``seed``, counter (position, request low, request high, TAG)."""
    word = 0xFFFFFFFF
    counter = (position & word, request & word, request >> 32 & word, TAG)
    high, low, _, _ = philox(
        tuple(np.array([c], np.uint32) for c in counter),  # type: ignore[arg-type]
        (seed & word, seed >> 32 & word),
    )
    return int(high[0]) << 32 | int(low[0])


def draw_order(vocabulary: int) -> Tensor:
    """The order in which masses are cumulated: by i % LANES, then by i."""
    order = torch.arange(-(-vocabulary // LANES) * LANES).view(-1, LANES).T.flatten()
    return order[order < vocabulary]


def _value(a: Arguments, b: int, name: str) -> Any:
    """Row ``b`` of an argument, or all of one that the rows share; None where it is None; floats in float32."""
    if (tensor := getattr(a, name)) is None:
        return None
    own = tensor.cpu() if name in SHARED and tensor.dim() == 1 else tensor.cpu()[b]
    return own.float() if own.is_floating_point() else own


def adjusted(a: Arguments, b: int) -> Tensor:
    """Row ``b`` of y (V,) float32, before temperature."""
    row = functools.partial(_value, a, b)
    y, size = clean(a.logits[b].cpu().float()), a.logits.shape[1]
    if a.history is not None:
        ids = row("history")
        length = ids.numel() if a.history_lengths is None else max(int(a.history_lengths[b]), 0)
        start = 0 if a.prompt_lengths is None else max(int(a.prompt_lengths[b]), 0)
        inside = [v[(v >= 0) & (v < size)] for v in (ids[:length], ids[:length][start:])]
        seen, count = (torch.bincount(v, minlength=size) for v in inside)
        if (r := row("repetition")) is not None:
            y = torch.where(seen > 0, torch.where(y < 0, y * r, y / r), y)
        if (f := row("frequency")) is not None:
            y = torch.where(count > 0, y - count.float() * f, y)
        if (p := row("presence")) is not None:
            y = torch.where(count > 0, y - p, y)
    if (bias := row("bias")) is not None:
        y = y + bias
    y = clean(y)
    if (mask := row("mask")) is not None:
        if mask.dtype != torch.bool:
            mask = (mask[:, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten()[:size] != 0
        y = torch.where(mask, y, -torch.inf)
    if (at := row("bias_ids")) is not None:
        for i, value in zip(at.tolist(), row("bias_values"), strict=True):
            if 0 <= i < size and y[i] != -torch.inf:
                y[i] = clean(y[i] + value)
    return y


def share(mass: int, p: float) -> int:
    """The integer mass that p (float32, below 1) of ``mass`` stands for, at least 1: p in units of 2^-32, rounded
    down."""
    return max(mass * int(max(p, 0.0) * 2.0**32) >> 32, 1)


def boundary(keys: Tensor, weight: Tensor, limit: int) -> Tensor:
    """The smallest key such that the weight of the keys up to it reaches ``limit``."""
    order = torch.argsort(keys)
    total = torch.cumsum(weight[order], 0)
    return keys[order][int((total < limit).sum())]


def truncated(a: Arguments, b: int, d: Tensor, w: Tensor) -> Tensor:
    """Which tokens of row ``b`` are kept (V,) bool; ``w``: the weights of d as integers."""
    keep = d < torch.inf
    value = lambda t, off: off if t is None else t[b].item()  # noqa: E731
    if 0 < (k := int(value(a.top_k, 0))) < int(keep.sum()):
        keep &= d <= boundary(d[keep], torch.ones_like(w[keep]), k)
    if (p := value(a.top_p, 1.0)) < 1:
        keep &= d <= boundary(d[keep], w[keep], share(int(w[keep].sum()), p))
    if (m := value(a.min_p, 0.0)) > 0:
        keep &= w >= int(min(m, 1.0) * 2.0**BITS)
    if (p := value(a.typical_p, 1.0)) < 1:
        mass, moment = w[keep].sum(), (w[keep].float() * d[keep]).to(torch.int64).sum()
        away = (d - moment.float() / mass.float()).abs()
        keep &= away <= boundary(away[keep], w[keep], share(int(mass), p))
    return keep


def _row(a: Arguments, b: int) -> tuple[int, Tensor, float]:
    """(token, y (V,) float64 of what is kept, -inf for the rest, temperature) of row ``b``."""
    y = adjusted(a, b)
    largest = y.max()
    if largest == -torch.inf:
        return -1, y.double(), 1.0
    temperature = torch.ones(()) if a.temperature is None else a.temperature[b].cpu().float()
    inverse = 1.0 / temperature
    if not bool(temperature > 0) or bool(inverse == torch.inf):
        token = int((y == largest).nonzero()[0])
        return token, torch.where(torch.arange(len(y)) == token, 0.0, -torch.inf).double(), 1.0
    gap = largest - y
    d = torch.where(gap < torch.inf, gap * inverse, gap)
    w = weights(d).to(torch.int64)
    keep = truncated(a, b, d, w)
    order = draw_order(len(d))
    total = torch.cumsum(torch.where(keep, w, 0)[order], 0)
    request = 0 if a.requests is None else int(a.requests[b])
    goal = random_bits(int(a.seeds[b]), request, int(a.positions[b])) * int(total[-1]) >> 64
    token = int(order[torch.searchsorted(total, goal, right=True)])
    return token, torch.where(keep, y, -torch.inf).double(), float(temperature)


def reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token, log-probability, top tokens, their log-probabilities); see the module's text.

    Tokens are in exact arithmetic whatever the dtype of the logits (B, V): float64 ones are rounded to float32 first.
    Of equal y the lower id comes first; where fewer than ``top`` are above -inf, -1 and -inf fill up.
    """
    a = Arguments(*args)
    token, logprob, top, top_logprob = outs = allocate(*args)
    for b in range(a.logits.shape[0]):
        picked, ranks, temperature = _row(a, b)
        if a.model:
            ranks, temperature = clean(a.logits[b].cpu().double()), 1.0
        table = torch.log_softmax(torch.where(ranks > -torch.inf, ranks / temperature, ranks), 0)
        token[b], logprob[b] = picked, table[picked] if picked >= 0 else -torch.inf
        top[b], top_logprob[b] = -1, -torch.inf
        if a.top == 0:
            continue
        best = torch.argsort(ranks, descending=True, stable=True)[: a.top]
        best = best[ranks[best] > -torch.inf]
        top[b, : len(best)], top_logprob[b, : len(best)] = best, table[best].float()
    return outs  # type: ignore[return-value]


def cost(*args: Any) -> Cost:
    """The logits, the bias and the mask read once; about 25 operations an element for its weight."""
    a = Arguments(*args)
    read = (t for t in (a.logits, a.bias, a.mask, a.history) if t is not None)
    return Cost(flops=25 * a.logits.numel(), bytes=sum(t.numel() * t.element_size() for t in read))


_DRAWN = WeakTensorKeyDictionary()


@_disable_dynamo  # torch.compiler.disable would import torch._dynamo here and now, two seconds
def _drawn(a: Arguments) -> Tensor | None:
    """The draw's bits as (B, 1) numbers in [0, 1), None where every row is greedy; made once for each tensor of
    seeds."""
    if a.seeds not in _DRAWN:
        requests = torch.zeros_like(a.seeds) if a.requests is None else a.requests
        keys = zip(a.seeds.tolist(), requests.tolist(), a.positions.tolist(), strict=True)
        greedy = a.temperature is not None and not bool(a.temperature.any())
        made = torch.tensor([[random_bits(*k) / 2.0**64] for k in keys], device=a.seeds.device)
        _DRAWN[a.seeds] = None if greedy else made
    found: Tensor | None = _DRAWN[a.seeds]
    return found


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    a = Arguments(*args)
    own: dict[str, Any] = {name: None if (t := getattr(a, name)) is None else t[b : b + 1] for name in ARGUMENTS}
    own |= {name: t for name in SHARED if (t := getattr(a, name)) is not None and t.dim() == 1}
    return tuple(a._replace(**own))


def eager(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As transformers' processors do it: each truncation masks the scores, top-p by a sort, then softmax and a draw.

    The draw is a search in the cumulated probabilities, which takes less time than ``torch.multinomial``; its uniform
    numbers are those of the op, in whose order it cumulates, so that the same token is to come out.  Penalties, sparse
    biases, typical-p and ``top`` have no eager form here.
    """
    a = Arguments(*args)
    y, drawn = a.logits.float(), _drawn(a)
    if drawn is None:
        token = y.argmax(-1)
    else:
        if a.temperature is not None:
            y = y / a.temperature[:, None]
        if a.top_k is not None:
            y = y.masked_fill(y < y.topk(int(a.top_k[0])).values[:, -1:], -torch.inf)
        if a.top_p is not None:
            ordered, index = y.sort(-1)
            gone = ordered.softmax(-1).cumsum(-1) <= 1 - a.top_p[:, None]
            gone[:, -1] = False
            y = y.masked_fill(gone.scatter(1, index, gone), -torch.inf)
        if a.min_p is not None:
            p = y.softmax(-1)
            y = y.masked_fill(p < a.min_p[:, None] * p.amax(-1, keepdim=True), -torch.inf)
        rows = -(-y.shape[1] // LANES)
        p = F.pad(y.softmax(-1, torch.float64), (0, rows * LANES - y.shape[1])).unflatten(1, (rows, LANES))
        total = p.transpose(1, 2).flatten(1).cumsum(-1)
        place = torch.searchsorted(total, drawn * total[:, -1:], right=True)[:, 0]
        token = place % rows * LANES + place // rows
    logprob = y.log_softmax(-1).gather(1, token[:, None])[:, 0]
    return token, logprob, token[:, None][:, :0], logprob[:, None][:, :0]


OP = register(
    Op(
        name="sample_token",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            **dict.fromkeys(FLOATS, Tolerance(rms=1e-6, peak=1e-6)),
            torch.int64: Tolerance(rms=0.0, peak=0.0),  # of tokens
        },
        cases=CASES,
        eager=eager,
        alone=_alone,
        draw=draw,
        formula="token ~ softmax(truncate((penalise(logits) + bias) / temperature)), by the inverse of cumulated mass",
        source="Holtzman et al. 2020, arXiv:1904.09751; Fan et al. 2018, arXiv:1805.04833; Nguyen et al. 2024, "
        "arXiv:2407.01082; Meister et al. 2023, arXiv:2202.00666; Keskar et al. 2019, arXiv:1909.05858",
    )
)
