"""RMS norm, then rotary position embedding, on NVIDIA GPUs; the kernel is in rotate.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fusegen.kernels.gpu import rotate
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, meta
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel
from fusegen.kernels.qk_norm_rope import check_all, seen

X, WEIGHT, COS, SIN, POSITIONS = 0, 1, 2, 3, 4  # positions of the tensors in the schema


def key(
    x: Tensor, weight: Any, cos: Tensor, sin: Tensor, positions: Any, eps: float, interleaved: bool,
    rotary_dim: int | None, transpose: bool,
) -> str:  # fmt: skip
    """As :func:`rotate.kind`."""
    return rotate.kind(x, interleaved, rotary_dim)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: rotate.Config) -> tuple[Stage, ...]:
    """One launch."""
    x, weight, cos, _, positions, eps, interleaved, rotary_dim, transpose = args
    named = {
        "x": Use(X),
        "weight": Use(X) if weight is None else Use(WEIGHT),
        "cos": Use(COS),
        "sin": Use(SIN),
        "positions": Use(X) if positions is None else Use(POSITIONS),
    }
    given = (cos, positions, interleaved, rotary_dim, config, named, weight is not None, eps)
    return rotate.stages(outs[0], seen(x, transpose), *given)


def decline(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float,
    interleaved: bool, rotary_dim: int | None, transpose: bool,
) -> str | None:  # fmt: skip
    """A strided weight, and as :func:`rotate.decline`."""
    check_all(x, weight, cos, sin, positions, rotary_dim, transpose)
    if weight is not None and not weight.is_contiguous():
        return "weight is strided"
    return rotate.decline(x, cos, sin, positions)


def specimens() -> Iterator[Named]:
    for dtype, name in SHORT.items():
        x, table, w = meta(1, 2048, 32, 128, dtype=dtype), meta(1, 1, 2048, 128, dtype=dtype), meta(128, dtype=dtype)
        yield f"{name} qwen3", lambda x=x, t=table, w=w: (x, w, t, t, None, 1e-6, False, None, True)  # type: ignore[misc]
        x, table = meta(1, 4608, 24, 128, dtype=dtype), meta(1, 4608, 1, 128)
        yield f"{name} flux", lambda x=x, t=table, w=w: (x, w, t, t, None, 1e-6, True, None, False)  # type: ignore[misc]


TUNABLE = Tunable(
    "qk_norm_rope", rotate.Config, key, rotate.default, rotate.space, stages, Path(rotate.__file__), rotate.small
)
KERNELS = [Kernel("qk_norm_rope.triton", "cuda", decline, TUNABLE.bind)]
