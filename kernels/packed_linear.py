"""A linear layer of many rows by a weight in panels, and what follows it: y = act(x W^T + bias + residual).

A session packs its weights once (:mod:`.linear_panels`).  What the kernels add up for a row is the same whatever the
other rows are.  Few rows have :mod:`.linear`, which takes the weight as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusegen.kernels import linear, linear_panels, onednn
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import ACTIVATIONS, random_tail, random_x
from fusegen.kernels.op import FLOATS, Case, Cost, Op, register

SCHEMA = (
    "(Tensor x, Tensor panels, int outputs, Tensor? bias=None, Tensor? residual=None, str activation='none') -> Tensor"
)


def check(name: str, x: Tensor, panels: Tensor, outputs: int, activation: str, gated: bool) -> None:
    """Raises ValueError where x, panels or the activation do not fit the op called ``name``."""
    if x.dim() < 1 or outputs < 0 or panels.dtype != x.dtype:
        raise ValueError(f"{name}: x is {x.dtype} {tuple(x.shape)}, panels are {panels.dtype}, for {outputs} outputs")
    known = (linear_panels.shape_of(outputs, x.shape[-1], gated, d) for d in (torch.bfloat16, torch.float32))
    want = list(known)
    if tuple(panels.shape) not in want:
        raise ValueError(
            f"{name}: panels have shape {tuple(panels.shape)}, for these x and outputs it is {want[0]} or {want[1]}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")


def check_bias(name: str, outputs: int, **given: Tensor | None) -> None:
    """Raises ValueError where a bias is not (outputs,)."""
    for what, bias in given.items():
        if bias is not None and tuple(bias.shape) != (outputs,):
            raise ValueError(f"{name}: {what} has shape {tuple(bias.shape)}, not ({outputs},)")


def allocate(
    x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (*, N), N = ``outputs``, for x (*, K), panels (:mod:`.linear_panels`) of x's dtype, bias
    (N,) and residual (*, N): x's dtype, contiguous.  Raises ValueError where arguments do not fit.
    """
    check("packed_linear", x, panels, outputs, activation, gated=False)
    check_bias("packed_linear", outputs, bias=bias)
    shape = (*x.shape[:-1], outputs)
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"packed_linear: residual has shape {tuple(residual.shape)}, the output has {shape}")
    return (torch.empty(shape, dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """:mod:`.linear` of the weight that the panels hold."""
    allocate(x, panels, outputs, bias, residual, activation)
    (weight,) = linear_panels.unpacked(panels, outputs, x.shape[-1])
    return linear.reference(x, weight, bias, residual, activation)


def cost(
    x: Tensor, panels: Tensor, outputs: int, bias: Any = None, residual: Any = None, activation: str = "none"
) -> Cost:
    """The products and sums; every argument read and the output written once."""
    return cost_of(x, outputs, 1, panels, bias, residual)


def cost_of(x: Tensor, outputs: int, products: int, *more: Tensor | None) -> Cost:
    """The cost of so many ``products`` of x (*, K) with outputs (*, N), and of reading ``more``."""
    rows = x.numel() // max(1, x.shape[-1])
    out = rows * outputs * x.element_size()
    moved = sum(t.numel() * t.element_size() for t in (x, *more) if t is not None) + out
    return Cost(flops=2 * products * x.numel() * outputs, bytes=moved, written=out)


def random_weights(g: Generator, n: int, k: int, dtype: torch.dtype, gated: bool) -> Tensor:
    """Panels of a weight (N, K), and of a gate, for products of the dtype where it is float32, else in pairs."""
    weights = [(torch.randn(n, k, generator=g) / max(k, 1) ** 0.5).to(dtype) for _ in range(2 if gated else 1)]
    gate = weights[1] if gated else None
    return linear_panels.reference(weights[0], gate, torch.float32 if dtype == torch.float32 else None)


def _case(
    name: str, lead: tuple[int, ...], n: int, k: int, *, kind: str = "contiguous", bias: str = "no",
    residual: bool = False, activation: str = "none", bench: bool = False,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x, panels = random_x(g, lead, k, dtype, kind), random_weights(g, n, k, dtype, gated=False)
        return (x, panels, n, *random_tail(g, (*lead, n), dtype, bias, residual), activation)

    return Case(name, build, dtypes=(torch.float32, torch.bfloat16) if bench else FLOATS, bench=bench)


CASES = [
    _case("small", (3, 5), 16, 64, bias="same"),
    _case("no rows", (0, 7), 16, 32),
    _case("no columns", (2, 3), 7, 0, bias="same"),
    _case("no outputs", (2, 3), 0, 16),
    _case("one row", (48,), 20, 48, bias="fp32"),
    _case("one element", (1, 1), 1, 1),
    _case("prime sizes", (3, 47), 37, 131, residual=True, bias="fp32"),
    _case("whole panels", (2, 64), 64, 96, residual=True, bias="same"),
    _case("one more than whole", (5, 13), 65, 33, bias="same"),
    _case("several blocks", (2, 201), 97, 70, activation="silu", bias="same", residual=True),
    _case("gelu", (2, 9), 33, 80, activation="gelu", bias="same"),
    _case("gelu_tanh", (2, 9), 33, 80, activation="gelu_tanh", residual=True),
    _case("relu", (2, 3), 17, 33, activation="relu", bias="same", residual=True),
    _case("padded rows", (2, 25), 24, 64, kind="padded"),
    _case("transposed", (7, 5), 24, 64, kind="transposed"),
    _case("strided", (2, 5), 24, 64, kind="strided"),
    _case("unaligned", (2, 25), 24, 63, kind="unaligned"),
    _case("long rows", (2, 9), 5, 9001),
    _case("8192x320x320 residual", (2, 4096), 320, 320, bias="same", residual=True, bench=True),
    _case("8192x960x320", (2, 4096), 960, 320, bench=True),
    _case("8192x320x1280 residual", (2, 4096), 320, 1280, bias="same", residual=True, bench=True),
    _case("2048x640x640 residual", (2, 1024), 640, 640, bias="same", residual=True, bench=True),
    _case("512x1280x1280 residual", (2, 256), 1280, 1280, bias="same", residual=True, bench=True),
    _case("512x1280x5120 residual", (2, 256), 1280, 5120, bias="same", residual=True, bench=True),
    _case("154x24960x768", (2, 77), 24960, 768, bench=True),
    _case("512x4096x1024 gelu", (1, 512), 4096, 1024, bias="same", activation="gelu", bench=True),
]


_UNARY = {"none": "", "relu": "", "silu": "", "gelu": "none", "gelu_tanh": "tanh"}  # oneDNN's algorithm
_plain: Any = WeakTensorKeyDictionary()  # panels -> the weights they hold, in oneDNN's form on a CPU


def plain_weights(x: Tensor, panels: Tensor, outputs: int, gated: bool) -> tuple[Tensor, ...]:
    """The weights of the panels as a user of PyTorch has them, made once: packed by oneDNN where it serves."""
    if panels not in _plain:
        weights = linear_panels.unpacked(panels, outputs, x.shape[-1], gated)
        if onednn.serves(x.dtype) and x.device.type == "cpu" and x.numel() and outputs:
            rows = x.numel() // x.shape[-1]
            weights = tuple(torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), rows) for w in weights)
        _plain[panels] = weights
    found: tuple[Tensor, ...] = _plain[panels]
    return found


def plain(x: Tensor, weight: Tensor, bias: Any, activation: str, other: Any = None, how: str = "add") -> Tensor:
    """A layer in eager PyTorch, ``other`` added or multiplied ("mul"): oneDNN takes one epilogue into the product."""
    bias = None if bias is None else bias.to(x.dtype)
    pointwise = torch.ops.mkldnn._linear_pointwise
    if not weight.is_mkldnn:
        y = F.linear(x, weight, bias)
        y = y if other is None else y * other if how == "mul" else y + other
    elif other is not None:
        y = pointwise.binary(x, other, weight, bias, how)
    else:
        unary = "swish" if activation == "silu" else activation.removesuffix("_tanh")
        y, activation = pointwise(x, weight, bias, unary, [], _UNARY[activation]), "none"
    return ACTIVATIONS[activation](y)


def _eager(x: Tensor, panels: Tensor, outputs: int, bias: Any, residual: Any, activation: str) -> Tensor:
    (weight,) = plain_weights(x, panels, outputs, gated=False)
    return plain(x, weight, bias, activation, residual)


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """Sample ``b``: its rows of x and the residual."""
    x, panels, outputs, bias, residual, activation = args
    return (x[b : b + 1], panels, outputs, bias, None if residual is None else residual[b : b + 1], activation)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    lead, (n, k) = draw.shape(6, *[20] * draw.integer(0, 1)), draw.shape(70, 90)
    x, panels = draw.tensor((*lead, k), dtype), random_weights(draw.generator(), n, k, dtype, gated=False)
    bias = draw.maybe((n,), (dtype, torch.float32))
    return (x, panels, n, bias, draw.maybe((*lead, n), (dtype,)), draw.choice(tuple(ACTIVATIONS)))


OP = register(
    Op(
        name="packed_linear",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=linear.OP.tolerance,
        cases=CASES,
        eager=_eager,
        alone=_alone,
        draw=_draw,
        formula="act(x W^T + bias + residual), W in panels",
        source="torch.nn.functional.linear",
    )
)
