"""The weight of a linear layer in panels, as kernels for many rows read it: pairs of columns of 32 rows together, of
int8 fours of columns, whole steps of 64; of float32 columns of 16 rows.

They depend on the weight alone: a session makes them once, and :mod:`.packed_linear` takes them.  With a second weight,
the gate of a gated layer, the first half of a panel holds rows of the gate and the other the same rows of the weight,
so that :mod:`.packed_gated_linear` finds both factors of a product in one tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import LAYOUTS, Draw, laid_out
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor weight, Tensor? gate=None, ScalarType? dtype=None) -> Tensor"
# What products are of -> (rows that lie together, columns of a word, words of a step).  A tile of float32 is 6 rows by
# 16 outputs on AVX2: 16 registers.
_FORMS = {torch.float32: (16, 1, 1), torch.bfloat16: (32, 2, 1), torch.int8: (32, 4, 16)}


def shape_of(outputs: int, width: int, gated: bool, products: torch.dtype) -> tuple[int, ...]:
    """The panels' shape for a weight (N, K): for ``products`` of bfloat16 (P, ceil(K / 2), 32, 2), of int8
    (P, 16 ceil(K / 64), 32, 4), of float32 (P, K, 16, 1); P panels hold the N rows, and as many of the gate where there
    is one.
    """
    rows, word, step = _FORMS[products]
    return (-(-outputs // (rows // 2 if gated else rows)), -(-width // (word * step)) * step, rows, word)


def allocate(
    weight: Tensor, gate: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised panels (:func:`shape_of`) of weight (N, K) or (N, K, 1, 1), a convolution's, and a gate of
    its shape and dtype: contiguous, in ``dtype`` or weight's, zeros behind the last row and column; for products of
    float32 where that is asked for, of int8 where weight is, else in pairs.  Raises ValueError for anything else.
    """
    if weight.dim() not in (2, 4) or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(f"linear_panels: weight has shape {tuple(weight.shape)}, not (N, K) or (N, K, 1, 1)")
    if gate is not None and (gate.shape != weight.shape or gate.dtype != weight.dtype):
        raise ValueError(
            f"linear_panels: gate is {gate.dtype} {tuple(gate.shape)}, weight {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.dtype == torch.int8 and dtype not in (None, torch.int8):
        raise ValueError(f"linear_panels: codes stay torch.int8, {dtype} is asked for")
    whole = dtype if dtype == torch.float32 else torch.bfloat16
    products = torch.int8 if weight.dtype == torch.int8 else whole
    shape = shape_of(weight.shape[0], weight.shape[1], gate is not None, products)
    return (torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device),)


def reference(weight: Tensor, gate: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The same values in another order, rounded to ``dtype``."""
    (out,) = allocate(weight, gate, dtype)
    if not out.numel():
        return out
    parts = [t.flatten(1) for t in (gate, weight) if t is not None]
    rows, columns = out.shape[2] // len(parts), out.shape[1] * out.shape[3]
    down, across = out.shape[0] * rows - weight.shape[0], columns - weight.shape[1]
    whole = [F.pad(t, (0, across, 0, down)) if down or across else t.contiguous() for t in parts]
    for i, part in enumerate(whole):
        words = part.view(out.shape[0], rows, out.shape[1], out.shape[3]).transpose(1, 2)
        out[:, :, i * rows : (i + 1) * rows].copy_(words)
    return out


def unpacked(panels: Tensor, outputs: int, width: int, gated: bool = False) -> tuple[Tensor, ...]:
    """The weight (N, K) that the panels hold, row by row; with ``gated`` the gate's and the weight."""
    parts = 2 if gated else 1
    rows = panels.transpose(1, 2).unflatten(1, (parts, panels.shape[2] // parts))
    return tuple(rows[:, i].flatten(0, 1).flatten(1).contiguous()[:outputs, :width] for i in range(parts))


def cost(weight: Tensor, gate: Tensor | None = None, dtype: torch.dtype | None = None) -> Cost:
    """Every value read and written."""
    values = weight.numel() * (1 if gate is None else 2)
    return Cost(flops=0, bytes=values * (weight.element_size() + (dtype or weight.dtype).itemsize))


def _case(
    name: str, shape: tuple[int, ...], *, gated: bool = False, layout: str = "contiguous",
    to: torch.dtype | None = None, bench: bool = False,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        if to == torch.int8:
            codes = [torch.randint(-128, 128, shape, generator=g, dtype=to) for _ in range(2 if gated else 1)]
            return (codes[0], codes[1] if gated else None, None)
        weight = laid_out(torch.randn(shape, generator=g).to(dtype), layout)
        return (weight, torch.randn(shape, generator=g).to(dtype) if gated else None, to)

    return Case(name, build, dtypes=FLOATS if to is None else (torch.float32,), bench=bench)


CASES = [
    _case("small", (3, 5)),
    _case("gated", (40, 6), gated=True),
    _case("one by one convolution", (33, 8, 1, 1), layout="channels_last"),
    _case("one element", (1, 1), gated=True),
    _case("no outputs", (0, 4)),
    _case("no columns", (4, 0), gated=True),
    _case("whole panels", (64, 32)),
    _case("strided", (31, 9), layout="transposed"),
    _case("of float32", (70, 147), to=torch.float32),
    _case("of float32, gated", (40, 64), gated=True, to=torch.float32),
    _case("one of float32", (1, 1, 1, 1), to=torch.float32),
    _case("rounded", (70, 147), to=torch.bfloat16),
    _case("rounded, gated", (40, 64), gated=True, to=torch.bfloat16),
    _case("int8", (70, 147), to=torch.int8),
    _case("int8, gated", (40, 128), gated=True, to=torch.int8),
    _case("one int8", (1, 1), to=torch.int8),
    _case("5120x1280 rounded", (5120, 1280), to=torch.bfloat16, bench=True),
    _case("5120x1280 of float32", (5120, 1280), to=torch.float32, bench=True),
]


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = draw.shape(70, 140 if dtype == torch.int8 else 40)
    if dtype == torch.int8:
        codes = [torch.randint(-128, 128, shape, generator=draw.generator(), dtype=dtype) for _ in range(2)]
        return (codes[0], draw.choice((None, codes[1])), None)
    return (
        draw.tensor(shape, dtype, layouts=LAYOUTS),
        draw.maybe(shape, (dtype,)),
        draw.choice((None, torch.bfloat16)),
    )


OP = register(
    Op(
        name="linear_panels",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={dtype: Tolerance(rms=0.0, peak=0.0) for dtype in (*FLOATS, torch.int8)},
        cases=CASES,
        alone=None,
        draw=_draw,
        formula="W in panels of 32 rows, by pairs of columns, or fours of int8",
        source="Goto & van de Geijn 2008, ACM TOMS 34(3)",
    )
)
