"""What the launchers of resampling kernels (fir.h) share: tensors as planes of rows of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fusegen.kernels.op import FLOATS

MOST_TAPS, MOST_UP = 1024, 64  # kMostTaps and kMostUp of fir.h


def planes(x: Tensor, channels_last: bool) -> dict[str, int]:
    """The fields that say where a row of x (B, C, H, W) lies; with channels innermost a sample is one plane."""
    batch, channels = x.shape[:2]
    if channels_last:
        sizes = {"batch": batch, "channels": 1, "pixel": channels, "x_channel": 0}
    else:
        sizes = {"batch": batch, "channels": channels, "pixel": 1, "x_channel": x.stride(1)}
    return {**sizes, "x_batch": x.stride(0), "x_row": x.stride(2)}


def steps(filter: Tensor | None) -> tuple[int, int, int]:
    """Whether a filter is separable, and its strides along y and x."""
    if filter is None:
        return 0, 0, 0
    return (1, 0, filter.stride(0)) if filter.dim() == 1 else (0, filter.stride(0), filter.stride(1))


def declined(x: Tensor, channels_last: bool, passes: Sequence[tuple[Tensor | None, Sequence[Any]]]) -> str | None:
    """Why x cannot go through ``passes`` (each a filter and its axes x, y), or None."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if not channels_last and x.shape[3] > 1 and x.stride(3) != 1:
        return "x's rows are strided"
    for filter, along in passes:
        if filter is not None and filter.dtype not in FLOATS:
            return f"a filter is {filter.dtype}"
        whole = filter is None or filter.dim() == 1
        taps = [-(-a.taps // a.up) * a.up for a in along]  # of all phases
        count = max(taps) if whole else taps[0] * taps[1]
        if count > MOST_TAPS or max(a.up for a in along) > MOST_UP:
            return f"{count} taps or {[a.up for a in along]} phases are too many (limits {MOST_TAPS} and {MOST_UP})"
    return None
