"""The cases of modulated_conv2d, and the eager forms that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.bias_act_cases import NAMES
from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Spelling


def _case(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    taps: tuple[int, int] = (3, 3),
    *,
    up: int = 1,
    padding: tuple[int, int] = (1, 1),
    demodulate: bool = True,
    noise: str = "",
    bias: bool = False,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    size: float = 1.0,
    parameters: str = "same",
    layout: str = "contiguous",
    bench: bool = False,
    small: bool = True,
) -> Case:
    """``noise``: "each" sample its own, "shared" or none; ``parameters``: all but x in x's dtype or "fp32"; ``size``
    scales the styles; ``layout``: contiguous, channels_last, rows (padded rows) or unaligned."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        b, channels, h, w = shape
        own = torch.float32 if parameters == "fp32" else dtype
        x = torch.randn(b, channels, h, w + 3 * (layout == "rows"), generator=g).to(dtype)[..., :w]
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "unaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        weight = torch.randn(outputs, channels, *taps, generator=g).to(own)
        styles = (size * (1 + 0.5 * torch.randn(b, channels, generator=g))).to(own)
        out = [n - t + 1 + 2 * p if up == 1 else (n - 1) * up + t - 2 * p for n, t, p in zip((h, w), taps, padding)]  # noqa: B905
        drawn = (0.3 * torch.randn(b if noise == "each" else 1, 1, *out, generator=g)).to(own) if noise else None
        added = (0.3 * torch.randn(outputs, generator=g)).to(own) if bias else None
        return (x, weight, styles, drawn, added, demodulate, up, list(padding), act, alpha, gain, clamp, 1e-8)

    return Case(name, build, bench=bench, small=small and not bench)


def _layer(name: str, shape: tuple[int, ...], outputs: int, **more: Any) -> Case:
    return _case(name, shape, outputs, noise="each", bias=True, act="lrelu", clamp=256.0, bench=True, **more)


CASES = [
    _case("small", (2, 5, 6, 7), 4),
    _case("channels-last", (2, 5, 6, 7), 4, layout="channels_last"),
    _case("the whole layer", (2, 8, 5, 5), 6, noise="each", bias=True, act="lrelu", clamp=0.9),
    _case(
        "the whole layer, channels-last",
        (2, 8, 5, 5),
        6,
        noise="shared",
        bias=True,
        act="lrelu",
        layout="channels_last",
    ),
    _case("to rgb", (3, 19, 9, 7), 3, (1, 1), padding=(0, 0), demodulate=False, bias=True, clamp=256.0),
    _case("transposed", (2, 5, 4, 6), 7, up=2, padding=(0, 0)),
    _case("transposed, channels-last", (2, 5, 4, 6), 7, up=2, padding=(1, 1), layout="channels_last", noise="shared"),
    _case("transposed by 3", (2, 3, 4, 3), 5, (4, 5), up=3, padding=(1, 2), bias=True, act="swish"),
    _case("transposed by more than the taps", (1, 3, 4, 3), 5, (1, 2), up=3, padding=(0, 0), noise="each"),
    _case("no padding", (1, 3, 5, 6), 2, padding=(0, 0), bias=True, act="tanh"),
    _case("wide padding", (1, 3, 2, 3), 2, (2, 5), padding=(3, 7), noise="shared"),
    _case("even taps", (2, 4, 6, 5), 3, (4, 2), padding=(1, 1), demodulate=False),
    _case("one pixel", (3, 33, 1, 1), 17),
    _case("one channel", (2, 1, 9, 5), 1),
    _case("no batch", (0, 3, 5, 5), 4),
    _case("no outputs", (2, 3, 5, 5), 0),
    _case("prime sizes", (2, 37, 13, 11), 29, bias=True, act="relu", noise="each"),
    _case("small styles", (2, 16, 6, 6), 8, size=1e-3),
    _case("styles of 10,000", (2, 16, 6, 6), 8, size=1e4),
    _case("float32 parameters", (2, 16, 6, 6), 8, parameters="fp32", noise="each", bias=True, act="lrelu"),
    _case("padded rows", (2, 5, 6, 7), 4, layout="rows"),
    _case("unaligned", (2, 5, 6, 7), 4, layout="unaligned"),
    _case("many channels", (2, 150, 7, 19), 70, noise="each", bias=True, act="lrelu", small=False),
    _case("many channels, transposed", (2, 150, 7, 19), 70, up=2, padding=(0, 0), small=False),
    _case("many channels, channels-last", (2, 150, 7, 19), 70, layout="channels_last", small=False),
    _layer("512 4x4", (1, 512, 4, 4), 512),
    _layer("512 16x16", (1, 512, 16, 16), 512),
    _layer("512 32x32, 4 samples", (4, 512, 32, 32), 512),
    _layer("512 32x32, channels-last", (1, 512, 32, 32), 512, layout="channels_last"),
    _layer("128 128x128", (1, 128, 128, 128), 128),
    _layer("32 512x512", (1, 32, 512, 512), 32),
    _case("512 to 256, 32x32 transposed", (1, 512, 32, 32), 256, up=2, padding=(0, 0), bench=True),
    _case("128 to rgb 128x128", (1, 128, 128, 128), 3, (1, 1), padding=(0, 0), demodulate=False, bias=True, bench=True),
]


def draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments that nobody chose; of one sign where they are multiplied, so that sums do not cancel."""
    shape, outputs = (draw.integer(0, 3), *draw.shape(19, 9, 21, low=1)), draw.integer(0, 19)
    taps = draw.shape(4, 4, low=1)
    up, padding, own = draw.integer(1, 3), list(draw.shape(3, 3)), (dtype, torch.float32)
    sides = list(zip(shape[2:], taps, strict=True))
    if up == 1:
        padding = [max(p, (t - n + 1) // 2) for p, (n, t) in zip(padding, sides, strict=True)]
        out = [n - t + 1 + 2 * p for p, (n, t) in zip(padding, sides, strict=True)]
    else:
        padding = [min(p, ((n - 1) * up + t - 1) // 2) for p, (n, t) in zip(padding, sides, strict=True)]
        out = [(n - 1) * up + t - 2 * p for p, (n, t) in zip(padding, sides, strict=True)]
    x = draw.tensor(shape, dtype, mean=4.0)
    weight = (draw.dense((outputs, shape[1], *taps), torch.float32).abs() + 0.05).to(draw.choice(own))
    styles = (draw.dense(shape[:2], torch.float32).abs() + 0.5).to(draw.choice(own))
    batch = draw.choice((None, 1, shape[0]))
    noise = None if batch is None else draw.dense((batch, 1, *out), draw.choice(own), scale=0.3)
    bias = draw.maybe((outputs,), own)
    alpha, gain, clamp = draw.choice((None, 0.05)), draw.choice((None, 0.7)), draw.choice((None, 0.9))
    return (x, weight, styles, noise, bias, draw.flag(), up, padding, draw.choice(NAMES), alpha, gain, clamp, 1e-8)


def _modulated(x: Tensor, styles: Tensor) -> Tensor:
    return x * styles[:, :, None, None]


def _norm(weight: Tensor, styles: Tensor, eps: float) -> Tensor:
    """1 / the norm of each modulated filter, by a product of matrices: (B, O, 1, 1)."""
    norm = styles.square() @ weight.square().sum((2, 3)).t()
    return torch.rsqrt(norm + eps)[:, :, None, None]


def _norm_in_full(weight: Tensor, styles: Tensor, eps: float) -> Tensor:
    """The same from the modulated weights themselves."""
    w = weight[None] * styles[:, None, :, None, None]
    return torch.rsqrt(w.square().sum((2, 3, 4)) + eps)[:, :, None, None]


def _conv(x: Tensor, weight: Tensor, styles: Tensor, *, padding: Any = (3, 2), eps: float = 3e-8) -> Tensor:
    return F.conv2d(_modulated(x, styles), weight, padding=padding) * _norm(weight, styles, eps)


def _conv_in_full(x: Tensor, weight: Tensor, styles: Tensor, *, padding: Any = (3, 2), eps: float = 3e-8) -> Tensor:
    return F.conv2d(_modulated(x, styles), weight, padding=padding) * _norm_in_full(weight, styles, eps)


def _transposed(
    x: Tensor, weight: Tensor, styles: Tensor, *, stride: Any = (5, 5), padding: Any = (3, 2), eps: float = 3e-8
) -> Tensor:
    y = F.conv_transpose2d(_modulated(x, styles), weight.transpose(0, 1), stride=stride, padding=padding)
    return y * _norm(weight, styles, eps)


def _transposed_in_full(
    x: Tensor, weight: Tensor, styles: Tensor, *, stride: Any = (5, 5), padding: Any = (3, 2), eps: float = 3e-8
) -> Tensor:
    y = F.conv_transpose2d(_modulated(x, styles), weight.transpose(0, 1), stride=stride, padding=padding)
    return y * _norm_in_full(weight, styles, eps)


def _to_rgb(x: Tensor, weight: Tensor, styles: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(_modulated(x, styles), weight, bias)


def _to_rgb_unbiased(x: Tensor, weight: Tensor, styles: Tensor) -> Tensor:
    return F.conv2d(_modulated(x, styles), weight)


def _call(
    x: Any, weight: Any, styles: Any, padding: Any = (0, 0), eps: float = 0.0, stride: Any = (1, 1), bias: Any = None
) -> Mapping[str, Any] | str:
    """The op's arguments; an eps of 0 stands for no norm."""
    y, z = (stride * 2)[:2]
    if y != z:
        return f"its strides {stride} differ"
    if not eps and (weight.shape is None or not isinstance(weight.shape[0], int) or weight.shape[0] > FEW):
        return f"a scaled input alone, with more than {FEW} outputs, is left to the convolution"
    given = {"x": x, "weight": weight, "styles": styles, "bias": bias, "demodulate": eps > 0, "up": y}
    return {**given, "padding": (padding * 2)[:2], **({"eps": eps} if eps else {})}


