"""The gate of a gated feed-forward layer: up * act(gate) (Shazeer 2020, "GLU variants improve transformer")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import LAYOUTS, Draw, laid_out
from fusegen.kernels.op import Case, Cost, Op, Spelling, Tolerance, register
from fusegen.kernels.strides import Strides, merged

SCHEMA = '(Tensor x, Tensor? up=None, str activation="silu", bool gate_first=True) -> Tensor'
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
}


def halves(x: Tensor, up: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) as views, each (*, H)."""
    if up is not None:
        return x, up
    first, second = x.narrow(-1, 0, x.shape[-1] // 2), x.narrow(-1, x.shape[-1] // 2, x.shape[-1] // 2)
    return (first, second) if gate_first else (second, first)


def check(x: Tensor, up: Tensor | None, activation: str) -> None:
    """Raises ValueError, one line, where the arguments do not fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_mlp_act: no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if x.dim() < 1:
        raise ValueError("gated_mlp_act: x has no dimension")
    if up is None and x.shape[-1] % 2:
        raise ValueError(f"gated_mlp_act: x's last dimension is {x.shape[-1]}, which has no halves")
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        two = f"{tuple(x.shape)} {x.dtype} and {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"gated_mlp_act: gate and up differ: {two}")


def allocate(
    x: Tensor, up: Tensor | None = None, activation: str = "silu", gate_first: bool = True
) -> tuple[Tensor, ...]:
    """The uninitialised output (*, H) of x's dtype: contiguous, or with ``up`` in the order that x has in memory."""
    check(x, up, activation)
    return (_like(x, up, x.device),)


def _like(x: Tensor, up: Tensor | None, device: torch.device | str) -> Tensor:
    if up is not None:
        return torch.empty_like(x, device=device)
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=device)


def loops(x: Tensor, up: Tensor | None, gate_first: bool) -> tuple[Strides, list[Strides]] | None:
    """Four nested loops over the output (not empty), and the strides of output, gate and up in each; None if it takes
    more.  The output is dense: it moves by one element in the innermost."""
    gate, value = halves(x, up, gate_first)
    strides = [t.stride() for t in (_like(x, up, "meta"), gate, value)]
    return merged(gate.shape, strides, limit=4)


def reference(x: Tensor, up: Tensor | None = None, activation: str = "silu", gate_first: bool = True) -> Tensor:
    """up * act(gate) in float32, or float64 where x is.

    ``up`` None: x (*, 2H) holds both, the gate in its first half (``gate_first``) or in its second; else x (*, H) is
    the gate.  ``activation``: one of :data:`ACTIVATIONS`; ``gelu`` is the exact one, by erf."""
    (out,) = allocate(x, up, activation, gate_first)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, value = (t.to(wide) for t in halves(x, up, gate_first))
    return out.copy_(ACTIVATIONS[activation](gate) * value)


def cost(x: Tensor, up: Tensor | None = None, activation: str = "silu", gate_first: bool = True) -> Cost:
    """Ten operations an element of the output, two reads and a write of it."""
    count = x.numel() if up is not None else x.numel() // 2
    return Cost(flops=10 * count, bytes=3 * count * x.element_size())


def alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """Sample ``b`` by itself."""
    x, up, *rest = args
    return (x[b : b + 1], None if up is None else up[b : b + 1], *rest)


