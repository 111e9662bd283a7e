"""RMS normalization on NVIDIA GPUs: see row_norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fusegen.kernels.gpu import row_norm
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, meta
from fusegen.kernels.gpu.row_norm import Config
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "weight": 1, "scale": 3, "shift": 4}


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    return row_norm.stages(outs, args, config, ROLES, rms=True, eps=args[2], offset=args[5])


def decline(*args: Any) -> str | None:
    return row_norm.decline(args, ROLES)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for width in (128, 896, 4096):
            args = (meta(4096, width, dtype=dtype), meta(width, dtype=dtype), 1e-6, None, None, 0.0)
            yield f"{kind} {width}", lambda args=args: args  # type: ignore[misc]
        scale, shift = meta(2, 6 * 2304, dtype=dtype).chunk(6, 1)[:2]
        modulated = (meta(2, 4096, 2304, dtype=dtype), meta(2304, dtype=dtype), 1e-6, scale, shift, 0.0)
        yield f"{kind} 2304 modulated", lambda args=modulated: args  # type: ignore[misc]


TUNABLE = Tunable(
    "rms_norm", Config, row_norm.key, row_norm.default, row_norm.space, stages, row_norm.SOURCE, row_norm.small
)
KERNELS = [Kernel("rms_norm.triton", "cuda", decline, TUNABLE.bind)]
