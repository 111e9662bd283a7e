"""The cases of upfirdn2d, and the eager forms that it replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Spelling


def make_filter(kind: str, g: Generator) -> Tensor | None:
    """``none``; ``1331`` (4, 4), StyleGAN2's; ``1331 separable``; ``sinc12``, a low-pass of StyleGAN3's length; else
    ``<y>x<x>`` or ``<taps>`` at random."""
    binomial = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    if kind == "none":
        return None
    if kind.startswith("1331"):
        return binomial if "separable" in kind else binomial.outer(binomial)
    if kind == "sinc12":
        t = torch.arange(12) - 5.5
        f = torch.sinc(t / 2) * torch.kaiser_window(12, periodic=False, beta=6.0)
        return f / f.sum()
    return torch.randn(tuple(int(n) for n in kind.split("x")), generator=g)


def _case(
    name: str,
    shape: tuple[int, ...],
    filter: str,
    up: tuple[int, int] = (1, 1),
    down: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    flip: bool = False,
    gain: float = 1.0,
    layout: str = "contiguous",
    bench: bool = False,
) -> Case:
    """``layout``: contiguous, channels_last, samples (every other sample), rows (padded rows), strided, unaligned."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        b, c, h, w = shape
        full = {"rows": w + 3, "strided": 2 * w}.get(layout, w)
        x = torch.randn(2 * b if layout == "samples" else b, c, h, full, generator=g).to(dtype)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "samples":
            x = x[::2]
        elif layout == "rows":
            x = x[..., :w]
        elif layout == "strided":
            x = x[..., ::2]
        elif layout == "unaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        return (x, make_filter(filter, g), list(up), list(down), list(padding), flip, gain)

    return Case(name, build, bench=bench, small=not bench)


def _both(name: str, *args: Any, **more: Any) -> list[Case]:
    return [_case(name, *args, **more), _case(f"{name}, channels-last", *args, layout="channels_last", **more)]


_UP, _DOWN, _SAME = (2, 1, 2, 1), (1, 1, 1, 1), (2, 1, 2, 1)

CASES = [
    *_both("up2", (2, 5, 7, 6), "1331", (2, 2), (1, 1), _UP, gain=4.0),
    *_both("down2", (2, 5, 9, 10), "1331", (1, 1), (2, 2), _DOWN),
    *_both("blur", (2, 5, 7, 6), "1331", padding=_SAME),
    _case("flipped", (2, 3, 7, 6), "4x3", padding=(1, 1, 2, 1), flip=True),
    *_both("up2 separable", (2, 3, 7, 6), "sinc12", (2, 2), (1, 1), (6, 5, 6, 5), gain=4.0),
    *_both("down2 separable", (2, 3, 26, 23), "sinc12", (1, 1), (2, 2), (5, 5, 5, 5)),
    *_both("up3 down2", (2, 3, 9, 8), "5x7", (3, 3), (2, 2), (3, 2, 3, 3)),
    _case("up x alone", (2, 3, 5, 8), "5x4", (4, 1), (1, 1), (2, 1, 2, 2)),
    *_both("up 2x3, down 3x5", (1, 2, 11, 19), "7x6", (2, 3), (3, 5), (1, 4, -1, 3)),
    *_both("up above the taps", (2, 3, 4, 5), "3x2", (5, 4), (1, 1), (1, 0, 2, 0)),
    *_both("cropped", (2, 3, 9, 11), "3", (2, 2), (1, 1), (-3, -4, -2, -5)),
    _case("cropped to one", (2, 3, 5, 5), "3x3", padding=(-1, -1, -2, 0)),
    _case("wide padding", (1, 3, 3, 2), "4x4", (2, 2), (3, 3), (9, 14, 11, 8)),
    *_both("no filter", (2, 3, 5, 7), "none", (2, 2), (1, 1), (0, 0, 0, 0)),
    _case("one tap", (2, 3, 5, 7), "1x1", (1, 1), (2, 3), (0, 1, 0, 0)),
    _case("prime sizes", (3, 7, 13, 17), "4x4", (2, 2), (1, 1), _UP),
    *_both("one pixel", (2, 17, 1, 1), "1331", (2, 2), (1, 1), _UP, gain=4.0),
    _case("wide rows", (1, 2, 3, 167), "1331 separable", (2, 2), (1, 1), _UP, gain=4.0),
    _case("filter of 37", (1, 2, 41, 39), "37", (1, 1), (1, 1), (0, 0, 0, 0)),
    _case("no batch", (0, 3, 5, 5), "1331", (2, 2), (1, 1), _UP),
    _case("no channels", (2, 0, 5, 5), "1331", (2, 2), (1, 1), _UP),
    _case("no columns, padded", (2, 3, 5, 0), "3x3", padding=(2, 2, 1, 1)),
    _case("samples apart", (2, 3, 6, 7), "1331", (2, 2), (1, 1), _UP, layout="samples"),
    _case("padded rows", (2, 3, 6, 7), "1331", (1, 1), (2, 2), _DOWN, layout="rows"),
    _case("strided", (2, 3, 6, 7), "1331", padding=_SAME, layout="strided"),
    _case("unaligned", (2, 3, 6, 7), "1331", (2, 2), (1, 1), _UP, layout="unaligned"),
    *_both("up2 1x512x64x64", (1, 512, 64, 64), "1331", (2, 2), (1, 1), _UP, gain=4.0, bench=True),
    _case("up2 4x3x256x256", (4, 3, 256, 256), "1331", (2, 2), (1, 1), _UP, gain=4.0, bench=True),
    *_both("down2 1x64x256x256", (1, 64, 256, 256), "1331", (1, 1), (2, 2), _DOWN, bench=True),
    *_both("blur 1x64x257x257", (1, 64, 257, 257), "1331", padding=_DOWN, bench=True),
    _case("up2 sinc12 1x64x128x128", (1, 64, 128, 128), "sinc12", (2, 2), (1, 1), (6, 5, 6, 5), gain=4.0, bench=True),
    _case("down2 sinc12 1x64x256x256", (1, 64, 256, 256), "sinc12", (1, 1), (2, 2), (5, 5, 5, 5), bench=True),
]


