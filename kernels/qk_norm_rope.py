"""RMS norm of queries or keys over the head dimension, then rotary position embedding, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Cost, Op, Spelling, Tolerance, register
from fusegen.kernels.rope import alone as rope_alone
from fusegen.kernels.rope import check, draw_rotation, rotate
from fusegen.kernels.rope import cost as rope_cost
from fusegen.kernels.rope import eager as rope_eager
from fusegen.kernels.rope_cases import make_tables, make_x
from fusegen.kernels.rope_spellings import rotate_half, rotate_unbound, rotation
from fusegen.kernels.strides import dense_like

SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor cos, Tensor sin, Tensor? positions=None, float eps=1e-6, "
    "bool interleaved=False, int? rotary_dim=None, bool transpose=False) -> Tensor"
)


def seen(x: Tensor, transpose: bool) -> Tensor:
    """x as the tables and the output have it: its second and third dimensions swapped where ``transpose``; a view."""
    return x.transpose(1, 2) if transpose else x


def check_all(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, rotary_dim: int | None,
    transpose: bool,
) -> tuple[int, bool]:  # fmt: skip
    """As rope's ``check``; ValueError where the weight or ``transpose`` does not fit either."""
    if transpose and x.dim() != 4:
        raise ValueError(f"qk_norm_rope: x has {x.dim()} dimensions; only four can be transposed, (B, L, H, D)")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"qk_norm_rope: weight is {tuple(weight.shape)}, x's last dimension is {x.shape[-1]}")
    return check("qk_norm_rope", seen(x, transpose), cos, sin, positions, rotary_dim)


def allocate(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = None, eps: float = 1e-6,
    interleaved: bool = False, rotary_dim: int | None = None, transpose: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output: the shape of :func:`seen`, x's dtype, dense, its rows in the order of x's in memory."""
    check_all(x, weight, cos, sin, positions, rotary_dim, transpose)
    return (dense_like(seen(x, transpose)),)


def reference(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = None, eps: float = 1e-6,
    interleaved: bool = False, rotary_dim: int | None = None, transpose: bool = False,
) -> Tensor:  # fmt: skip
    """rope(x / sqrt(mean(x^2) + eps) * weight) in float32, or x's float64; the mean is over x's last dimension.

    ``weight`` (D,).  ``transpose``: x is (B, L, H, D) and the output (B, H, L, D), to which the tables broadcast.  The
    other arguments are those of ``rope``."""
    width, full = check_all(x, weight, cos, sin, positions, rotary_dim, transpose)
    wide = torch.promote_types(x.dtype, torch.float32)
    x = seen(x, transpose)
    out, y = dense_like(x), x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    return out.copy_(rotate(y, cos.to(wide), sin.to(wide), positions, interleaved, width, full))


def cost(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = None, eps: float = 1e-6,
    interleaved: bool = False, rotary_dim: int | None = None, transpose: bool = False,
) -> Cost:  # fmt: skip
    """What rope takes, and four operations an element; the weight is read once."""
    own = rope_cost(seen(x, transpose), cos, sin, positions, interleaved, rotary_dim)
    parameters = 0 if weight is None else weight.numel() * weight.element_size()
    return Cost(flops=own.flops + 4 * x.numel(), bytes=own.bytes + parameters)


def alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """Sample ``b`` by itself."""
    x, weight, cos, sin, positions, *rest = args
    own, cos, sin, positions = rope_alone((x, cos, sin, positions), b)  # the batch comes first, transposed or not
    return (own, weight, cos, sin, positions, *rest)


def _case(
    name: str,
    shape: tuple[int, ...],
    tables: tuple[int, ...],
    *,
    weight: torch.dtype | str | None = "same",
    interleaved: bool = False,
    rotary_dim: int | None = None,
    positions: tuple[int, ...] | None = None,
    transpose: bool = False,
    layout: str = "contiguous",
    scale: float = 1.0,
    kind: torch.dtype | None = torch.float32,
    bench: bool = False,
    small: bool = False,
) -> Case:
    """``weight``: its dtype, "same" as x's, or None; ``kind``: the tables' dtype, x's where None."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = make_x(shape, layout, g, dtype) * scale
        cos, sin = make_tables(tables, kind or dtype, "contiguous", g)
        at = None if positions is None else torch.randint(-1, tables[0], positions, generator=g)
        own = dtype if weight == "same" else weight
        w = (1 + 0.3 * torch.randn(shape[-1], generator=g)).to(own) if isinstance(own, torch.dtype) else None
        return x, w, cos, sin, at, 1e-6, interleaved, rotary_dim, transpose

    return Case(name, build, bench=bench, small=small)


CASES = [
    _case("half tables", (2, 3, 7, 16), (7, 8)),
    _case("transposed, tables of x's dtype", (2, 7, 3, 24), (1, 1, 7, 24), transpose=True, kind=None, small=True),
    _case("interleaved", (2, 7, 3, 24), (1, 7, 1, 24), interleaved=True, small=True),
    _case("interleaved, packed", (2, 3, 7, 40), (7, 20), interleaved=True, layout="packed", weight=torch.float32),
    _case("partial, odd width", (2, 3, 7, 19), (7, 3), rotary_dim=6, small=True),
    _case("partial interleaved", (2, 3, 7, 72), (7, 8), rotary_dim=16, interleaved=True, small=True),
    _case("nothing turned", (2, 3, 5), (3, 0), rotary_dim=0),
    _case("width 1", (5, 1), (5, 0), rotary_dim=0),
    _case("no weight", (2, 3, 5, 16), (5, 16), weight=None, small=True),
    _case("no length", (2, 3, 0, 8), (0, 4), small=True),
    _case("no width", (2, 3, 0), (3, 0)),
    _case("values near eps", (2, 3, 5, 16), (5, 16), scale=1e-3, small=True),
    _case("head dim 80", (1, 2, 5, 80), (5, 80)),
    _case("head dim 256", (1, 5, 2, 256), (5, 128), transpose=True),
    _case("tables for each batch", (2, 3, 4, 16), (2, 1, 4, 8), layout="heads"),
    _case("positions, one outside", (3, 5, 2, 16), (4, 8), positions=(3, 1, 5), transpose=True, small=True),
    _case("unaligned", (2, 3, 5, 24), (5, 12), layout="unaligned", small=True),
    _case("strided", (2, 3, 5, 24), (5, 12), layout="strided"),
    _case("channels-last", (2, 3, 5, 24), (5, 12), layout="channels_last"),
    _case("qwen3 q 1x2048x32x128", (1, 2048, 32, 128), (1, 1, 2048, 128), transpose=True, kind=None, bench=True),
    _case("qwen3 k 1x4096x8x128", (1, 4096, 8, 128), (4096, 64), transpose=True, bench=True),
    _case("flux 1x4608x24x128", (1, 4608, 24, 128), (1, 4608, 1, 128), interleaved=True, bench=True),
    _case("decode 16x1x32x128", (16, 1, 32, 128), (4096, 64), positions=(16, 1, 1), transpose=True, bench=True),
]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def _norm_first(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 3e-5, half: int = 11) -> Tensor:
    return rotate_half(_norm(x, weight, eps).transpose(1, 2), cos, sin, half=half)


def _norm_heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 3e-5, half: int = 11) -> Tensor:
    return rotate_half(_norm(x, weight, eps), cos, sin, half=half)


