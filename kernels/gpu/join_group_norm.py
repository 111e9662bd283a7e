"""Addition or concatenation and group normalization on NVIDIA GPUs: see group_norm_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.gpu import group_norm
from fusegen.kernels.gpu.group_norm import Config, Problem
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, meta
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.join_group_norm import KINDS
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "other": 1, "weight": 3, "bias": 4, "moments": 8}  # positions in the schema


def problem(args: tuple[Any, ...]) -> Problem:
    """That of the joined tensor."""
    x, other, groups = args[:3]
    return group_norm.problem(x, groups, x.shape[1] + (other.shape[1] if args[7] == "concat" else 0))


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch or two; the first one joins."""
    join = 1 + KINDS.index(args[7])
    return group_norm.launches(outs, args, config, ROLES, problem(args), args[5], args[6] == "silu", join)


def key(*args: Any) -> str:
    return problem(args).key(f"{args[6]} {args[7]}" + " by moments" * (args[8] is not None))


def default(*args: Any, limit: int = 0) -> Config:
    return problem(args).default(args[8] is not None)


def space(*args: Any) -> Iterator[Config]:
    return problem(args).space(args[8] is not None)


def decline(x: Tensor, other: Tensor, *rest: Any) -> str | None:
    """Whatever group_norm declines of either tensor."""
    return group_norm.decline(x) or group_norm.decline(other)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            for join in KINDS:
                x = torch.empty((2, 320, 64, 64), dtype=dtype, device="meta", memory_format=layout)
                parameter = meta(640 if join == "concat" else 320, dtype=dtype)
                args = (x, x, 32, parameter, parameter, 1e-5, "silu", join, None)
                where = "contiguous" if layout == torch.contiguous_format else "channels-last"
                yield f"{kind} {join} 320x64x64 {where}", lambda args=args: args  # type: ignore[misc]


TUNABLE = Tunable("join_group_norm", Config, key, default, space, stages, group_norm.SOURCE, group_norm.small)
KERNELS = [Kernel("join_group_norm.triton", "cuda", decline, TUNABLE.bind)]
