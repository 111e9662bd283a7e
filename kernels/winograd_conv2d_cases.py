"""The cases of winograd_conv2d: sizes, layouts, bias and residual, images that are doubled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels import conv_taps, winograd_filters, winograd_taps
from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.op import Case, is_channels_last


def _arguments(
    g: Generator, x: Tensor, outputs: int, bias: bool, residual: bool, doubled: bool = False, taps: bool = False
) -> tuple[Any, ...]:
    inputs = x.shape[1]
    weight = torch.randn(outputs, inputs, 3, 3, generator=g) / (9 * max(inputs, 1)) ** 0.5
    form = conv_taps if x.dtype == torch.bfloat16 else winograd_taps if taps else winograd_filters
    filters = form.reference(weight.to(x.dtype))
    offset = torch.randn(outputs, generator=g).to(x.dtype) if bias else None
    size = (n * (2 if doubled else 1) for n in x.shape[2:])
    more = torch.randn(x.shape[0], outputs, *size, generator=g).to(x.dtype) if residual else None
    if more is not None and is_channels_last(x):
        more = more.contiguous(memory_format=torch.channels_last)
    return (x, filters, outputs, offset, more, doubled)


def _case(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    *,
    layout: str = "channels_last",
    bias: bool = True,
    residual: bool = False,
    doubled: bool = False,
    taps: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    bench: bool = False,
    small: bool = True,
) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = laid_out(torch.randn(shape, generator=g).to(dtype), layout)
        return _arguments(g, x, outputs, bias, residual, doubled, taps)

    return Case(name, build, dtypes=dtypes, bench=bench, small=small)


def _bench(*shape: int, **more: Any) -> Case:
    name = "x".join(map(str, shape)) + "".join(f", {k}" for k in ("doubled", "taps") if more.get(k))
    return _case(name, shape, shape[1], bench=True, small=False, **more)


_HALF, _FULL = (torch.bfloat16,), (torch.float32,)


CASES = [
    _case("small", (2, 5, 3, 4), 7),
    _case("one pixel", (2, 8, 1, 1), 16),
    _case("one channel", (1, 1, 5, 3), 1),
    _case("no batch", (0, 4, 3, 3), 4, small=False),
    _case("no pixels", (2, 4, 0, 3), 4),
    _case("no inputs", (2, 0, 3, 3), 4, small=False),
    _case("no outputs", (2, 4, 3, 3), 0),
    _case("one row", (1, 17, 1, 37), 19, small=False),
    _case("one column", (2, 17, 37, 1), 19, small=False),
    _case("prime sizes", (3, 37, 7, 11), 29, residual=True, small=False),
    _case("residual", (2, 32, 8, 8), 48, residual=True),
    _case("no bias", (1, 16, 4, 4), 16, bias=False),
    _case("no bias, residual", (1, 16, 4, 4), 32, bias=False, residual=True),
    _case("five panels", (1, 24, 9, 5), 80, small=False),
    _case("seven panels", (2, 18, 5, 9), 107, small=False),
    _case("contiguous", (2, 16, 6, 6), 16, layout="contiguous"),
    _case("strided", (2, 16, 3, 5), 16, layout="strided"),
    _case("several blocks", (3, 33, 33, 19), 70, residual=True, small=False),
    _case("taps", (2, 5, 3, 4), 7, taps=True, dtypes=_FULL),
    _case("taps, no inputs", (2, 0, 3, 3), 4, taps=True, dtypes=_FULL, small=False),
    _case("taps, inputs in parts", (3, 137, 7, 11), 37, taps=True, residual=True, dtypes=_FULL, small=False),
    _case("taps, several panels", (2, 64, 9, 8), 70, taps=True, bias=False, residual=True, dtypes=_FULL, small=False),
    _case("taps, larger tiles", (2, 5, 13, 14), 7, taps=True, dtypes=_FULL, small=False),
    _case(
        "taps, larger tiles, inputs in parts", (2, 137, 15, 18), 37, taps=True, residual=True, dtypes=_FULL, small=False
    ),
    _case("taps, several chunks", (1, 2570, 33, 33), 17, taps=True, dtypes=_FULL, small=False),
    _case("doubled", (2, 34, 3, 5), 37, doubled=True, residual=True),
    _case("doubled, one pixel", (1, 3, 1, 1), 5, doubled=True, bias=False),
    _case("doubled, several blocks", (2, 24, 19, 13), 70, doubled=True, small=False),
    _case("inputs in parts", (2, 521, 13, 9), 70, residual=True, dtypes=_HALF, small=False),
    _case("inputs in parts, doubled", (1, 259, 5, 3), 40, doubled=True, dtypes=_HALF, small=False),
    *(_bench(*shape) for shape in ((2, 48, 64, 64), (2, 128, 16, 16), (2, 320, 64, 64), (2, 640, 32, 32))),
    _bench(1, 256, 256, 256),
    *(_bench(*shape, dtypes=_FULL, taps=True) for shape in ((2, 1280, 8, 8), (2, 1280, 16, 16), (2, 640, 32, 32))),
    *(_bench(*shape, dtypes=_HALF) for shape in ((2, 1280, 16, 16), (2, 1280, 8, 8))),
    *(_bench(*shape, dtypes=_HALF, doubled=True) for shape in ((2, 1280, 8, 8), (2, 640, 32, 32), (1, 512, 128, 128))),
]


def draw(choices: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of winograd_conv2d that nobody chose."""
    shape = (*choices.shape(2, 40), *choices.shape(11, 11))
    x = choices.tensor(shape, dtype, layouts=("channels_last", "contiguous"))
    bias, residual, doubled, taps = (choices.choice((True, False)) for _ in range(4))
    return _arguments(choices.generator(), x, choices.integer(0, 70), bias, residual, doubled, taps)
