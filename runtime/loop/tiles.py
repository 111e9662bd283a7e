"""A large picture from a network that makes small ones: tile by tile, overlapping, blended where they overlap.

For decoders, whose memory grows with the picture's area.  Tiles are all of one size, so that a session captures one
form; what a network takes over the whole of its input (the statistics of a group norm, attention) it takes over a tile,
so that the picture is not quite that of one pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusegen.runtime.errors import Cancelled, RequestError
from fusegen.runtime.loop.cancel import Cancel, asked


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover ``size`` with at least ``overlap`` in common, as few as can be, evenly apart."""
    count = 1 if size <= tile else math.ceil((size - tile) / (tile - overlap)) + 1
    return [round(i * (size - tile) / (count - 1)) if count > 1 else 0 for i in range(count)]


def ramps(begins: list[int], tile: int, scale: int) -> list[Tensor]:
    """The weight of each tile's rows (or columns) of output; those of all tiles sum to one everywhere.

    A tile's weight falls linearly to nothing over what it has in common with a neighbour.
    """
    made = [torch.ones(tile * scale, dtype=torch.float64) for _ in begins]
    for i in range(len(begins) - 1):
        common = (begins[i] + tile - begins[i + 1]) * scale
        rise = (torch.arange(common, dtype=torch.float64) + 0.5) / max(1, common)
        made[i][tile * scale - common :] *= 1 - rise
        made[i + 1][:common] *= rise
    total = torch.zeros((begins[-1] + tile) * scale, dtype=torch.float64)  # more than two may meet
    parts = [total[begin * scale : (begin + tile) * scale] for begin in begins]
    for part, weight in zip(parts, made, strict=True):
        part += weight
    return [weight / part for part, weight in zip(parts, made, strict=True)]


def tiled(
    decode: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: tuple[int, int],
    overlap: int,
    progress: Callable[[int, int], object] | None = None,
    cancel: Cancel | None = None,
) -> Tensor:
    """What ``decode`` makes of ``x`` (B, C, H, W), in tiles of ``tile`` (height, width) with ``overlap`` in common.

    ``decode`` takes (B, C, *tile) to (B, C', s tile[0], s tile[1]), the same whole s at every call; the result is
    (B, C', s H, s W) in its dtype.  ``progress(done, total)`` counts tiles; ``cancel`` is asked before each and raises
    :class:`Cancelled`.  Raises :class:`RequestError` where a tile is larger than x or not larger than the overlap.
    """
    for size, side in zip(x.shape[2:], tile, strict=True):
        if not 0 < side <= size or not 0 <= overlap < side:
            raise RequestError(
                f"tiles of {tile[0]} x {tile[1]} with {overlap} in common do not cover {tuple(x.shape)}",
                mend="a tile fits into the input and is larger than what two have in common",
            )
    places = [starts(size, side, overlap) for size, side in zip(x.shape[2:], tile, strict=True)]
    total, out, weights = len(places[0]) * len(places[1]), torch.empty(0), [list[Tensor](), list[Tensor]()]
    for done, (i, j) in enumerate(itertools.product(*map(range, map(len, places)))):
        if asked(cancel):
            raise Cancelled("the decoding was cancelled", f"after {done} of {total} tiles")
        top, left = places[0][i], places[1][j]
        part = decode(x[:, :, top : top + tile[0], left : left + tile[1]].contiguous())
        scale = part.shape[2] // tile[0]
        if not done:
            out = part.new_zeros(*part.shape[:2], scale * x.shape[2], scale * x.shape[3])
            weights = [ramps(p, side, scale) for p, side in zip(places, tile, strict=True)]
        weight = weights[0][i][:, None] * weights[1][j]
        rows = slice(scale * top, scale * (top + tile[0]))
        out[:, :, rows, scale * left : scale * (left + tile[1])] += part * weight.to(part)
        if progress is not None:
            progress(done + 1, total)
    return out
