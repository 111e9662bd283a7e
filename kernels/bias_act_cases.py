"""The cases of bias_act."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case

NAMES = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish", "quick_gelu")


def _case(
    name: str,
    shape: tuple[int, ...],
    act: str = "lrelu",
    *,
    dim: int = 1,
    layout: str = "contiguous",
    bias: str = "same",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    size: float = 1.0,
    bench: bool = False,
) -> Case:
    """``layout``: contiguous, channels_last, rows (padded rows), strided (every other element) or unaligned.

    ``bias``: the dtype "same" as x or "fp32", or "no" bias; ``size`` scales x.
    """

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        full = {"rows": shape[-1] + 3, "strided": 2 * shape[-1]}.get(layout, shape[-1])
        x = (size * torch.randn(*shape[:-1], full, generator=g)).to(dtype)
        if layout == "rows":
            x = x[..., : shape[-1]]
        elif layout == "strided":
            x = x[..., ::2]
        elif layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "unaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        b = (0.3 * torch.randn(shape[dim], generator=g)).to(torch.float32 if bias == "fp32" else dtype)
        return (x, None if bias == "no" else b, dim, act, alpha, gain, clamp)

    return Case(name, build, bench=bench, small=not bench)


def _bench(*shape: int) -> list[Case]:
    name = "x".join(map(str, shape))
    return [
        _case(name, shape, clamp=256.0, bench=True),
        _case(f"{name} channels-last", shape, clamp=256.0, layout="channels_last", bench=True),
    ]


CASES = [
    *(_case(act, (2, 5, 7, 3), act, size=3.0) for act in NAMES),
    *(_case(f"{act}, tiny", (2, 7, 33), act, gain=1.0, size=1e-3, bias="no") for act in ("tanh", "elu", "selu")),
    *(_case(f"{act}, large", (3, 37), act, size=60.0) for act in ("tanh", "sigmoid", "softplus", "swish", "elu")),
    _case("channels-last", (2, 12, 5, 7), layout="channels_last"),
    _case("channels-last, 3 channels", (2, 3, 9, 5), "swish", layout="channels_last"),
    _case("no bias", (3, 8, 5, 5), bias="no"),
    _case("float32 bias", (3, 8, 5, 5), bias="fp32"),
    _case("alpha, gain and clamp", (3, 8, 5, 5), alpha=0.05, gain=0.7, clamp=0.4),
    _case("clamp of 0", (3, 8, 5), clamp=0.0),
    _case("alpha above 1", (3, 8, 17), alpha=1.5),
    _case("last dimension", (5, 67), dim=-1),
    _case("first dimension", (6, 5, 9), dim=0),
    _case("middle dimension", (3, 4, 5, 11), dim=2),
    _case("one row", (41,), dim=0),
    _case("no batch", (0, 4, 5)),
    _case("no channels", (3, 0, 5)),
    _case("one element", (1, 1)),
    _case("prime sizes", (3, 13, 11, 7)),
    _case("padded rows", (3, 4, 35), dim=2, layout="rows"),
    _case("padded rows without a bias", (3, 4, 35), layout="rows", bias="no"),
    _case("strided", (3, 4, 35), layout="strided"),
    _case("unaligned", (3, 4, 35), layout="unaligned"),
    *_bench(1, 512, 64, 64),
    *_bench(1, 64, 512, 512),
    _case("8x512", (8, 512), bench=True),
]


def draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments that nobody chose."""
    shape = draw.shape(4, *[23] * draw.integer(0, 3))
    x = draw.tensor(shape, dtype, scale=draw.choice((1.0, 8.0)))
    dim = draw.integer(-len(shape), len(shape) - 1)
    bias = draw.maybe((shape[dim],), (dtype, torch.float32))
    alpha, gain, clamp = draw.choice((None, 0.05, 1.5)), draw.choice((None, 0.7)), draw.choice((None, 0.4, 0.0))
    return (x, bias, dim, draw.choice(NAMES), alpha, gain, clamp)
