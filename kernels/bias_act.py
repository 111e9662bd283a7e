"""Bias, activation, gain and clamp in one pass: StyleGAN's elementwise op (Karras et al. 2020, 2021).

y = clamp(gain * act(x + bias)), with the bias along one dimension; each step is optional.  The defaults of an
activation's slope and gain are those of the published networks: the gain keeps the signal's magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.bias_act_cases import CASES, draw
from fusegen.kernels.op import Cost, Op, Spelling, Tolerance, is_channels_last, register

SCHEMA = (
    '(Tensor x, Tensor? bias=None, int dim=1, str act="linear", float? alpha=None, float? gain=None,'
    " float? clamp=None) -> Tensor"
)


@dataclass(frozen=True)
class Activation:
    """``func(x, alpha)``, and the defaults of ``alpha`` and of the gain after it."""

    func: Callable[[Tensor, float], Tensor]
    alpha: float = 0.0
    gain: float = 1.0


# In this order kernels number them.
ACTIVATIONS: Mapping[str, Activation] = {
    "linear": Activation(lambda x, _: x),
    "relu": Activation(lambda x, _: F.relu(x), gain=math.sqrt(2)),
    "lrelu": Activation(F.leaky_relu, alpha=0.2, gain=math.sqrt(2)),
    "tanh": Activation(lambda x, _: torch.tanh(x)),
    "sigmoid": Activation(lambda x, _: torch.sigmoid(x)),
    "elu": Activation(lambda x, _: F.elu(x)),
    "selu": Activation(lambda x, _: F.selu(x)),
    "softplus": Activation(lambda x, _: F.softplus(x)),
    "swish": Activation(lambda x, _: F.silu(x), gain=math.sqrt(2)),
    "quick_gelu": Activation(lambda x, _: _quick_gelu(x)),  # CLIP's, not StyleGAN's
}


@dataclass(frozen=True)
class Finish:
    """The arguments after the bias with their defaults filled in; ``clamp`` is infinite where there is none."""

    act: int
    alpha: float
    gain: float
    clamp: float


def finish(op: str, act: str, alpha: float | None, gain: float | None, clamp: float | None) -> Finish:
    """Checked arguments of ``op``.  Raises ValueError where the activation is not known or the clamp is negative."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: no activation is called {act!r}; there are {', '.join(ACTIVATIONS)}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"{op}: the clamp {clamp} is negative")
    known = ACTIVATIONS[act]
    return Finish(
        list(ACTIVATIONS).index(act),
        known.alpha if alpha is None else float(alpha),
        known.gain if gain is None else float(gain),
        math.inf if clamp is None else float(clamp),
    )


def finished(y: Tensor, found: Finish) -> Tensor:
    """``y`` after its bias: activated, scaled, clamped; in y's dtype."""
    y = list(ACTIVATIONS.values())[found.act].func(y, found.alpha)
    if found.gain != 1:
        y = y * found.gain
    return y.clamp(-found.clamp, found.clamp) if math.isfinite(found.clamp) else y


def allocate(
    x: Tensor,
    bias: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> tuple[Tensor, ...]:
    """The uninitialised output: of x's shape and dtype, channels-last where x is, else contiguous.

    Raises ValueError where the bias does not fit dimension ``dim`` and as :func:`finish` does.
    """
    finish("bias_act", act, alpha, gain, clamp)
    if bias is not None:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"bias_act: x of shape {tuple(x.shape)} has no dimension {dim}")
        if tuple(bias.shape) != (x.shape[dim],):
            raise ValueError(
                f"bias_act: bias has shape {tuple(bias.shape)}, dimension {dim} of x has size {x.shape[dim]}"
            )
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor,
    bias: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """clamp(gain act(x + bias)) in float32, or float64 where x is."""
    (out,) = allocate(x, bias, dim, act, alpha, gain, clamp)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if bias is not None:
        shape = [1] * x.dim()
        shape[dim] = -1
        y = y + bias.to(wide).reshape(shape)
    return out.copy_(finished(y, finish("bias_act", act, alpha, gain, clamp)))


def cost(x: Tensor, bias: Tensor | None = None, *rest: Any) -> Cost:
    """Four operations an element (bias, activation, gain, clamp); x read and the output written once."""
    parameters = 0 if bias is None else bias.numel() * bias.element_size()
    return Cost(flops=4 * x.numel(), bytes=2 * x.numel() * x.element_size() + parameters)


@dataclass(frozen=True)
class Folded:
    """A tensor as (outer, channels, inner) with one stride each; the bias lies along ``channels``."""

    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]


