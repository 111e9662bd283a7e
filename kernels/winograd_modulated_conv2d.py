"""StyleGAN2's layer, a modulated 3x3 convolution at the image's size or at twice that, by Winograd's minimal filtering.

The layer of :mod:`.modulated_conv2d`, with the algorithm of :mod:`.winograd_conv2d`.  At twice the size it is a
transposed convolution of stride 2 and then a filter of four by four taps.  Along an axis, the even pixels of the first
are a product of polynomials, four pixels by the outer two weights, and five of their values make its five coefficients
(Toom & Cook); the odd ones are pixels by the middle weight.  So 4 x 4 pixels take 81 products of channels for 144.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import conv_taps, winograd_filters
from fusegen.kernels.bias_act import finish, finished
from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, is_channels_last, register
from fusegen.kernels.winograd_conv2d import check_filters, convolved, flat, unfolded

SCHEMA = (
    "(Tensor x, Tensor filters, Tensor squares, Tensor styles, int outputs, Tensor? taps=None, Tensor? noise=None,"
    ' Tensor? bias=None, str act="linear", float? alpha=None, float? gain=None, float? clamp=None, float eps=1e-8)'
    " -> Tensor"
)
NAME = "winograd_modulated_conv2d"
__all__ = ["NAME", "OP", "allocate", "alone", "cost", "finish", "reference"]


def allocate(
    x: Tensor,
    filters: Tensor,
    squares: Tensor,
    styles: Tensor,
    outputs: int,
    taps: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, ...]:
    """The uninitialised output (B, O, H, W), or (B, O, 2 H, 2 W) where there are ``taps`` (4, 4): channels-last where x
    is that and not also contiguous, else contiguous.

    x (B, I, H, W), filters as :mod:`.winograd_conv2d`'s, squares (O, I), styles (B, I), noise (B or 1, 1, out H, out
    W), bias (O,).  Raises ValueError where they do not fit, and as :func:`~.bias_act.finish` does.
    """
    finish(NAME, act, alpha, gain, clamp)
    check_filters(NAME, x, filters, outputs)
    if taps is not None and filters.dim() == 6:
        raise ValueError(f"{NAME}: taps go with filters (6, 6, P, I, 16), not in pairs")
    up = 1 if taps is None else 2
    shape = (x.shape[0], outputs, up * x.shape[2], up * x.shape[3])
    wanted = {"squares": (outputs, x.shape[1]), "styles": tuple(x.shape[:2]), "taps": (4, 4), "bias": (outputs,)}
    for name, given in (("squares", squares), ("styles", styles), ("taps", taps), ("bias", bias)):
        if given is not None and tuple(given.shape) != wanted[name]:
            raise ValueError(f"{NAME}: {name} has shape {tuple(given.shape)}, not {wanted[name]}")
    if noise is not None and tuple(noise.shape) not in ((shape[0], 1, *shape[2:]), (1, 1, *shape[2:])):
        raise ValueError(f"{NAME}: noise has shape {tuple(noise.shape)}; it is ({shape[0]} or 1, 1, {shape[2:]})")
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


# Of a polynomial of four coefficients, at the points of winograd_filters.TRANSPOSED; of one of five, from such values.
VALUES = (
    (1.0, 0.0, 0.0, 0.0),
    (8.0, 4.0, 2.0, 1.0),
    (1.0, -1.0, 1.0, -1.0),
    (1.0, 2.0, 4.0, 8.0),
    (0.0, 0.0, 0.0, 1.0),
)
COEFFICIENTS = (
    (1.0, 0.0, 0.0, 0.0, 0.0),
    (-1.5, 4.0, -2.0, -2.0, 1.0),
    (-1.5, 2.0, 5.0, 2.0, -1.5),
    (1.0, -2.0, -2.0, 4.0, -1.5),
    (0.0, 0.0, 0.0, 0.0, 1.0),
)


def _transposed(x: Tensor, filters: Tensor, outputs: int) -> Tensor:
    """The transposed convolution, (B, O, 2 H + 1, 2 W + 1), of x (B, I, H, W) in its dtype: each four by four pixels
    make nine by nine, and these are added up."""
    batch, inputs, height, width = x.shape
    down, across = -(-height // 4), -(-width // 4)
    spread, made = x.new_zeros(9, 4), x.new_zeros(9, 9)
    spread[:5], spread[5:] = x.new_tensor(VALUES), torch.eye(4)
    made[::2, :5], made[1::2, 5:] = x.new_tensor(COEFFICIENTS), torch.eye(4)
    kinds = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5], device=x.device)
    own = flat(filters, inputs).to(x.dtype)[kinds][:, kinds, :, :outputs]
    tiles = F.pad(x, (0, 4 * across - width, 0, 4 * down - height)).unflatten(3, (across, 4)).unflatten(2, (down, 4))
    values = torch.einsum("ai,ncyixj,bj->nyxabc", spread, tiles, spread)
    pixels = torch.einsum("ka,nyxabo,lb->noklyx", made, torch.einsum("nyxabc,abco->nyxabo", values, own), made)
    whole = (8 * down + 1, 8 * across + 1)
    added = F.fold(pixels.reshape(batch, outputs * 81, down * across), whole, kernel_size=9, stride=8)
    return added[:, :, : 2 * height + 1, : 2 * width + 1]


def reference(
    x: Tensor,
    filters: Tensor,
    squares: Tensor,
    styles: Tensor,
    outputs: int,
    taps: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """act(conv(styles x) / sqrt(styles^2 squares + eps) + noise + bias), in float32, or float64 where x is.

    ``filters``: :mod:`.winograd_filters` or :mod:`.conv_taps` of the weight, the transposed ones of the
    first where there are taps; ``squares``: the sum of each pair of channels' squared weights.
    """
    (out,) = allocate(x, filters, squares, styles, outputs, taps, noise, bias, act, alpha, gain, clamp, eps)
    if out.numel() == 0:
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    s = styles.to(wide)
    y = x.to(wide) * s[:, :, None, None]
    if taps is None:
        y = convolved(F.pad(y, (1, 1, 1, 1)), filters, outputs)
    else:
        y = F.pad(_transposed(y, filters, outputs), (1, 1, 1, 1))
        y = F.conv2d(y, taps.to(wide).expand(outputs, 1, -1, -1), groups=outputs)
    y = y * torch.rsqrt(s.square() @ squares.to(wide).t() + eps)[:, :, None, None]
    y = y if noise is None else y + noise.to(wide)
    y = y if bias is None else y + bias.to(wide)[:, None, None]
    return out.copy_(finished(y, finish(NAME, act, alpha, gain, clamp)))


def cost(x: Tensor, filters: Tensor, squares: Tensor, styles: Tensor, outputs: int, *rest: Any) -> Cost:
    """The direct convolution's operations, the transposed one's where there are taps, so that rates compare; each
    tensor read or written once."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    written = pixels * outputs * (1 if not rest or rest[0] is None else 4)
    read = sum(t.numel() * t.element_size() for t in (x, filters, squares, styles, *rest[:3]) if t is not None)
    return Cost(flops=18 * pixels * x.shape[1] * outputs, bytes=read + written * x.element_size())


