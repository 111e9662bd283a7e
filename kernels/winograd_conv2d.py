"""A 3x3 convolution with padding 1 by Winograd's minimal filtering: 36 products of channels for 4 x 4 pixels, not 144.

Tiles of 6 x 6 pixels, four apart, and the filters (:mod:`.winograd_filters`) are multiplied in the transformed domain
(Lavin & Gray 2015, F(4 x 4, 3 x 3)), in float32: these transforms amplify what the products round.  In bfloat16 tiles
are 4 x 4 pixels, two apart (F(2 x 2, 3 x 3), 16 products for four pixels, not 36), and the filters are made here, and
rounded, of the weight's taps (:mod:`.conv_taps`), whose shape says so; a kernel may round a transformed tile to
bfloat16.  In float32 too they are made here of taps (:mod:`.winograd_taps`) where their shape says so; a kernel may
then take tiles of either size.

Where x is ``doubled``, a nearest 2x upsampling of it is convolved.  Of tiles of 4 x 4 pixels the two middle rows and
columns are then the same, and 7 of the 16 points, which are their differences, zero: 9 products are left.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels import conv_taps, winograd_filters, winograd_taps
from fusegen.kernels.conv_taps import GROUP
from fusegen.kernels.op import Cost, Op, Tolerance, is_channels_last, register
from fusegen.kernels.winograd_conv2d_cases import CASES, draw
from fusegen.kernels.winograd_filters import PANEL

SCHEMA = (
    "(Tensor x, Tensor filters, int outputs, Tensor? bias=None, Tensor? residual=None, bool doubled=False) -> Tensor"
)
INPUT = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
OUTPUT = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)

PAIR_INPUT = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
PAIR_OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))


def allocate(
    x: Tensor,
    filters: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    doubled: bool = False,
) -> tuple[Tensor, ...]:
    """The uninitialised output (B, O, H, W), or (B, O, 2 H, 2 W) where x is ``doubled``, for x (B, I, H, W), filters
    (6, 6, P, I, 16) or taps (P, I, 9, 16) or (P, ceil(I / 2), 3, 3, 32, 2), bias (O,) and a residual of the output's
    shape, which is added: channels-last where x is that and not also contiguous, else contiguous.

    Raises ValueError where they do not fit.
    """
    check_filters("winograd_conv2d", x, filters, outputs)
    return (images("winograd_conv2d", x, outputs, bias, residual, 2 if doubled else 1),)


def images(op: str, x: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, times: int = 1) -> Tensor:
    """Uninitialised images of ``times`` x's size and of its layout with ``outputs`` channels.

    Raises ValueError, which names ``op``, where bias (O,) or a residual of that shape and x's dtype does not fit.
    """
    shape = (x.shape[0], outputs, times * x.shape[2], times * x.shape[3])
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, not ({outputs},)")
    if residual is not None and (tuple(residual.shape) != shape or residual.dtype != x.dtype):
        raise ValueError(f"{op}: residual is {residual.dtype} {tuple(residual.shape)}, not {x.dtype} {shape}")
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def check_filters(op: str, x: Tensor, filters: Tensor, outputs: int) -> None:
    """Raises ValueError, which names ``op``, where filters of neither kind fit the images."""
    if x.dim() != 4 or tuple(filters.shape) not in (
        (6, 6, -(-outputs // PANEL), x.shape[1], PANEL),
        winograd_taps.shape_of(outputs, x.shape[1]),
        (-(-outputs // GROUP), -(-x.shape[1] // 2), 3, 3, GROUP, 2),
    ):
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, filters {tuple(filters.shape)} and {outputs} outputs are not (B, I, H, W), "
            "(6, 6, P, I, 16), (P, I, 9, 16) or (P, ceil(I / 2), 3, 3, 32, 2), and at most 16 P or 32 P"
        )


def reference(
    x: Tensor,
    filters: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    doubled: bool = False,
) -> Tensor:
    """A^T (filters . B^T d B) A for every tile d, in float32, or float64 where x is."""
    (out,) = allocate(x, filters, outputs, bias, residual, doubled)
    if out.numel() == 0:
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    y = convolved(F.pad(larger(x, doubled).to(wide), (1, 1, 1, 1)), filters, outputs)
    y = y if bias is None else y + bias.to(wide)[:, None, None]
    return out.copy_(y if residual is None else y + residual.to(wide))


def larger(x: Tensor, doubled: bool) -> Tensor:
    """x, or ``doubled`` each of its pixels 2 x 2 times."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if doubled else x