def drawn_filter(draw: Draw) -> Tensor | None:
    """None, (taps,) or (taps y, taps x); of one sign, so that sums do not cancel and errors stay those of rounding."""
    shape = draw.choice((None, draw.shape(13, low=1), draw.shape(6, 6, low=1)))
    return None if shape is None else draw.dense(shape, torch.float32).abs() + 0.05


def drawn_padding(draw: Draw, sizes: Sequence[int], up: Sequence[int], least: Sequence[int]) -> list[int]:
    """(left, right, top, bottom) that leaves at least ``least`` elements of each upsampled axis (x, y) to filter."""
    padding = []
    for size, factor, few in zip(sizes, up, least, strict=True):
        before, after = draw.integer(-3, 9), draw.integer(-3, 9)
        padding += [before, max(after, few - size * factor - before)]
    return padding


def draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments that nobody chose."""
    shape = draw.shape(3, 5, 19, 40)
    x, filter = draw.tensor(shape, dtype, mean=4.0), drawn_filter(draw)
    up, down = list(draw.shape(4, 4, low=1)), list(draw.shape(4, 4, low=1))
    taps = (1, 1) if filter is None else (filter.shape[-1], filter.shape[0])
    padding = drawn_padding(draw, (shape[3], shape[2]), up, taps)
    return (x, filter, up, down, padding, draw.flag(), draw.choice((1.0, 4.0)))


def _depthwise(y: Tensor, f: Tensor, shape: Any, groups: int, stride: Any, padding: Any) -> Tensor:
    """One filter for all channels: what flips or scales it comes before, and is not part of the spelling."""
    return F.conv2d(y, f[None, None].expand(shape), stride=stride, padding=padding, groups=groups)


def _flattened(
    x: Tensor, filter: Tensor, *, zeros: Any = (0, 1, 0, 0, 0, 2), edges: Any = (4, 7, 5, 8),
    shape: Any = (6, 1, -1, -1), groups: int = 6, stride: Any = (3, 5),
) -> Tensor:  # fmt: skip
    y = F.pad(x[:, :, :, None, :, None], zeros).flatten(4, 5).flatten(2, 3)
    return _depthwise(F.pad(y, edges), filter, shape, groups, stride, 0)


def _reshaped(
    x: Tensor, filter: Tensor, *, split: Any = (2, 6, 5, 1, 7, 1), zeros: Any = (0, 1, 0, 0, 0, 2),
    joined: Any = (2, 6, 15, 14), edges: Any = (4, 7, 5, 8), shape: Any = (6, 1, -1, -1), groups: int = 6,
    stride: Any = (3, 5),
) -> Tensor:  # fmt: skip
    y = F.pad(x.reshape(split), zeros).reshape(joined)
    return _depthwise(F.pad(y, edges), filter, shape, groups, stride, 0)


def _padded(
    x: Tensor, filter: Tensor, *, edges: Any = (4, 7, 5, 8), shape: Any = (6, 1, -1, -1), groups: int = 6,
    stride: Any = (3, 5),
) -> Tensor:  # fmt: skip
    return _depthwise(F.pad(x, edges), filter, shape, groups, stride, 0)


def _plain(
    x: Tensor, filter: Tensor, *, shape: Any = (6, 1, -1, -1), groups: int = 6, stride: Any = (3, 2),
    padding: Any = (2, 1),
) -> Tensor:  # fmt: skip
    return _depthwise(x, filter, shape, groups, stride, padding)


def _transposed(
    x: Tensor, filter: Tensor, *, shape: Any = (6, 1, -1, -1), groups: int = 6, stride: Any = (3, 2),
    padding: Any = (0, 2), extra: Any = (2, 0),
) -> Tensor:  # fmt: skip
    weight = filter[None, None].expand(shape)
    return F.conv_transpose2d(x, weight, stride=stride, padding=padding, output_padding=extra, groups=groups)


def _pair(value: Any) -> tuple[int, int]:
    """A convolution's (y, x) argument, which may be one number, as (x, y)."""
    y, x = (value * 2)[:2] if isinstance(value, tuple) else (value, value)
    return x, y


