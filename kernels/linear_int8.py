"""A linear layer with int8 weights, y = act(x W^T + bias) + residual; x is quantized to int8 row by row on the way.

The arithmetic is exact up to the last steps, so that kernels can be held to it closely (dynamic quantization as in Yao
et al. 2022, ZeroQuant, "token-wise"): a row of x becomes ``codes = round(x * (127 / absmax))``, ties to even, in
float32; ``sum(codes * weight)`` is an exact integer; it is scaled by ``absmax * float32(1/127) * scale[n]``.  A row
whose largest magnitude is below 2^-100 counts as zero; one with an infinity or NaN gives NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusegen.kernels import onednn
from fusegen.kernels.draw import LAYOUTS, Draw, laid_out
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? residual=None, str activation='none') -> Tensor"
)
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),  # CLIP's
}
LARGEST = 127  # the largest code's magnitude
TINY = 2.0**-100  # rows below it count as zero: 127 / absmax stays finite
PIECE = 2**20  # elements of a weight that are quantized at a time: what is made on the way stays in a cache
LONGEST = 2**17  # elements of a row: 2^17 products of -128 and 127 still fit an int32


def check(op: str, x: Tensor, out_features: int, bias: Any, residual: Any, activation: str) -> None:
    """What the quantized linear ops ask of x and of what is fused behind the product; raises ValueError."""
    if x.dim() < 1:
        raise ValueError(f"{op}: x has no dimension to multiply")
    if x.shape[-1] > LONGEST:
        raise ValueError(f"{op}: x's rows of {x.shape[-1]} are longer than {LONGEST}, past which an int32 may overflow")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, the weight has {out_features} rows")
    shape = (*x.shape[:-1], out_features)
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, the output has {shape}")


def allocate(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (*, N) for x (*, K), weight (N, K) int8, scale (N,): x's dtype, contiguous.

    Raises ValueError where arguments do not fit.
    """
    if weight.dim() != 2 or weight.dtype != torch.int8:
        raise ValueError(f"linear_int8: weight is {weight.dtype} of shape {tuple(weight.shape)}, not int8 (N, K)")
    check("linear_int8", x, weight.shape[0], bias, residual, activation)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"linear_int8: weight has {weight.shape[1]} columns, x has rows of {x.shape[-1]}")
    if tuple(scale.shape) != (weight.shape[0],):
        raise ValueError(f"linear_int8: scale has shape {tuple(scale.shape)}, the weight has {weight.shape[0]} rows")
    return (torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device),)


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (*, K) as int8 codes (*, K) and their float32 scales (*, 1), by the arithmetic of this file's first lines."""
    if not x.shape[-1]:
        return x.to(torch.int8), x.new_zeros((*x.shape[:-1], 1), dtype=torch.float32)
    absmax = x.float().abs().amax(-1, keepdim=True)
    finite = absmax.isfinite()
    inverse = torch.where((absmax >= TINY) & finite, torch.full_like(absmax, LARGEST) / absmax, 0.0)
    codes = (x.float() * inverse).round_().nan_to_num_(nan=0.0)  # infinity times 0 is NaN
    return codes.to(torch.int8), _scale(absmax)


def _scale(absmax: Tensor) -> Tensor:
    """The scales of rows by their largest magnitudes, float32: these themselves where they are not finite."""
    return torch.where(absmax >= TINY, absmax * (1 / LARGEST), torch.where(absmax.isfinite(), 0.0, absmax))