def _merged(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) pairs, outermost first, without ones, joined where one step continues the other."""
    out: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if out and out[-1][1] == stride * size:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return out


def folded(x: Tensor, bias: Tensor | None, dim: int) -> Folded | None:
    """x in the memory order of its output, or None where one stride for each of the three does not reach all of it.

    Without a bias there is no channel: what cannot be joined is split between outer and inner.
    """
    order = (0, 2, 3, 1) if is_channels_last(x) else tuple(range(x.dim()))
    dims = [(x.shape[d], x.stride(d)) for d in order]
    if bias is None:
        whole = _merged(dims)
        if len(whole) > 2:
            return None
        (outer, inner) = ([(1, 0)] * 2 + whole)[-2:]
        return Folded((outer[0], 1, inner[0]), (outer[1], 0, inner[1]))
    at = order.index(dim % x.dim())
    before, after = _merged(dims[:at]), _merged(dims[at + 1 :])
    if len(before) > 1 or len(after) > 1:
        return None
    outer, inner = (before or [(1, 0)])[0], (after or [(1, 0)])[0]
    return Folded((outer[0], dims[at][0], inner[0]), (outer[1], dims[at][1], inner[1]))


def _per_channel(b: Tensor) -> Tensor:
    return b.reshape(1, -1, 1, 1)


def _lrelu_gain(x: Tensor, *, alpha: float = 0.15, gain: float = 1.3) -> Tensor:
    return F.leaky_relu(x, alpha) * gain


def _lrelu_gain_clamp(
    x: Tensor, *, alpha: float = 0.15, gain: float = 1.3, low: float = -7.0, high: float = 7.0
) -> Tensor:
    return (F.leaky_relu(x, alpha) * gain).clamp(low, high)


def _bias_lrelu(x: Tensor, bias: Tensor, *, alpha: float = 0.15) -> Tensor:
    return F.leaky_relu(x + _per_channel(bias), alpha)


def _bias_lrelu_gain(x: Tensor, bias: Tensor, *, alpha: float = 0.15, gain: float = 1.3) -> Tensor:
    return F.leaky_relu(x + _per_channel(bias), alpha) * gain


def _bias_lrelu_gain_clamp(
    x: Tensor, bias: Tensor, *, alpha: float = 0.15, gain: float = 1.3, low: float = -7.0, high: float = 7.0
) -> Tensor:
    return (F.leaky_relu(x + _per_channel(bias), alpha) * gain).clamp(low, high)


def _bias_clamp(x: Tensor, bias: Tensor, *, low: float = -7.0, high: float = 7.0) -> Tensor:
    return (x + _per_channel(bias)).clamp(low, high)


def _call(act: str) -> Any:
    def call(
        x: Any, bias: Any = None, alpha: float = 0.0, gain: float = 1.0, low: float = 0.0, high: Any = None
    ) -> Mapping[str, Any] | str:
        if high is not None and (low != -high or high < 0):
            return f"it clamps to [{low}, {high}], which is not symmetric"
        if bias is not None and (x.shape is None or len(x.shape) != 4 or bias.shape is None or len(bias.shape) != 1):
            return "it is not known to add a vector to the channels of (B, C, H, W)"
        return {"x": x, "bias": bias, "dim": 1, "act": act, "alpha": alpha, "gain": gain, "clamp": high}

    return call


_X, _B = (2, 6, 5, 5), (6,)


def _relu_gain(x: Tensor, bias: Tensor, *, gain: float = 1.3) -> Tensor:
    return F.relu(x + _per_channel(bias)) * gain


def _swish_gain(x: Tensor, bias: Tensor, *, gain: float = 1.3) -> Tensor:
    return F.silu(x + _per_channel(bias)) * gain


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _both() -> tuple[Tensor, ...]:
    return torch.zeros(_X), torch.zeros(_B)


def _alone() -> tuple[Tensor, ...]:
    return (torch.zeros(_X),)


SPELLINGS = [
    Spelling("clamp(gain lrelu(x + bias))", _bias_lrelu_gain_clamp, _both, _call("lrelu")),
    Spelling("gain lrelu(x + bias)", _bias_lrelu_gain, _both, _call("lrelu")),
    Spelling("gain relu(x + bias)", _relu_gain, _both, _call("relu")),
    Spelling("gain silu(x + bias)", _swish_gain, _both, _call("swish")),
    Spelling("lrelu(x + bias)", _bias_lrelu, _both, _call("lrelu")),
    Spelling("clamp(x + bias)", _bias_clamp, _both, _call("linear")),
    Spelling("clamp(gain lrelu(x))", _lrelu_gain_clamp, _alone, _call("lrelu")),
    Spelling("gain lrelu(x)", _lrelu_gain, _alone, _call("lrelu")),
    Spelling("x*sigmoid(1.702x)", _quick_gelu, _alone, _call("quick_gelu")),
]


def _eager(x: Tensor, bias: Any, dim: int, act: str, alpha: Any, gain: Any, clamp: Any) -> Tensor:
    if bias is not None:
        shape = [1] * x.dim()
        shape[dim] = -1
        x = x + bias.to(x.dtype).reshape(shape)
    return finished(x, finish("bias_act", act, alpha, gain, clamp))


def _sample(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, bias, dim, *rest = args
    own = bias if bias is None or dim % x.dim() else bias[b : b + 1]
    return (x[b : b + 1], own, dim, *rest)


OP = register(
    Op(
        name="bias_act",
        formula="clamp(gain act(x + bias)), one of ten activations",
        source="Karras et al. 2020, arXiv:2006.06676 (the official code's bias_act)",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=1e-6, peak=2e-6),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        spellings=SPELLINGS,
        eager=_eager,
        alone=_sample,
        draw=draw,
    )
)
