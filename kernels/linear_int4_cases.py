"""linear_int4's cases, as a function of its ``pack``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from fusegen.kernels.linear_int8 import random_tail, random_x
from fusegen.kernels.op import FLOATS, Case

FLOAT: dict[str, Any] = {"inputs": "float"}


def arguments(
    g: Generator, dtype: torch.dtype, pack: Callable[..., Any], lead: tuple[int, ...], n: int, k: int, **how: Any
) -> tuple[Any, ...]:
    """Arguments of a case.  ``how``: group, zero_points, kind (random_x's), scale (dtype), bias and residual
    (random_tail's), activation, inputs."""
    group = how.get("group", 32)
    x, groups = random_x(g, lead, k, dtype, how.get("kind", "contiguous")), -(-k // group)
    codes = torch.randint(0, 16, (n, k), generator=g)
    scales = (0.5 + torch.rand(n, groups, generator=g)) / (4.6 * max(k, 1) ** 0.5)  # outputs of about one
    zeros = torch.randint(0, 16, (n, groups), generator=g) if how.get("zero_points") else None
    p = pack(codes, scales.to(how.get("scale", torch.float16)), zeros, group)
    tail = random_tail(g, (*lead, n), dtype, how.get("bias", "same"), how.get("residual", False))
    return (x, p.weight, p.scales, n, p.zeros, *tail, how.get("activation", "none"), how.get("inputs", "int8"))


def cases(pack: Callable[..., Any]) -> list[Case]:
    """Sizes 0, 1, odd and prime, ragged groups, layouts of x, both kinds of inputs; then those of benchmarks."""

    def case(name: str, lead: tuple[int, ...], n: int, k: int, *, small: bool = True, **how: Any) -> Case:
        return Case(name, functools.partial(arguments, pack=pack, lead=lead, n=n, k=k, **how), small=small)

    def bench(m: int, n: int, k: int, label: str = "", **how: Any) -> Case:
        build = functools.partial(arguments, pack=pack, lead=(1, m), n=n, k=k, **how)
        return Case(f"{m}x{n}x{k}{label}", build, dtypes=FLOATS[:2], bench=True)

    return [
        case("small", (3, 5), 16, 64),
        case("no rows", (0, 7), 16, 32),
        case("no columns", (2, 3), 7, 0),
        case("no outputs", (2, 3), 0, 32),
        case("one row", (64,), 20, 64),
        case("one element", (1, 1), 1, 1),
        case("one token", (1, 1), 70, 256, group=128, bias="fp32", scale=torch.float32),
        case("prime sizes", (3, 7), 37, 131, residual=True, zero_points=True),
        case("groups of 64", (2, 9), 33, 192, group=64, zero_points=True, scale=torch.float32),
        case("groups of 128", (2, 9), 33, 300, group=128, zero_points=True),
        case("many rows", (2, 67), 83, 201, group=64, activation="silu", residual=True, small=False),
        case("many rows, groups of 128", (1, 50), 40, 257, group=128, small=False),
        case("many long rows", (2, 67), 83, 1100, group=128, zero_points=True, small=False),
        case("gelu", (2, 9), 33, 96, activation="gelu"),
        case("gelu_tanh", (2, 9), 33, 96, activation="gelu_tanh", bias="fp32"),
        case("relu", (2, 9), 33, 96, activation="relu", bias="no"),
        case("extremes", (2, 3), 24, 64, kind="extremes", bias="no"),
        case("extremes, long rows", (2, 3), 24, 600, kind="extremes", bias="no"),
        *(case(kind, (2, 5), 24, 64, kind=kind) for kind in ("padded", "transposed", "strided", "unaligned")),
        case("float", (2, 9), 33, 160, group=64, **FLOAT),
        case("float, zero points", (1, 35), 70, 600, zero_points=True, residual=True, activation="silu", **FLOAT),
        case("float, one token", (1, 1), 70, 600, group=128, scale=torch.float32, bias="no", **FLOAT),
        case("float, strided", (2, 5), 24, 64, kind="strided", **FLOAT),
        *(bench(m, n, k) for m, n, k in ((1, 4096, 4096), (1, 11008, 4096), (1, 4096, 11008), (4, 4096, 4096))),
        bench(1, 4096, 4096, " zeros", zero_points=True),
        *(bench(m, 4096, 4096, " groups of 128", group=128) for m in (1, 16, 512)),
        *(bench(m, 4096, 4096, " float", group=128, **FLOAT) for m in (1, 16, 512)),
    ]
