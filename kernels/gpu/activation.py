"""The activations of bias_act in Triton, for every kernel that ends in one; the numbers are the spec's order."""

from __future__ import annotations

import triton
import triton.language as tl

_SELU_SCALE, _SELU_ALPHA = tl.constexpr(1.0507009873554805), tl.constexpr(1.6732632423543772)


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0: the Taylor polynomial of degree 7 near 0, where the difference would lose its digits."""
    p = 1.0 + x * (1 / 7)
    p = 1.0 + x * p * (1 / 6)
    p = 1.0 + x * p * (1 / 5)
    p = 1.0 + x * p * (1 / 4)
    p = 1.0 + x * p * (1 / 3)
    p = 1.0 + x * p * (1 / 2)
    return tl.where(x > -0.35, x * p, tl.exp(x) - 1.0)


@triton.jit
def _log1p(u):
    """log(1 + u) for 0 <= u <= 1, as 2 artanh(u / (2 + u)); the first term left out is below 2e-9."""
    z = u / (2.0 + u)
    s = z * z
    p = 1 / 13 + s * (1 / 15)
    p = 1 / 11 + s * p
    p = 1 / 9 + s * p
    p = 1 / 7 + s * p
    p = 1 / 5 + s * p
    p = 1 / 3 + s * p
    return 2.0 * z * (1.0 + s * p)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in five instructions: a division would be as many by itself, and e^x takes three for denormals."""
    r = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return r * r


@triton.jit
def activated(x, alpha, ACT: tl.constexpr):
    """act(x) in float32."""
    if ACT == 1:
        x = tl.where(x < 0.0, 0.0, x)
    elif ACT == 2:
        x = tl.where(x < 0.0, x * alpha, x)
    elif ACT == 3:
        e = _expm1(-2.0 * tl.abs(x))
        t = -e / (2.0 + e)
        x = tl.where(x < 0.0, -t, t)
    elif ACT == 4:
        x = sigmoid(x)
    elif ACT == 5:
        x = tl.where(x < 0.0, _expm1(tl.where(x < 0.0, x, 0.0)), x)
    elif ACT == 6:
        x = _SELU_SCALE * tl.where(x < 0.0, _SELU_ALPHA * _expm1(tl.where(x < 0.0, x, 0.0)), x)
    elif ACT == 7:
        x = tl.where(x < 0.0, 0.0, x) + _log1p(tl.exp(-tl.abs(x)))
    elif ACT == 8:
        x = x * sigmoid(x)
    elif ACT == 9:
        x = x * sigmoid(1.702 * x)
    return x
