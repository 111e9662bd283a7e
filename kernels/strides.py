"""Tensors as rows of their last dimension, for the kernels and the outputs of ops that work row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Strides = tuple[int, ...]


def merged(
    shape: Sequence[int], strides: Sequence[Sequence[int]], limit: int = 3
) -> tuple[Strides, list[Strides]] | None:
    """Nested loops over ``shape`` (no size is 0) in which every tensor moves by one stride a loop.

    ``strides``: those of each tensor for ``shape``; the first one's decide the order, largest outermost.  Loops that
    continue one another in every tensor become one.  Gives the ``limit`` sizes, outermost first (1 where there are
    fewer), and each tensor's strides for them; None where it takes more loops.
    """
    rows: list[Strides] = [row for row in zip(shape, *strides, strict=True) if row[0] != 1]
    rows.sort(key=lambda row: -row[1])
    loops: list[Strides] = []
    for n, *steps in rows:
        if loops and all(outer == n * inner for outer, inner in zip(loops[-1][1:], steps, strict=True)):
            loops[-1] = (loops[-1][0] * n, *steps)
        else:
            loops.append((n, *steps))
    if len(loops) > limit:
        return None
    loops = [(1, *[0] * len(strides))] * (limit - len(loops)) + loops
    sizes, *found = zip(*loops, strict=True)
    return sizes, found


def dense_like(x: Tensor, device: torch.device | str | None = None) -> Tensor:
    """An uninitialised tensor of x's shape and dtype, on x's device where None is given: rows of the last dimension, in
    the order x has them in memory."""
    order = sorted(range(x.dim() - 1), key=lambda d: x.stride(d), reverse=True)
    out = torch.empty([x.shape[d] for d in order] + [x.shape[-1]], dtype=x.dtype, device=device or x.device)
    return out.permute([order.index(d) for d in range(x.dim() - 1)] + [x.dim() - 1])
