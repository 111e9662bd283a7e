"""Residual addition and norm on NVIDIA GPUs: see row_norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fusegen.kernels.gpu import row_norm
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, meta
from fusegen.kernels.gpu.row_norm import Config
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "branch": 1, "gate": 2, "weight": 3, "bias": 4, "scale": 5, "shift": 6}


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    return row_norm.stages(outs, args, config, ROLES, rms=args[8] == "rms", eps=args[7], offset=args[9])


def decline(*args: Any) -> str | None:
    return row_norm.decline(args, ROLES)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        x, weight = meta(512, 4096, dtype=dtype), meta(4096, dtype=dtype)
        args = (x, x, None, weight, None, None, None, 1e-6, "rms", 0.0)
        yield f"{kind} rms 4096", lambda args=args: args  # type: ignore[misc]
        gate, scale, shift = meta(2, 6 * 1152, dtype=dtype).chunk(6, 1)[:3]
        x = meta(2, 256, 1152, dtype=dtype)
        gated = (x, x, gate, None, None, scale, shift, 1e-6, "layer", 0.0)
        yield f"{kind} 1152 gated, modulated", lambda args=gated: args  # type: ignore[misc]


TUNABLE = Tunable(
    "add_norm", Config, row_norm.key, row_norm.default, row_norm.space, stages, row_norm.SOURCE, row_norm.small
)
KERNELS = [Kernel("add_norm.triton", "cuda", decline, TUNABLE.bind)]
