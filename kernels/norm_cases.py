"""The cases that the norms over the last dimension share: layouts, widths, parameters and modulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case


@dataclass(frozen=True)
class Inputs:
    """What a case is made of.

    ``layout``: contiguous, rows (padded rows), transposed (the first two dimensions swapped), strided (every other
    element of the last dimension) or unaligned.  ``parameters``: "same" dtype as x, "fp32", "bias" alone, or "no".
    ``modulation``: "no", "sample" (B, C), "axes" (B, 1, ..., C), "chunk" (B, C) cut out of (B, 6 C), "token" (x's own
    shape), "fp32" (B, C), "one" (1, C) or "shift" (B, C) alone.
    """

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    parameters: str = "same"
    modulation: str = "no"
    mean: float = 0.0
    bench: bool = False

    def tensor(self, g: Generator, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape in the layout."""
        shape, width = self.shape, self.shape[-1]
        full = {"rows": width + 5, "strided": 2 * width}.get(self.layout, width)
        lead = (shape[1], shape[0], *shape[2:-1]) if self.layout == "transposed" else shape[:-1]
        x = (torch.randn(*lead, full, generator=g) + self.mean).to(dtype)
        if self.layout == "rows":
            return x[..., :width]
        if self.layout == "strided":
            return x[..., ::2]
        if self.layout == "transposed":
            return x.transpose(0, 1)
        if self.layout == "unaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        return x

    def affine(self, g: Generator, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias (C,)."""
        kind, width = self.parameters, self.shape[-1]
        own = torch.float32 if kind == "fp32" else dtype
        weight = (1 + 0.3 * torch.randn(width, generator=g)).to(own) if kind in ("same", "fp32") else None
        bias = (0.3 * torch.randn(width, generator=g)).to(own) if kind != "no" else None
        return weight, bias

    def modulations(self, g: Generator, dtype: torch.dtype, count: int) -> tuple[Tensor | None, ...]:
        """``count`` tensors such as scale and shift; all but the last are None where the shift stands alone."""
        kind, batch, width = self.modulation, self.shape[0], self.shape[-1]
        if kind == "no":
            return (None,) * count
        own = torch.float32 if kind == "fp32" else dtype
        if kind == "chunk":
            return (0.3 * torch.randn(batch, 6 * width, generator=g)).to(own).chunk(6, 1)[:count]
        axes = (batch, *(1,) * (len(self.shape) - 2), width)
        shape = {"axes": axes, "token": self.shape, "one": (1, width)}.get(kind, (batch, width))
        made = tuple((0.3 * torch.randn(shape, generator=g)).to(own) for _ in range(count))
        return (*(None,) * (count - 1), made[-1]) if kind == "shift" else made


def bench(*shape: int, parameters: str = "same", modulation: str = "no") -> Inputs:
    """A realistic size; modulated ones, as diffusion transformers have them, say so in their name."""
    name = "x".join(map(str, shape)) + (" modulated" if modulation != "no" else "")
    return Inputs(name, shape, parameters=parameters, modulation=modulation, bench=True)


def cases(
    build: Callable[[Inputs, Generator, torch.dtype], tuple[Any, ...]], more: Sequence[Inputs], shared: bool = True
) -> list[Case]:
    """The cases that all share, if ``shared``, and ``more``, with the arguments that ``build`` makes of each."""

    def bound(inputs: Inputs) -> Callable[[Generator, torch.dtype], tuple[Any, ...]]:
        return lambda g, dtype: build(inputs, g, dtype)

    return [Case(i.name, bound(i), bench=i.bench, small=not i.bench) for i in (*(SHARED if shared else ()), *more)]


def drawn_shape(draw: Draw) -> tuple[int, ...]:
    """(B, ..., C) of two to four dimensions."""
    return (*draw.shape(5, *[5] * draw.integer(0, 2)), draw.integer(0, 700))


def drawn_modulation(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> tuple[Tensor | None, ...]:
    """``count`` of scale, shift or gate, each absent or of a shape that goes with x of ``shape``."""
    batch, width, axes = shape[0], shape[-1], (1,) * (len(shape) - 2)
    shapes = [None, (batch, width), (batch, *axes, width), (1, width), shape]
    drawn = [draw.choice(shapes) for _ in range(count)]
    return tuple(None if one is None else draw.dense(one, dtype, scale=0.3) for one in drawn)


SHARED = (
    Inputs("small", (3, 5, 16)),
    Inputs("no rows", (0, 7, 16)),
    Inputs("no width", (3, 0)),
    Inputs("width 1", (5, 1)),
    Inputs("one row", (48,)),
    Inputs("odd width", (7, 33)),
    Inputs("prime width", (5, 3, 509)),
    Inputs("width 15", (9, 15)),
    Inputs("wide row", (3, 5003)),
    Inputs("no parameters", (4, 40), parameters="no"),
    Inputs("bias alone", (4, 40), parameters="bias"),
    Inputs("float32 parameters", (4, 40), parameters="fp32"),
    Inputs("padded rows", (3, 4, 35), layout="rows"),
    Inputs("transposed", (3, 4, 35), layout="transposed"),
    Inputs("strided", (4, 40), layout="strided"),
    Inputs("unaligned", (4, 40), layout="unaligned"),
    Inputs("modulated", (3, 5, 16), modulation="sample", parameters="no"),
    Inputs("modulated, odd width", (2, 7, 33), modulation="axes"),
    Inputs("modulated by chunks", (3, 4, 35), modulation="chunk", layout="transposed"),
    Inputs("modulated a token", (2, 5, 24), modulation="token", parameters="no"),
    Inputs("modulated in float32", (2, 5, 24), modulation="fp32"),
    Inputs("modulated by one", (3, 5, 17), modulation="one"),
    Inputs("modulated images", (2, 3, 4, 20), modulation="sample"),
    Inputs("shifted", (2, 5, 24), modulation="shift"),
    Inputs("modulated, no rows", (2, 0, 8), modulation="sample"),
)
