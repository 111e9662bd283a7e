"""Rotary position embedding on NVIDIA GPUs; the kernel is in rotate.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.gpu import rotate
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, meta
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel
from fusegen.kernels.rope import check

X, COS, SIN, POSITIONS = 0, 1, 2, 3  # positions of the tensors in the schema


def key(x: Tensor, cos: Tensor, sin: Tensor, positions: Any, interleaved: bool, rotary_dim: int | None) -> str:
    """As :func:`rotate.kind`."""
    return rotate.kind(x, interleaved, rotary_dim)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: rotate.Config) -> tuple[Stage, ...]:
    """One launch."""
    x, cos, _, positions, interleaved, rotary_dim = args
    places = Use(X) if positions is None else Use(POSITIONS)
    named = {"x": Use(X), "weight": Use(X), "cos": Use(COS), "sin": Use(SIN), "positions": places}
    return rotate.stages(outs[0], x, cos, positions, interleaved, rotary_dim, config, named)


def decline(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, rotary_dim: int | None
) -> str | None:
    """As :func:`rotate.decline`."""
    check("rope", x, cos, sin, positions, rotary_dim)
    return rotate.decline(x, cos, sin, positions)


def specimens() -> Iterator[Named]:
    for dtype, name in SHORT.items():
        x, table = meta(1, 2048, 32, 128, dtype=dtype).transpose(1, 2), meta(1, 1, 2048, 128, dtype=dtype)
        yield f"{name} llama", lambda x=x, t=table: (x, t, t, None, False, None)  # type: ignore[misc]
        x, table = meta(1, 4608, 24, 128, dtype=dtype), meta(1, 4608, 1, 128)
        yield f"{name} flux", lambda x=x, t=table: (x, t, t, None, True, None)  # type: ignore[misc]
        x, table = meta(16, 32, 1, 128, dtype=dtype), meta(4096, 64)
        at = meta(16, 1, 1, dtype=torch.int64)
        yield f"{name} decode", lambda x=x, t=table, p=at: (x, t, t, p, False, None)  # type: ignore[misc]
        x, table = meta(1, 2048, 32, 96, dtype=dtype), meta(1, 2048, 1, 24, dtype=dtype)
        yield f"{name} partial", lambda x=x, t=table: (x, t, t, None, False, 24)  # type: ignore[misc]


TUNABLE = Tunable("rope", rotate.Config, key, rotate.default, rotate.space, stages, Path(rotate.__file__), rotate.small)
KERNELS = [Kernel("rope.triton", "cuda", decline, TUNABLE.bind)]
