"""The 3x3 filters of a convolution in Winograd's domain: 36 products of channels for the 144 of 4 x 4 pixels; or of a
transposed convolution of stride 2, by 36 matrices too: 81 products for 144 of 4 x 4 pixels of the smaller image.

They depend on the weight alone: a session works them out once; :mod:`.winograd_conv2d` takes the first kind, an
upsampling :mod:`.winograd_modulated_conv2d` the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor weight, bool transposed=False) -> Tensor"
PANEL = 16  # output channels that lie together
# Interpolation at 0, 1, -1, 2, -2 and infinity.
FILTER = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
# Even pixels of a transposed convolution: the polynomial of the outer weights at 0, 1/2 (an 18th of it), -1 (a ninth),
# 2 (a 36th) and infinity, points that round less than 0, 1, -1, 2 and infinity do.  Odd pixels: the weight between.
TRANSPOSED = (
    (1.0, 0.0, 0.0),
    (1 / 18, 0.0, 1 / 36),
    (1 / 9, 0.0, -1 / 9),
    (1 / 36, 0.0, 1 / 18),
    (0.0, 0.0, 1.0),
    (0.0, 1.0, 0.0),
)


def allocate(weight: Tensor, transposed: bool = False) -> tuple[Tensor, ...]:
    """The uninitialised filters (6, 6, P, I, 16) of weight (O, I, 3, 3), contiguous, at least float32; P panels of 16
    output channels, zeros after the last.  Raises ValueError for another shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"winograd_filters: weight has shape {tuple(weight.shape)}, not (O, I, 3, 3)")
    panels = -(-weight.shape[0] // PANEL)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (torch.empty((6, 6, panels, weight.shape[1], PANEL), dtype=dtype, device=weight.device),)


def reference(weight: Tensor, transposed: bool = False) -> Tensor:
    """G w G^T for every pair of channels, in float64, rounded once."""
    (out,) = allocate(weight)
    g = torch.tensor(TRANSPOSED if transposed else FILTER, dtype=torch.float64, device=weight.device)
    outputs, inputs = weight.shape[:2]
    lines = weight.new_zeros((9, inputs, out.shape[2] * PANEL), dtype=torch.float64)
    lines[..., :outputs] = weight.flatten(2).permute(2, 1, 0)
    made = torch.kron(g, g) @ lines.flatten(1)  # one product by 36 x 9: einsum took three times as long
    return out.copy_(made.view(6, 6, inputs, out.shape[2], PANEL).transpose(2, 3))


def cost(weight: Tensor, transposed: bool = False) -> Cost:
    """Nine weights a pair of channels read, 36 written."""
    pairs = weight.shape[0] * weight.shape[1]
    return Cost(flops=162 * pairs, bytes=9 * pairs * weight.element_size() + 144 * pairs)


def _case(name: str, outputs: int, inputs: int, transposed: bool = False, bench: bool = False) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.randn(outputs, inputs, 3, 3, generator=g).to(dtype), transposed)

    return Case(name, build, bench=bench)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return (draw.tensor((*draw.shape(20, 20), 3, 3), dtype), draw.flag())


OP = register(
    Op(
        name="winograd_filters",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=1e-6, peak=1e-6),
            torch.bfloat16: Tolerance(rms=1e-6, peak=1e-6),
            torch.float16: Tolerance(rms=1e-6, peak=1e-6),
        },
        cases=[
            _case("small", 3, 5),
            _case("one channel", 1, 1),
            _case("no outputs", 0, 4),
            _case("wide", 40, 33),
            _case("transposed", 20, 5, transposed=True),
            _case("640x640", 640, 640, bench=True),
        ],
        alone=None,
        draw=_draw,
        formula="G w G^T, G the 6 x 3 matrix of F(4 x 4, 3 x 3), or of a transposed convolution's phases",
        source="Lavin & Gray 2015, arXiv:1509.09308; Toom 1963; Cook 1966",
    )
)