def convolved(padded: Tensor, filters: Tensor, outputs: int) -> Tensor:
    """A^T (filters . B^T d B) A of ``padded`` (B, I, H + 2, W + 2), in its dtype: (B, O, H, W)."""
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    pairs = filters.dim() == 6
    step = 2 if pairs else 4
    tiles = F.pad(padded, (0, step, 0, step)).unfold(2, step + 2, step).unfold(3, step + 2, step)
    tiles = tiles[:, :, : -(-height // step), : -(-width // step)]
    both = (PAIR_INPUT, PAIR_OUTPUT) if pairs else (INPUT, OUTPUT)
    b, a = (torch.tensor(m, dtype=padded.dtype, device=padded.device) for m in both)
    spread = torch.einsum("ai,ncyxij,bj->nyxabc", b, tiles, b)
    own = flat(filters, padded.shape[1]).to(padded.dtype)[..., :outputs]
    made = torch.einsum("ka,nyxabo,lb->noykxl", a, torch.einsum("nyxabc,abco->nyxabo", spread, own), a)
    return made.flatten(4).flatten(2, 3)[:, :, :height, :width]


def flat(filters: Tensor, inputs: int) -> Tensor:
    """The filters of any layout as (6, 6, I, O) or (4, 4, I, O), with what pads the outputs."""
    if filters.dim() == 4:
        filters = winograd_filters.reference(winograd_taps.weight_of(filters))
    return filters.transpose(2, 3).flatten(3) if filters.dim() == 5 else conv_taps.filters_of(filters, inputs)


def cost(
    x: Tensor,
    filters: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    doubled: bool = False,
) -> Cost:
    """The direct convolution's operations, so that rates compare, of one that is ``doubled`` those of its four phases
    of 2 x 2 taps; each tensor read or written once."""
    pixels, times = x.shape[0] * x.shape[2] * x.shape[3], 4 if doubled else 1
    moved = (x.numel() + times * pixels * outputs * (1 if residual is None else 2)) * x.element_size()
    return Cost(
        flops=(32 if doubled else 18) * pixels * x.shape[1] * outputs,
        bytes=moved + filters.numel() * filters.element_size(),
    )


@functools.lru_cache(maxsize=1)
def unfolded(filters: Tensor, outputs: int, inputs: int, transposed: bool = False) -> Tensor:
    """The weight (O, I, 3, 3) that the filters were made of; kept, as the filters are."""
    if filters.dim() == 4:
        return winograd_taps.weight_of(filters)[:outputs].float().contiguous(memory_format=torch.channels_last)
    if filters.dim() == 6:
        return conv_taps.weight_of(filters, inputs)[:outputs].float().contiguous(memory_format=torch.channels_last)
    g = torch.linalg.pinv(torch.tensor(winograd_filters.TRANSPOSED if transposed else winograd_filters.FILTER).double())
    own = flat(filters.double(), inputs)[..., :outputs]
    return torch.einsum("ka,abio,lb->oikl", g, own, g).float().contiguous(memory_format=torch.channels_last)


def _eager(
    x: Tensor, filters: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, doubled: bool
) -> Tensor:
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
    y = F.conv2d(x, unfolded(filters, outputs, x.shape[1]).to(x.dtype), bias, padding=1)
    return y if residual is None else y + residual


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, filters, outputs, bias, residual, doubled = args
    return (x[b : b + 1], filters, outputs, bias, None if residual is None else residual[b : b + 1], doubled)


OP = register(
    Op(
        name="winograd_conv2d",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # Measured on 48 to 1280 channels: rms 1e-6 to 5e-6, twice that of a sum in order in float32.  In bfloat16 a
        # kernel rounds the transformed tile, then the output: rms 2e-3 to 3.5e-3 and peak 3e-3 to 5e-3 on 24 to 2560
        # channels, 4.9e-3 and 8.7e-3 the worst of 2875 random ones, all small.
        tolerance={
            torch.float32: Tolerance(rms=8e-6, peak=2e-5),
            torch.bfloat16: Tolerance(rms=6e-3, peak=1.2e-2),
        },
        cases=CASES,
        eager=_eager,
        alone=_alone,
        draw=draw,
        formula="conv2d(x or 2x of it, 3x3 w, padding 1) + bias + residual as A^T (G w G^T . B^T d B) A, d 6 or 4 wide",
        source="Lavin & Gray 2015, arXiv:1509.09308; Winograd 1980",
    )
)
