"""A residual addition or a concatenation of channels, and the group norm of it: both are needed later on.

joined = x + other, rounded to x's dtype, or the channels of x followed by those of other (the skip of a U-Net); y =
activation(group_norm(joined)), the norm of the tensor as it was stored; see :mod:`.group_norm`, also for ``moments``
of a concatenation: those of x's channels followed by those of other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import group_norm
from fusegen.kernels.draw import LAYOUTS, Draw
from fusegen.kernels.group_norm_cases import Inputs, moments_of
from fusegen.kernels.op import Case, Cost, Op, Tolerance, register
from fusegen.kernels.rows import alone, size_of

KINDS = ("add", "concat")
SCHEMA = (
    "(Tensor x, Tensor other, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5,"
    ' str activation="none", str kind="add", Tensor? moments=None) -> (Tensor, Tensor)'
)


def allocate(
    x: Tensor,
    other: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    kind: str = "add",
    moments: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The uninitialised norm and joined tensor: x's dtype, the joined channels, channels-last where x is.

    Raises ValueError where shapes or dtypes do not fit, or a name is not known.
    """
    if kind not in KINDS:
        raise ValueError(f"join_group_norm: no kind is called {kind!r}; there are {', '.join(KINDS)}")
    free = 1 if kind == "concat" and other.dim() > 1 else 0
    same = [n for i, n in enumerate(other.shape) if i != free or not free]
    if other.dtype != x.dtype or same != [n for i, n in enumerate(x.shape) if i != free or not free]:
        raise ValueError(
            f"join_group_norm: other is {other.dtype} {tuple(other.shape)}, x is {x.dtype} {tuple(x.shape)}: they must"
            f" agree{' but for their channels' if free else ''}"
        )
    channels = 0 if x.dim() < 2 else x.shape[1] + (other.shape[1] if free else 0)
    group_norm.check("join_group_norm", x, channels, num_groups, activation, weight=weight, bias=bias)
    y = group_norm.like(x, channels)
    if moments is not None and not free:
        raise ValueError("join_group_norm: moments are given, which only a concatenation has")
    group_norm.check_moments("join_group_norm", y, moments)
    return y, group_norm.like(x, channels)


