"""Modulated convolution, StyleGAN2's layer from convolution to activation (Karras et al. 2020).

Sample b is convolved with its own weights w'[o, i] = styles[b, i] weight[o, i], divided, where ``demodulate``, by their
norm over (i, ky, kx).  Noise and a bias are added to the result, which is then activated, scaled and clamped as
:mod:`.bias_act` does.  With ``up`` above 1 the convolution is transposed, of that stride; resampling filters stay
:mod:`.upfirdn2d`'s, before or after.

Since modulation and norm are scales of input and output channels, conv(x, w') = norm(b, o) conv(styles x, weight): all
samples share one set of weights.  Kernels compute that form; the reference is the definition, sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.bias_act import ACTIVATIONS, Finish, finish, finished
from fusegen.kernels.modulated_conv2d_cases import CASES, SPELLINGS, draw
from fusegen.kernels.op import Cost, Op, Tolerance, is_channels_last, register

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor styles, Tensor? noise=None, Tensor? bias=None, bool demodulate=True, int up=1,"
    ' int[2] padding=0, str act="linear", float? alpha=None, float? gain=None, float? clamp=None, float eps=1e-8)'
    " -> Tensor"
)
__all__ = ["ACTIVATIONS", "OP", "Finish", "Sizes", "alone", "finish", "finished", "reference", "sizes"]


@dataclass(frozen=True)
class Sizes:
    """What an application is made of."""

    batch: int
    channels: int  # in
    outputs: int  # channels out
    height: int
    width: int
    taps_y: int
    taps_x: int
    up: int
    pad_y: int
    pad_x: int
    out_y: int
    out_x: int


def sizes(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    demodulate: bool = True,
    up: int = 1,
    padding: Sequence[int] = (0, 0),
    *rest: Any,
) -> Sizes:
    """The sizes of an application; raises ValueError where the arguments do not fit each other."""
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"modulated_conv2d: x {tuple(x.shape)}, weight {tuple(weight.shape)} are not (B, I, H, W), (O, I, ky, kx)"
        )
    if tuple(styles.shape) != tuple(x.shape[:2]):
        raise ValueError(
            f"modulated_conv2d: styles have shape {tuple(styles.shape)}, x's (B, I) is {tuple(x.shape[:2])}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"modulated_conv2d: bias has shape {tuple(bias.shape)}, there are {weight.shape[0]} outputs")
    if up < 1 or min(padding) < 0 or min(weight.shape[1:]) < 1:
        raise ValueError(
            f"modulated_conv2d: up {up}, padding {tuple(padding)} or (I, ky, kx) {tuple(weight.shape[1:])}"
        )
    (height, width), (taps_y, taps_x), (pad_y, pad_x) = x.shape[2:], weight.shape[2:], padding
    if up == 1:
        out_y, out_x = height + 2 * pad_y - taps_y + 1, width + 2 * pad_x - taps_x + 1
    else:
        out_y, out_x = (height - 1) * up + taps_y - 2 * pad_y, (width - 1) * up + taps_x - 2 * pad_x
    if out_y < 1 or out_x < 1:
        raise ValueError(f"modulated_conv2d: an output of {out_y} x {out_x} from x {tuple(x.shape)}")
    if noise is not None and tuple(noise.shape) not in ((x.shape[0], 1, out_y, out_x), (1, 1, out_y, out_x)):
        raise ValueError(
            f"modulated_conv2d: noise has shape {tuple(noise.shape)}; it is ({x.shape[0]} or 1, 1, {out_y}, {out_x})"
        )
    return Sizes(x.shape[0], x.shape[1], weight.shape[0], height, width, taps_y, taps_x, up, pad_y, pad_x, out_y, out_x)


def allocate(x: Tensor, weight: Tensor, styles: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The uninitialised output (B, O, out y, out x), channels-last where x is, else contiguous; raises as sizes."""
    s = sizes(x, weight, styles, *rest)
    finish("modulated_conv2d", *(*rest, *(None, None, True, 1, (0, 0), "linear", None, None, None)[len(rest) :])[5:9])
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty((s.batch, s.outputs, s.out_y, s.out_x), dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    demodulate: bool = True,
    up: int = 1,
    padding: Sequence[int] = (0, 0),
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """By the definition, each sample with weights of its own, in float32, or float64 where x is."""
    (out,) = allocate(x, weight, styles, noise, bias, demodulate, up, padding, act, alpha, gain, clamp)
    wide = torch.promote_types(x.dtype, torch.float32)
    for b in range(x.shape[0] if out.numel() else 0):
        w = weight.to(wide) * styles[b].to(wide)[None, :, None, None]
        if demodulate:
            w = w * torch.rsqrt(w.square().sum((1, 2, 3), keepdim=True) + eps)
        y = _convolved(x[b : b + 1].to(wide), w, up, padding)
        if noise is not None:
            y = y + noise[b if noise.shape[0] > 1 else 0].to(wide)
        if bias is not None:
            y = y + bias.to(wide)[:, None, None]
        out[b : b + 1] = finished(y, finish("modulated_conv2d", act, alpha, gain, clamp))
    return out


def _convolved(x: Tensor, w: Tensor, up: int, padding: Sequence[int]) -> Tensor:
    if up == 1:
        return F.conv2d(x, w, padding=tuple(padding))
    return F.conv_transpose2d(x, w.transpose(0, 1), stride=up, padding=tuple(padding))


def _met(size: int, out: int, taps: int, up: int) -> int:
    """Taps that all outputs of an axis meet, zeros around x included."""
    return out * taps if up == 1 else size * taps


def cost(x: Tensor, weight: Tensor, styles: Tensor, *rest: Any) -> Cost:
    """A multiply and an add for each tap; x, weight, noise and the rest read once, the output written once."""
    s = sizes(x, weight, styles, *rest)
    met = _met(s.height, s.out_y, s.taps_y, s.up) * _met(s.width, s.out_x, s.taps_x, s.up)
    read = sum(t.numel() * t.element_size() for t in (x, weight, styles, *rest[:2]) if t is not None)
    written = s.batch * s.outputs * s.out_y * s.out_x * x.element_size()
    return Cost(flops=2 * s.batch * s.outputs * s.channels * met, bytes=read + written)


def _eager(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Any, bias: Any, demodulate: bool, up: int, padding: Any,
    act: str, alpha: Any, gain: Any, clamp: Any, eps: float,
) -> Tensor:  # fmt: skip
    """The scaled form: one convolution for all samples."""
    y = _convolved(x * styles[:, :, None, None].to(x.dtype), weight.to(x.dtype), up, padding)
    if demodulate:
        norm = styles.float().square() @ weight.float().square().sum((2, 3)).t()
        y = y * torch.rsqrt(norm + eps)[:, :, None, None].to(x.dtype)
    if noise is not None:
        y = y + noise.to(x.dtype)
    if bias is not None:
        y = y + bias[:, None, None].to(x.dtype)
    return finished(y, finish("modulated_conv2d", act, alpha, gain, clamp))


def alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """The arguments of sample ``b``."""
    x, weight, styles, noise, *rest = args
    own = noise if noise is None or noise.shape[0] == 1 else noise[b : b + 1]
    return (x[b : b + 1], weight, styles[b : b + 1], own, *rest)


OP = register(
    Op(
        name="modulated_conv2d",
        formula="act(d conv2d(x, s w) + noise + bias), d = 1 / sqrt(sum (s w)^2 + eps)",
        source="Karras et al. 2020, arXiv:1912.04958, section 2.2",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # float32 kernels add the products of a whole sum, up to 4608 of them, in float32 one after the other.  In half
        # precision the modulated input is rounded once more before the product, relative to the sum that a clamp or an
        # activation may then make small: peaks of 5.6e-3 were seen under a clamp that bites.
        tolerance={
            torch.float32: Tolerance(rms=5e-6, peak=1e-5),
            torch.bfloat16: Tolerance(rms=4e-3, peak=8e-3),
            torch.float16: Tolerance(rms=5e-4, peak=1e-3),
        },
        cases=CASES,
        spellings=SPELLINGS,
        eager=_eager,
        alone=alone,
        draw=draw,
    )
)