def _noisy(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor, *, demodulate: bool = True, up: int = 7,
    padding: Any = (3, 2), eps: float = 3e-8,
) -> Tensor:  # fmt: skip
    y = torch.ops.fusegen.modulated_conv2d(
        x, weight, styles, None, None, demodulate, up, padding, "linear", None, None, None, eps
    )
    return y + noise


def _call_noisy(x: Any, weight: Any, noise: Any, up: int, padding: Any, **rest: Any) -> Mapping[str, Any] | str:
    shape = noise.shape
    if shape is None or x.shape is None or weight.shape is None or len(shape) != 4 or shape[1] != 1:
        return f"what is added has shape {shape}, which is not noise for all channels alike"
    sizes = list(zip(x.shape[2:], shape[2:], weight.shape[2:], padding, strict=True))
    if any(isinstance(n, str) for size in sizes for n in size):
        return "the sizes are symbolic: the noise might be broadcast"
    out = [n - t + 1 + 2 * p if up == 1 else (n - 1) * up + t - 2 * p for n, _, t, p in sizes]
    if list(shape[2:]) != out or shape[0] not in (1, x.shape[0]):
        return f"what is added has shape {shape}, which is not ({x.shape[0]} or 1, 1, {out[0]}, {out[1]})"
    return {"x": x, "weight": weight, "noise": noise, "up": up, "padding": padding, **rest}


def _finished(
    x: Tensor, weight: Tensor, styles: Tensor, bias: Tensor, *, demodulate: bool = True, up: int = 7,
    padding: Any = (3, 2), eps: float = 3e-8, act: str = "tanh", alpha: Any = 0.3, gain: Any = 1.7, clamp: Any = 2.9,
) -> Tensor:  # fmt: skip
    y = torch.ops.fusegen.modulated_conv2d(
        x, weight, styles, None, None, demodulate, up, padding, "linear", None, None, None, eps
    )
    return torch.ops.fusegen.bias_act(y, bias, 1, act, alpha, gain, clamp)


def _noisy_finished(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor, bias: Tensor, *, demodulate: bool = True, up: int = 7,
    padding: Any = (3, 2), eps: float = 3e-8, act: str = "tanh", alpha: Any = 0.3, gain: Any = 1.7, clamp: Any = 2.9,
) -> Tensor:  # fmt: skip
    y = torch.ops.fusegen.modulated_conv2d(
        x, weight, styles, noise, None, demodulate, up, padding, "linear", None, None, None, eps
    )
    return torch.ops.fusegen.bias_act(y, bias, 1, act, alpha, gain, clamp)


def _call_finished(**captures: Any) -> Mapping[str, Any]:
    return captures


FEW = 16  # outputs below which a convolution by a scaled input is bound by memory, and the scale worth fusing


def _inputs(*more: tuple[int, ...], taps: int = 4) -> Any:
    shapes = ((2, 6, 8, 8), (5, 6, taps, taps), (2, 6), *more)
    return lambda: tuple(torch.zeros(s) for s in shapes)


_NOISE = (2, 1, 47, 49)
SPELLINGS = [
    Spelling("conv(x styles) norm", _conv, _inputs(), _call),
    Spelling("conv(x styles) norm of modulated weights", _conv_in_full, _inputs(), _call),
    Spelling("transposed conv(x styles) norm", _transposed, _inputs(), _call),
    Spelling("transposed conv(x styles) norm of modulated weights", _transposed_in_full, _inputs(), _call),
    Spelling("conv(x styles) + bias, few outputs", _to_rgb, _inputs((5,), taps=1), _call),
    Spelling("conv(x styles), few outputs", _to_rgb_unbiased, _inputs(taps=1), _call),
    Spelling("modulated_conv2d, noise, bias_act", _noisy_finished, _inputs(_NOISE, (5,)), _call_finished),
    Spelling("modulated_conv2d, bias_act", _finished, _inputs((5,)), _call_finished),
    Spelling("modulated_conv2d, noise", _noisy, _inputs(_NOISE), _call_noisy),
]