def reference(
    x: Tensor,
    other: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    kind: str = "add",
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The group norm of the joined tensor, and that tensor; in float32, or float64 where x is."""
    y, joined = allocate(x, other, num_groups, weight, bias, eps, activation, kind, moments)
    wide = torch.promote_types(x.dtype, torch.float32)
    joined.copy_(x.to(wide) + other.to(wide) if kind == "add" else torch.cat([x, other], 1))
    return y.copy_(group_norm.reference(joined, num_groups, weight, bias, eps, activation, moments=moments)), joined


def cost(
    x: Tensor,
    other: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    kind: str = "add",
    moments: Tensor | None = None,
) -> Cost:
    """The norm's operations and the addition's; x and other read once, the norm and the joined tensor written once."""
    elements = x.numel() if kind == "add" else x.numel() + other.numel()
    each = (9 if activation == "silu" else 5) + (kind == "add")
    moved = size_of(x, other, weight, bias, moments) + 2 * elements * x.element_size()
    return Cost(flops=each * elements, bytes=moved)


def _case(inputs: Inputs, other: int = 0) -> Case:
    """``other``: the channels of a concatenation's second part, or 0 for an addition."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        i, channels = inputs, inputs.shape[1]
        tensors = i.tensor(g, dtype), i.tensor(g, dtype, other or channels)
        kind = "concat" if other else "add"
        moments = moments_of(torch.cat(tensors, 1)) if i.moments else None
        return (*tensors, i.groups, *i.affine(g, dtype, channels + other), 1e-5, i.activation, kind, moments)

    return Case(inputs.name, build, bench=inputs.bench, small=inputs.small)


def _bench(other: int, *shape: int, moments: bool = False) -> list[Case]:
    name = "x".join(map(str, shape)) + (f" with {other}" if other else " added") + (" by moments" if moments else "")
    first = Inputs(name, shape, 32, moments=moments, bench=True, small=False)
    return [
        _case(first, other),
        _case(
            Inputs(f"{name} channels-last", shape, 32, "channels_last", moments=moments, bench=True, small=False), other
        ),
    ]


CASES = [
    _case(Inputs("add", (2, 8, 4, 4), 4)),
    _case(Inputs("concat", (2, 8, 4, 4), 4), 12),
    _case(Inputs("add channels-last", (3, 21, 13, 11), 7, "channels_last", activation="none")),
    _case(Inputs("concat channels-last", (2, 20, 9, 7), 4, "channels_last"), 12),
    _case(Inputs("groups across the seam", (2, 10, 5, 7), 3), 11),
    _case(Inputs("groups across the seam, channels-last", (2, 10, 5, 7), 3, "channels_last"), 11),
    _case(Inputs("add rows", (2, 24, 37), 6, "rows")),
    _case(Inputs("concat rows", (2, 24, 37), 3, "rows"), 12),
    _case(Inputs("no batch", (0, 8, 4, 4), 2), 4),
    _case(Inputs("no pixels", (2, 8, 0, 4), 2)),
    _case(Inputs("one element", (1, 1, 1, 1), 1)),
    _case(Inputs("one pixel", (3, 40, 1, 1), 8), 24),
    _case(Inputs("two dimensions", (5, 24), 6)),
    _case(Inputs("five dimensions", (2, 10, 3, 5, 7), 4), 6),
    _case(Inputs("no parameters", (2, 12, 7, 9), 4, parameters="no")),
    _case(Inputs("float32 parameters", (2, 12, 7, 9), 4, parameters="fp32"), 4),
    _case(Inputs("strided", (2, 12, 7, 9), 4, "strided")),
    _case(Inputs("unaligned", (2, 12, 7, 9), 4, "unaligned"), 20),
    _case(Inputs("large, added", (1, 64, 96, 80), 32, small=False)),
    _case(Inputs("large, channels-last", (1, 64, 96, 80), 32, "channels_last", small=False), 32),
    _case(Inputs("concat by moments", (2, 12, 7, 9), 4, moments=True), 20),
    _case(Inputs("concat by moments, channels-last", (2, 21, 23, 17), 6, "channels_last", moments=True), 9),
    _case(Inputs("concat by moments, one pixel", (3, 24, 1, 1), 4, moments=True), 8),
    _case(Inputs("a group larger than the cache", (1, 5, 256, 161), 1, small=False), 3),
    _case(Inputs("a group larger than the cache, channels-last", (1, 5, 256, 161), 1, "channels_last", small=False), 3),
    *_bench(0, 2, 320, 64, 64),
    *_bench(320, 2, 320, 64, 64),
    *_bench(640, 2, 1280, 16, 16),
    *_bench(320, 2, 640, 96, 96),
    *_bench(320, 2, 640, 128, 128),
    *_bench(320, 2, 640, 128, 128, moments=True),
]


def _eager(
    x: Tensor, other: Tensor, groups: int, weight: Any, bias: Any, eps: float, activation: str, kind: str, moments: Any
) -> tuple[Tensor, Tensor]:
    joined = x + other if kind == "add" else torch.cat([x, other], 1)
    y = F.group_norm(joined, groups, weight, bias, eps)
    return (F.silu(y) if activation == "silu" else y), joined


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    groups, width, kind, own = draw.integer(1, 9), draw.integer(1, 30), draw.choice(KINDS), (dtype, torch.float32)
    channels, batch, sides = groups * width, draw.integer(0, 3), draw.shape(*[19] * draw.integer(0, 3))
    split = draw.integer(0, channels) if kind == "concat" else channels
    layout = draw.choice(LAYOUTS)
    shapes = [(batch, split, *sides), (batch, channels - split if kind == "concat" else channels, *sides)]
    x, other = (draw.tensor(shape, dtype, layouts=(layout,)) for shape in shapes)
    weight, bias = draw.maybe((channels,), own), draw.maybe((channels,), own)
    moments = moments_of(torch.cat([x, other], 1)) if kind == "concat" and draw.flag() else None
    return (x, other, groups, weight, bias, 1e-5, draw.choice(group_norm.ACTIVATIONS), kind, moments)


OP = register(
    Op(
        name="join_group_norm",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # In half precision an added result rounds twice: the sum, then its norm.
        tolerance={
            torch.float32: Tolerance(rms=5e-6, peak=1e-5),
            torch.bfloat16: Tolerance(rms=4e-3, peak=6e-3),
            torch.float16: Tolerance(rms=5e-4, peak=7.5e-4),
        },
        cases=CASES,
        eager=_eager,
        alone=alone,
        draw=_draw,
        formula="group_norm(joined), joined where joined = x + other or their channels one after the other",
        source="Ronneberger et al. 2015, arXiv:1505.04597 (the skip); Wu & He 2018, arXiv:1803.08494",
    )
)