def _norm_wide(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 3e-5, half: int = 11) -> Tensor:
    y = x.float()
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight).type_as(x)
    return rotate_half(y, cos, sin, half=half)


def _pairs(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, normalized_shape: tuple[int, ...] = (22,),
    eps: float = 3e-5, sizes: tuple[int, ...] = (5, 6, 8, -1, 2),
) -> Tensor:  # fmt: skip
    return rotate_unbound(F.rms_norm(x, normalized_shape, weight, eps), cos, sin, sizes=sizes)


def _spelling(
    name: str, eager: Callable[..., Tensor], *, transpose: bool = False, pairs: bool = False, wide: bool = False
) -> Spelling:
    def inputs() -> tuple[Tensor, ...]:
        return torch.zeros(5, 6, 8, 22), torch.zeros(22), torch.zeros(22), torch.zeros(22)

    def call(
        x: Any, weight: Any, cos: Any, sin: Any, eps: float | None, half: Any = None, sizes: Any = None,
        normalized_shape: tuple[int, ...] = (0,),
    ) -> Mapping[str, Any] | str:  # fmt: skip
        if x.shape is None or len(x.shape) != 4 or weight.shape != x.shape[-1:] or len(normalized_shape) != 1:
            return f"x of {x.shape} is not normalized over its last dimension with a weight of {weight.shape}"
        b, n, h, d = x.shape
        turned = replace(x, shape=(b, h, n, d)) if transpose else x
        given = {"interleaved": pairs, "entries": 2, "wide": wide, "half": half, "width": None, "sizes": sizes}
        found = rotation(turned, cos, sin, **given)
        if isinstance(found, str):
            return found
        eps = torch.finfo(x.dtype).eps if eps is None else eps  # what PyTorch's rms_norm takes it to be
        return {**found, "x": x, "weight": weight, "eps": eps, "transpose": transpose}

    return Spelling(name, eager, inputs, call)


SPELLINGS = [
    _spelling("norm, heads to the front, rotate_half", _norm_first, transpose=True),
    _spelling("norm, rotate_half", _norm_heads),
    _spelling("norm in float32, rotate_half", _norm_wide),
    _spelling("rms_norm, unbound pairs", _pairs, pairs=True, wide=True),
]


def _eager(
    x: Tensor, weight: Any, cos: Tensor, sin: Tensor, positions: Any, eps: float, interleaved: bool, rotary_dim: Any,
    transpose: bool,
) -> Tensor:  # fmt: skip
    y = F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    return rope_eager(seen(y, transpose), cos, sin, positions, interleaved, rotary_dim)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    x, cos, sin, positions, interleaved, width = draw_rotation(draw, dtype)
    transpose = x.dim() == 4 and draw.flag()
    weight = draw.maybe((x.shape[-1],), (dtype, torch.float32), mean=1.0)
    return seen(x, transpose), weight, cos, sin, positions, 1e-6, interleaved, width, transpose


OP = register(
    Op(
        name="qk_norm_rope",
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
        formula="rope(x / sqrt(mean(x^2) + eps) * weight)",
        source="Dehghani et al. 2023, arXiv:2302.05442, section 2; Su et al. 2021, arXiv:2104.09864",
    )
)