def _arguments(
    g: Generator, x: Tensor, outputs: int, up: bool, noise: int, bias: bool, own: torch.dtype, pairs: bool
) -> list[Any]:
    """``noise``: how many samples have their own, 0 for none; ``own``: the dtype of all but the weights; ``pairs``:
    whether the filters are those of pairs."""
    batch, inputs, h, w = x.shape
    weight = torch.randn(outputs, inputs, 3, 3, generator=g) / (9 * max(inputs, 1)) ** 0.5
    styles = (1 + 0.5 * torch.randn(batch, inputs, generator=g)).to(own)
    scale, taps = 1 + up, (1 + torch.rand(4, 4, generator=g)).to(own) / 6 if up else None
    drawn = (0.3 * torch.randn(noise, 1, scale * h, scale * w, generator=g)).to(own) if noise else None
    offset = (0.3 * torch.randn(outputs, generator=g)).to(own) if bias else None
    of_weight = conv_taps.reference(weight.to(x.dtype)) if pairs else winograd_filters.reference(weight, up)
    return [x, of_weight, weight.square().sum((2, 3)), styles, outputs, taps, drawn, offset]


def _case(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    *,
    up: bool = False,
    layout: str = "channels_last",
    noise: bool = True,
    bias: bool = True,
    act: str = "lrelu",
    clamp: float | None = None,
    parameters: str = "same",
    pairs: bool = False,
    bench: bool = False,
    small: bool = True,
) -> Case:
    """A bench case at twice the size is none in bfloat16: a kernel may leave it to products of bfloat16."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = laid_out(torch.randn(shape, generator=g).to(dtype), layout)
        own = torch.float32 if parameters == "fp32" else dtype
        args = _arguments(g, x, outputs, up, shape[0] if noise else 0, bias, own, pairs)
        return (*args, act, None, None, clamp, 1e-8)

    dtypes = (torch.bfloat16,) if pairs else (torch.float32, torch.float16) if up and bench else FLOATS
    return Case(name, build, dtypes=dtypes, bench=bench, small=small and not bench)


CASES = [
    _case("small", (2, 5, 3, 4), 7),
    _case("small, twice the size", (2, 5, 3, 4), 7, up=True),
    _case("one pixel", (2, 8, 1, 1), 16),
    _case("one pixel, twice the size", (2, 8, 1, 1), 16, up=True),
    _case("one channel", (1, 1, 5, 3), 1, up=True),
    _case("no batch", (0, 4, 3, 3), 4, small=False),
    _case("no pixels", (2, 4, 0, 3), 4),
    _case("no inputs", (2, 0, 3, 3), 4, small=False),
    _case("no outputs", (2, 4, 3, 3), 0),
    _case("neither noise nor bias", (2, 17, 5, 6), 16, noise=False, bias=False, act="linear"),
    _case("a clamp that bites", (2, 17, 5, 6), 16, up=True, clamp=0.4, act="tanh"),
    _case("float32 parameters", (2, 16, 6, 6), 8, parameters="fp32"),
    _case("float32 parameters, twice the size", (2, 16, 6, 6), 8, up=True, parameters="fp32"),
    _case("prime sizes", (3, 37, 7, 11), 29, small=False),
    _case("prime sizes, twice the size", (3, 37, 7, 11), 29, up=True, small=False),
    _case("contiguous", (2, 16, 6, 6), 16, layout="contiguous"),
    _case("strided", (2, 16, 3, 5), 16, layout="strided", up=True),
    _case("several blocks", (3, 33, 33, 19), 70, small=False),
    _case("several blocks, twice the size", (3, 33, 17, 19), 70, up=True, small=False),
    _case("rows longer than a block, twice the size", (1, 5, 9, 270), 18, up=True, small=False),
    _case("pairs", (2, 5, 3, 4), 7, pairs=True),
    _case("pairs, float32 parameters", (2, 37, 7, 11), 48, pairs=True, parameters="fp32"),
    _case("pairs, neither noise nor bias", (3, 33, 33, 19), 70, pairs=True, noise=False, bias=False, small=False),
    _case("512 64x64", (1, 512, 64, 64), 512, clamp=256.0, bench=True),
    _case("128 256x256", (1, 128, 256, 256), 128, clamp=256.0, bench=True),
    _case("512 64x64 in pairs", (1, 512, 64, 64), 512, clamp=256.0, pairs=True, bench=True),
    _case("128 256x256 in pairs", (1, 128, 256, 256), 128, clamp=256.0, pairs=True, bench=True),
    _case("512 to twice 32x32", (1, 512, 32, 32), 512, up=True, clamp=256.0, bench=True),
    _case("256 to 128, twice 128x128", (1, 256, 128, 128), 128, up=True, clamp=256.0, bench=True),
]


def _eager(
    x: Tensor, filters: Tensor, squares: Tensor, styles: Tensor, outputs: int, taps: Any, noise: Any, bias: Any,
    act: str, alpha: Any, gain: Any, clamp: Any, eps: float,
) -> Tensor:  # fmt: skip
    """The scaled form: one convolution for all samples, after the published filter where there is one."""
    weight = unfolded(filters, outputs, x.shape[1], taps is not None).to(x.dtype)
    y = x * styles[:, :, None, None].to(x.dtype)
    if taps is None:
        y = F.conv2d(y, weight, padding=1)
    else:
        y = F.conv_transpose2d(y, weight.transpose(0, 1), stride=2)
        y = F.conv2d(F.pad(y, (1, 1, 1, 1)), taps.to(x.dtype).expand(outputs, 1, -1, -1), groups=outputs)
    norm = torch.rsqrt(styles.float().square() @ squares.t() + eps)
    y = y * norm[:, :, None, None].to(x.dtype)
    y = y if noise is None else y + noise.to(x.dtype)
    y = y if bias is None else y + bias[:, None, None].to(x.dtype)
    return finished(y, finish(NAME, act, alpha, gain, clamp))


def alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, filters, squares, styles, outputs, taps, noise, *rest = args
    own = noise if noise is None or noise.shape[0] == 1 else noise[b : b + 1]
    return (x[b : b + 1], filters, squares, styles[b : b + 1], outputs, taps, own, *rest)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = (*draw.shape(2, 40), *draw.shape(9, 9))
    x = draw.tensor(shape, dtype, layouts=("channels_last", "contiguous"))
    noise, own = draw.choice((0, 1, shape[0])), draw.choice((dtype, torch.float32))
    up = draw.flag()
    pairs = not up and dtype == torch.bfloat16 and draw.flag()
    args = _arguments(draw.generator(), x, draw.integer(0, 70), up, noise, draw.flag(), own, pairs)
    return (*args, draw.choice(("linear", "lrelu")), None, draw.choice((None, 0.7)), draw.choice((None, 0.9)), 1e-8)


OP = register(
    Op(
        name=NAME,
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # In float32 and with bfloat16 pairs as winograd_conv2d; otherwise only what comes out is rounded.
        tolerance={
            torch.float32: Tolerance(rms=8e-6, peak=2e-5),
            torch.bfloat16: Tolerance(rms=6e-3, peak=1.2e-2),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        eager=_eager,
        alone=alone,
        draw=_draw,
        formula="modulated_conv2d, 3x3, at the image's size or twice that, as A^T (G w G^T . B^T d B) A over tiles d",
        source="Karras et al. 2020, arXiv:1912.04958; Lavin & Gray 2015, arXiv:1509.09308; Toom 1963; Cook 1966",
    )
)
