"""Layer normalization on NVIDIA GPUs: see row_norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fusegen.kernels.gpu import row_norm
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, meta
from fusegen.kernels.gpu.row_norm import Config
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "weight": 1, "bias": 2, "scale": 4, "shift": 5}


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    return row_norm.stages(outs, args, config, ROLES, rms=False, eps=args[3])


def decline(*args: Any) -> str | None:
    return row_norm.decline(args, ROLES)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for width in (160, 1280, 5120):
            parameter = meta(width, dtype=dtype)
            args = (meta(4096, width, dtype=dtype), parameter, parameter, 1e-5, None, None)
            yield f"{kind} {width}", lambda args=args: args  # type: ignore[misc]
        scale, shift = meta(2, 6 * 1536, dtype=dtype).chunk(6, 1)[:2]
        modulated = (meta(2, 4096, 1536, dtype=dtype), None, None, 1e-6, scale, shift)
        yield f"{kind} 1536 modulated", lambda args=modulated: args  # type: ignore[misc]


TUNABLE = Tunable(
    "layer_norm", Config, row_norm.key, row_norm.default, row_norm.space, stages, row_norm.SOURCE, row_norm.small
)
KERNELS = [Kernel("layer_norm.triton", "cuda", decline, TUNABLE.bind)]