def _call(
    x: Any, filter: Any, shape: Any, groups: int, stride: Any, zeros: Any = (0,) * 6, edges: Any = (0,) * 4,
    padding: Any = 0, split: Any = None, joined: Any = None,
) -> Mapping[str, Any] | str:  # fmt: skip
    """The op's arguments of a depthwise convolution, whose filter is correlated."""
    if why := _not_one_filter(x, filter, shape, groups):
        return why
    up_x, up_y = zeros[1] + 1, (zeros[5] if len(zeros) == 6 else 0) + 1
    if len(zeros) not in (2, 6) or any(zeros[i] for i in (0, *range(2, len(zeros) - 1))) or len(edges) not in (2, 4):
        return f"{zeros} zeros around each element are not those of an upsampling"
    if split is not None:
        b, c, h, w = x.shape
        if split != (b, c, h, 1, w, 1) or joined != (b, c, h * up_y, w * up_x):
            return f"the reshapes to {split} and {joined} are not those of an upsampling of {x.shape}"
    (px, py), edges = _pair(padding), (*edges, 0, 0)[:4]
    around = [edges[0] + px, edges[1] + px, edges[2] + py, edges[3] + py]
    return {
        "x": x, "filter": filter, "up": (up_x, up_y), "down": _pair(stride), "padding": tuple(around),
        "flip_filter": True,
    }  # fmt: skip


def _call_transposed(
    x: Any, filter: Any, shape: Any, groups: int, stride: Any, padding: Any, extra: Any
) -> Mapping[str, Any] | str:
    """A transposed convolution inserts stride - 1 zeros, and takes its padding away from the full convolution."""
    if why := _not_one_filter(x, filter, shape, groups):
        return why
    around: list[int] = []
    for taps, step, less, more in zip(reversed(filter.shape), _pair(stride), _pair(padding), _pair(extra), strict=True):
        around += [taps - 1 - less, taps - step - less + more]
    return {"x": x, "filter": filter, "up": _pair(stride), "down": (1, 1), "padding": tuple(around)}


def _not_one_filter(x: Any, filter: Any, shape: Any, groups: int) -> str | None:
    """Why this is no single filter on every channel of (B, C, H, W) with known taps."""
    if x.shape is None or len(x.shape) != 4 or x.shape[1] != groups or tuple(shape[:2]) != (groups, 1):
        return f"the filter {shape} in {groups} groups is not one for each channel"
    if filter.shape is None or len(filter.shape) != 2 or any(isinstance(n, str) for n in filter.shape):
        return "the filter's taps are not known"
    return None


def _inputs() -> tuple[Tensor, ...]:
    return torch.zeros(2, 6, 5, 7), torch.zeros(4, 4)


SPELLINGS = [
    Spelling("zeros by flatten, pad, depthwise convolution", _flattened, _inputs, _call),
    Spelling("zeros by reshape, pad, depthwise convolution", _reshaped, _inputs, _call),
    Spelling("pad, depthwise convolution", _padded, _inputs, _call),
    Spelling("depthwise convolution", _plain, _inputs, _call),
    Spelling("depthwise transposed convolution", _transposed, _inputs, _call_transposed),
]