def _case(
    name: str,
    shape: tuple[int, ...],
    activation: str = "silu",
    *,
    packed: bool = True,
    gate_first: bool = True,
    layout: str = "contiguous",
    scale: float = 1.5,
    bench: bool = False,
    small: bool = False,
) -> Case:
    """``shape``: the output's.  ``layout``: draw.py's, or "split" (gate and up are columns of one product)."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        both = (torch.randn(*shape[:-1], 2 * shape[-1], generator=g) * scale).to(dtype)
        if packed:
            return laid_out(both, layout), None, activation, gate_first
        gate, up = both.split(shape[-1], -1)
        if layout != "split":
            gate, up = laid_out(gate.contiguous(), layout), up.contiguous()
        return gate, up, activation, gate_first

    return Case(name, build, bench=bench, small=small)


CASES = [
    *(_case(f"{name} packed", (3, 5, 48), name, small=True) for name in ACTIVATIONS),
    *(_case(f"{name} far from zero", (4, 257), name, scale=9.0) for name in ACTIVATIONS),
    _case("gelu, gate second", (2, 7, 33), "gelu", gate_first=False, small=True),
    _case("two tensors", (2, 5, 40), packed=False),
    _case("two columns of a product", (2, 5, 31), "gelu_tanh", packed=False, layout="split", small=True),
    _case("gate transposed, up not", (3, 5, 24), packed=False, layout="transposed"),
    _case("channels-last gate, up not", (2, 3, 4, 5), "relu", packed=False, layout="channels_last", small=True),
    _case("gate strided, up not", (4, 40), packed=False, layout="strided"),
    _case("no rows", (0, 7, 16), small=True),
    _case("no width", (3, 0)),
    _case("width 1", (5, 1), "gelu"),
    _case("odd width", (7, 33), "relu"),
    _case("prime width", (5, 3, 509), "gelu"),
    _case("four dimensions", (2, 3, 4, 17), "quick_gelu"),
    _case("padded rows", (3, 4, 35), layout="padded"),
    _case("transposed", (3, 4, 36), layout="transposed", small=True),
    _case("strided", (4, 40), layout="strided"),
    _case("unaligned", (4, 40), "gelu", layout="unaligned", small=True),
    _case("geglu 2x4096x1280", (2, 4096, 1280), "gelu", gate_first=False, bench=True),
    _case("geglu 2x256x5120", (2, 256, 5120), "gelu", gate_first=False, bench=True),
    _case("swiglu 512x8192 packed", (1, 512, 8192), bench=True),
    _case("swiglu 512x14336", (1, 512, 14336), packed=False, bench=True),
    _case("swiglu 16x1x14336 split", (16, 1, 14336), packed=False, layout="split", bench=True),
    _case("gated-gelu 512x10240", (1, 512, 10240), "gelu_tanh", packed=False, bench=True),
]


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _geglu_tanh(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def _swiglu_second(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def _swiglu_first(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def _geglu_first(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _geglu_tanh_first(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def _reglu_first(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return value * F.relu(gate)


def _reglu_second(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.relu(gate)


def _glu(x: Tensor) -> Tensor:
    return F.glu(x, -1)


def _glu_written(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * torch.sigmoid(gate)


def _silu_times(x: Tensor, up: Tensor) -> Tensor:
    return F.silu(x) * up


def _gelu_times(x: Tensor, up: Tensor) -> Tensor:
    return F.gelu(x) * up


def _gelu_tanh_times(x: Tensor, up: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh") * up


def _packed(name: str, eager: Callable[..., Tensor], activation: str, gate_first: bool) -> Spelling:
    def call(x: Any) -> Mapping[str, Any] | str:
        if x.shape is None or not isinstance(x.shape[-1], int) or x.shape[-1] % 2:
            return "its last dimension is not known to have two halves"
        return {"x": x, "activation": activation, "gate_first": gate_first}

    return Spelling(name, eager, lambda: (torch.zeros(4, 6),), call)


def _apart(name: str, eager: Callable[..., Tensor], activation: str) -> Spelling:
    def call(x: Any, up: Any) -> Mapping[str, Any] | str:
        if x.shape is None or x.shape != up.shape or x.dtype != up.dtype or not x.shape:
            return "gate and up are not known to have the same shape and dtype"
        return {"x": x, "up": up, "activation": activation}

    return Spelling(name, eager, lambda: (torch.zeros(4, 6), torch.zeros(4, 6)), call)


# Sigmoid has no form of two tensors: x * sigmoid(1.702 * x), CLIP's activation, would be one.
SPELLINGS = [
    _packed("GEGLU, gate second", _geglu, "gelu", False),
    _packed("GEGLU of tanh, gate second", _geglu_tanh, "gelu_tanh", False),
    _packed("SwiGLU, gate second", _swiglu_second, "silu", False),
    _packed("SwiGLU, gate first", _swiglu_first, "silu", True),
    _packed("GEGLU, gate first", _geglu_first, "gelu", True),
    _packed("GEGLU of tanh, gate first", _geglu_tanh_first, "gelu_tanh", True),
    _packed("ReGLU, gate first", _reglu_first, "relu", True),
    _packed("ReGLU, gate second", _reglu_second, "relu", False),
    _packed("glu", _glu, "sigmoid", False),
    _packed("GLU written out", _glu_written, "sigmoid", False),
    _apart("silu(gate) * up", _silu_times, "silu"),
    _apart("gelu(gate) * up", _gelu_times, "gelu"),
    _apart("tanh-gelu(gate) * up", _gelu_tanh_times, "gelu_tanh"),
]


def _eager(x: Tensor, up: Any, activation: str, gate_first: bool) -> Tensor:
    gate, value = halves(x, up, gate_first)
    return ACTIVATIONS[activation](gate) * value


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    packed, width = draw.flag(), draw.integer(0, 300)
    shape = (*draw.shape(5, *[5] * draw.integer(0, 2)), width)
    layouts, scale = LAYOUTS, draw.choice((1.0, 6.0))
    x = draw.tensor((*shape[:-1], 2 * width if packed else width), dtype, scale=scale, layouts=layouts)
    up = None if packed else draw.tensor(shape, dtype, layouts=layouts)
    return x, up, draw.choice(tuple(ACTIVATIONS)), draw.flag()


OP = register(
    Op(
        name="gated_mlp_act",
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
        alone=alone,
        draw=_draw,
        formula="up * act(gate)",
        source="Shazeer 2020, arXiv:2002.05202",
    )
)
