"""A 3x3 weight as :mod:`.winograd_conv2d` reads it where filters of 6 x 6 points would take too much memory: its nine
taps, of which a convolution makes the 36 as it goes.

A session lays it so once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register
from fusegen.kernels.winograd_filters import PANEL

SCHEMA = "(Tensor weight) -> Tensor"


def shape_of(outputs: int, inputs: int) -> tuple[int, ...]:
    """The shape of such a weight's taps."""
    return (-(-outputs // PANEL), inputs, 9, PANEL)


def allocate(weight: Tensor) -> tuple[Tensor, ...]:
    """The uninitialised taps (P, I, 9, 16) of weight (O, I, 3, 3), contiguous, at least float32; P panels of 16 output
    channels, zeros after the last.  Raises ValueError for another shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"winograd_taps: weight has shape {tuple(weight.shape)}, not (O, I, 3, 3)")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (torch.empty(shape_of(*weight.shape[:2]), dtype=dtype, device=weight.device),)


def reference(weight: Tensor) -> Tensor:
    """The same values, their axes in another order."""
    (out,) = allocate(weight)
    whole, outputs = weight.shape[0] // PANEL, weight.shape[0]
    lines = weight.flatten(2).permute(1, 2, 0)  # (I, 9, O)
    out[:whole] = lines[..., : whole * PANEL].unflatten(-1, (whole, PANEL)).permute(2, 0, 1, 3)
    if outputs % PANEL:
        out[whole].zero_()
        out[whole, ..., : outputs % PANEL] = lines[..., whole * PANEL :]
    return out


def weight_of(taps: Tensor) -> Tensor:
    """The weight (16 P, I, 3, 3) whose taps these are, with what pads the outputs."""
    return taps.permute(0, 3, 1, 2).flatten(0, 1).unflatten(-1, (3, 3))


def cost(weight: Tensor) -> Cost:
    """Every value read and written."""
    return Cost(flops=0, bytes=weight.numel() * (weight.element_size() + 4))


def _case(name: str, outputs: int, inputs: int, **how: Any) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.randn(outputs, inputs, 3, 3, generator=g).to(dtype),)

    return Case(name, build, **how)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return (draw.tensor((*draw.shape(40, 20), 3, 3), dtype),)


OP = register(
    Op(
        name="winograd_taps",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=dict.fromkeys(FLOATS, Tolerance(rms=0.0, peak=0.0)),
        cases=[
            _case("small", 3, 5), _case("one channel", 1, 1), _case("no outputs", 0, 4), _case("no inputs", 4, 0),
            _case("whole panels", 32, 7), _case("wide", 40, 33),
            _case("1280x1280", 1280, 1280, dtypes=(torch.float32,), bench=True),
        ],
        alone=None,
        draw=_draw,
        formula="w, its nine taps side by side, in panels of 16 outputs",
        source="Lavin & Gray 2015, arXiv:1509.09308",
    )
)  # fmt: skip