def finish(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """act(y + bias) + residual in y's dtype."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.to(y.dtype)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """x (*, K) by weight (N, K) int8 times scale (N,); the integers are exact, the rest float32, or float64 as x."""
    (out,) = allocate(x, weight, scale, bias, residual, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    codes, scales = codes_of(x)
    sums = codes.double() @ weight.double().t()  # at most 2^31, so exact
    return out.copy_(finish(sums.to(wide) * scales.to(wide) * scale.to(wide), bias, residual, activation))


def cost(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Any = None, residual: Any = None, activation: str = "none"
) -> Cost:
    """The products and sums; every argument read and the output written once."""
    rows = x.numel() // max(1, x.shape[-1])
    tensors = [t for t in (x, weight, scale, bias, residual) if t is not None]
    out = rows * weight.shape[0] * x.element_size()
    moved = sum(t.numel() * t.element_size() for t in tensors) + out
    return Cost(flops=2 * rows * weight.numel(), bytes=moved, written=out, products="int8")


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) as int8 codes in [-127, 127] and a float32 scale (N,) for each row, symmetric, by its largest
    magnitude: ``codes * scale[:, None]`` is within half a scale of it.  Raises ValueError where it is not finite."""
    codes, scale = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
    for part in _pieces(weight):
        codes[part], found = codes_of(weight[part])
        scale[part] = found.squeeze(-1)
    return codes, _finite(scale)


def scale_int8(weight: Tensor) -> Tensor:
    """The scales of :func:`quantize_int8` alone; raises what that raises."""
    scale = weight.new_zeros(len(weight), dtype=torch.float32)
    for part in _pieces(weight):
        if weight.shape[1]:
            scale[part] = _scale(weight[part].abs().amax(1).float())
    return _finite(scale)


def _pieces(weight: Tensor) -> list[slice]:
    """Rows of a weight that are quantized at a time."""
    if weight.dim() != 2:
        raise ValueError(f"quantize_int8: the weight has shape {tuple(weight.shape)}, not (N, K)")
    rows = max(1, PIECE // max(1, weight.shape[1]))
    return [slice(i, i + rows) for i in range(0, weight.shape[0], rows)]


def _finite(scale: Tensor) -> Tensor:
    """The scales, which are finite where the row's largest magnitude is."""
    if not bool(scale.isfinite().all()):
        raise ValueError("quantize_int8: the weight holds an infinity or NaN")
    return scale


def random_x(g: Generator, lead: tuple[int, ...], k: int, dtype: torch.dtype, kind: str) -> Tensor:
    """Rows of x for cases; ``kind``: a layout, or "extremes": zeros, tiny and huge rows, and a lone outlier."""
    x = torch.randn(*lead, k, generator=g)
    if kind == "extremes":
        big = 1e3 if dtype == torch.float16 else 1e30
        flat = x.view(-1, k)
        flat[0], flat[1], flat[2], flat[3] = 0.0, flat[1] * 1e-36, flat[2].clamp(-4, 4) / 4 * big, 0.0
        flat[3, k // 2] = -big
    return laid_out(x.to(dtype), kind if kind in LAYOUTS else "contiguous")


def random_tail(
    g: Generator, shape: tuple[int, ...], dtype: torch.dtype, bias: str, residual: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Bias ("same" dtype as x, "fp32" or "no") and residual of an output shape, for cases."""
    own = torch.float32 if bias == "fp32" else dtype
    return (
        torch.randn(shape[-1], generator=g).to(own) if bias != "no" else None,
        torch.randn(shape, generator=g).to(dtype) if residual else None,
    )


def _case(
    name: str, lead: tuple[int, ...], n: int, k: int, *, kind: str = "contiguous", bias: str = "same",
    residual: bool = False, activation: str = "none", bench: bool = False, small: bool = True,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = random_x(g, lead, k, dtype, kind)
        weight = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
        scale = (0.5 + torch.rand(n, generator=g)) / (74 * max(k, 1) ** 0.5)  # outputs of about one
        tail = random_tail(g, (*lead, n), dtype, bias, residual)
        return (x, weight, scale, *tail, activation)

    dtypes = (torch.float32, torch.bfloat16) if bench else FLOATS
    return Case(name, build, dtypes=dtypes, bench=bench, small=small)


CASES = [
    _case("small", (3, 5), 16, 64),
    _case("no rows", (0, 7), 16, 32),
    _case("no columns", (2, 3), 7, 0),
    _case("no outputs", (2, 3), 0, 16),
    _case("one row", (48,), 20, 48),
    _case("one element", (1, 1), 1, 1),
    _case("one token", (1, 1), 70, 257, bias="fp32"),
    _case("prime sizes", (3, 7), 37, 131, residual=True),
    _case("many rows", (2, 67), 83, 201, activation="silu", residual=True, small=False),
    _case("many rows of few outputs", (2, 75), 40, 96, residual=True, small=False),
    _case("33 rows", (1, 33), 40, 96, activation="relu", bias="no"),
    _case("many long rows", (1, 71), 70, 1100, residual=True, small=False),
    _case("gelu", (2, 9), 33, 80, activation="gelu"),
    _case("gelu_tanh", (2, 9), 33, 80, activation="gelu_tanh", bias="fp32"),
    _case("quick_gelu", (2, 9), 33, 80, activation="quick_gelu", bias="fp32"),
    _case("silu", (2, 9), 33, 80, activation="silu", residual=True),
    _case("extremes", (2, 3), 24, 64, kind="extremes", bias="no"),
    _case("padded rows", (2, 5), 24, 64, kind="padded"),
    _case("transposed", (2, 5), 24, 64, kind="transposed"),
    _case("strided", (2, 5), 24, 64, kind="strided"),
    _case("unaligned", (2, 5), 24, 64, kind="unaligned"),
    _case("long rows", (2, 2), 5, 9001, small=False),
    *(
        _case(f"{m}x{n}x{k}", (1, m), n, k, bench=True, small=False)
        for m, n, k in ((1, 4096, 4096), (1, 11008, 4096), (16, 4096, 4096), (512, 4096, 4096))
    ),
    _case("512x5120x1280 gelu", (1, 512), 5120, 1280, activation="gelu", bench=True, small=False),
    _case("512x1280x5120 residual", (1, 512), 1280, 5120, residual=True, bench=True, small=False),
]


_prepacked: Any = WeakTensorKeyDictionary()  # weight -> the form of it that is multiplied by, made once as a user would


def _eager(x: Tensor, weight: Tensor, scale: Tensor, bias: Any, residual: Any, activation: str) -> Tensor:
    """PyTorch's own int8 product over the same codes: oneDNN's with a prepacked weight on a CPU (the codes unsigned:
    signed ones took it seconds with VNNI and no AMX), in float32 where its sums saturate, cuBLAS's on a GPU."""
    codes, scales = codes_of(x.reshape(-1, x.shape[-1]))
    if x.device.type == "cpu" and onednn.saturates():
        if weight not in _prepacked:
            _prepacked[weight] = weight.float()
        y = F.linear(codes.float(), _prepacked[weight]) * scale
    elif x.device.type == "cpu":
        if weight not in _prepacked:
            _prepacked[weight] = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
        zero = torch.zeros(weight.shape[0], dtype=torch.int64)
        plus = codes.view(torch.uint8) ^ 128  # the codes + 128
        y = torch.ops.onednn.qlinear_pointwise(
            plus, 1.0, 128, _prepacked[weight], scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
    else:
        padded = F.pad(codes, (0, 0, 0, max(0, 17 - codes.shape[0])))  # cuBLAS asks for more than 16 rows
        y = torch._int_mm(padded, weight.t())[: codes.shape[0]] * scale
    y = finish((y * scales).view(*x.shape[:-1], -1), bias, None, activation).to(x.dtype)
    return y if residual is None else y + residual


def alone(args: tuple[Any, ...], b: int, residual: int = 4) -> tuple[Any, ...]:
    """Sample ``b`` by itself: its rows of x and of the residual, argument ``residual``."""
    cut = None if args[residual] is None else args[residual][b : b + 1]
    return (args[0][b : b + 1], *args[1:residual], cut, *args[residual + 1 :])


def draw_tail(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Bias, residual and activation for an output shape."""
    bias = draw.maybe(shape[-1:], (dtype, torch.float32))
    return (bias, draw.maybe(shape, (dtype,)), draw.choice(tuple(ACTIVATIONS)))


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    lead, (n, k) = draw.shape(4, *[40] * draw.integer(0, 1)), draw.shape(50, 150)
    x = draw.tensor((*lead, k), dtype)
    weight, scale = quantize_int8(draw.dense((n, k), torch.float32, scale=max(k, 1) ** -0.5))
    return (x, weight, scale, *draw_tail(draw, (*lead, n), dtype))


OP = register(
    Op(
        name="linear_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={  # of the short types that of rounding the output once: its worst, 2^-8 and 2^-11, where there is
            # one element or the largest has the smallest significand; the reference in these types comes as close to it
            torch.float32: Tolerance(rms=1e-6, peak=2e-6),
            torch.bfloat16: Tolerance(rms=3.91e-3, peak=3.91e-3),
            torch.float16: Tolerance(rms=4.9e-4, peak=4.9e-4),
        },
        cases=CASES,
        eager=_eager,
        alone=alone,
        draw=_draw,
        formula="act(absmax/127 * scale * (round(127 x / absmax) W^T) + bias) + residual, absmax of each row",
        source="Yao et al. 2022 (ZeroQuant), arXiv:2206.01861",
    )
)
