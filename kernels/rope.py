"""Rotary position embedding (Su et al. 2021, RoFormer): pairs of features turned by an angle for each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.draw import LAYOUTS, Draw
from fusegen.kernels.op import Cost, Op, Tolerance, register
from fusegen.kernels.rope_cases import CASES, make_tables
from fusegen.kernels.rope_spellings import SPELLINGS
from fusegen.kernels.strides import dense_like

SCHEMA = (
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, bool interleaved=False, int? rotary_dim=None) -> Tensor"
)


def check(
    op: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rotary_dim: int | None
) -> tuple[int, bool]:
    """(features that turn, whether the tables have an entry for each of them); ValueError where the arguments disagree.

    ``op`` names the op in the message: qk_norm_rope takes the same arguments.
    """
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"{op}: x has {x.dim()} dimensions; it takes 2 to 4, (*, D)")
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    if width % 2 or not 0 <= width <= x.shape[-1]:
        raise ValueError(f"{op}: rotary_dim is {width}; it is even and at most x's last dimension, {x.shape[-1]}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype or not cos.dtype.is_floating_point:
        two = f"{tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        raise ValueError(f"{op}: cos and sin are {two}; they have one shape and one floating-point dtype")
    if cos.dim() < 1 or cos.shape[-1] not in (width, width // 2):
        raise ValueError(f"{op}: tables of {tuple(cos.shape)} end neither in rotary_dim {width} nor in its half")
    if positions is None:
        _broadcasts(op, "tables", cos.shape[:-1], x)
    elif positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: positions are {positions.dtype}, neither int32 nor int64")
    elif cos.dim() != 2:
        raise ValueError(f"{op}: with positions the tables are (N, R), not {tuple(cos.shape)}")
    else:
        _broadcasts(op, "positions", positions.shape, x)
    return width, width > 0 and cos.shape[-1] == width


def _broadcasts(op: str, name: str, shape: torch.Size, x: Tensor) -> None:
    want = x.shape[:-1]
    if len(shape) > len(want) or any(n not in (1, w) for n, w in zip(reversed(shape), reversed(want), strict=False)):
        raise ValueError(f"{op}: {name} of {tuple(shape)} rows do not broadcast to x's {tuple(want)}")


def allocate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output: x's shape and dtype, dense, its rows in the order of x's in memory."""
    check("rope", x, cos, sin, positions, rotary_dim)
    return (dense_like(x),)


def spread(x: Tensor, table: Tensor, positions: Tensor | None) -> Tensor:
    """The rows of a table for each row of x, (*, R); NaN where a position lies outside it."""
    if positions is None:
        return table.expand(*x.shape[:-1], table.shape[-1])
    inside = (positions >= 0) & (positions < table.shape[0])
    rows = torch.cat([table, table.new_full((1, table.shape[1]), torch.nan)])
    found = rows[torch.where(inside, positions, table.shape[0]).long()]
    return found.expand(*x.shape[:-1], table.shape[-1])


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) as (-b, a): the vector a quarter turn on."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, width: int, full: bool
) -> Tensor:
    """The rotation in PyTorch, in the widest dtype among x and the tables; a new tensor."""
    cos, sin = spread(x, cos, positions), spread(x, sin, positions)
    if not full:
        cos, sin = ((t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)) for t in (cos, sin))
    head = x[..., :width]
    return torch.cat((head * cos + turned(head, interleaved) * sin, x[..., width:]), -1)


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Tensor:  # fmt: skip
    """x (*, D) with the pairs of its first ``rotary_dim`` features (D where None) turned, in float32 or x's float64.

    Pair i is features (2i, 2i + 1) where ``interleaved`` (GPT-J, Flux), else (i, i + rotary_dim / 2) (Llama, GPT-NeoX);
    (a, b) becomes (a cos - b sin, b cos + a sin).  cos and sin (*, R) broadcast to x's rows, say (L, R) or
    (B, 1, L, R) for x (B, H, L, D), (L, 1, R) for (B, L, H, D): R is rotary_dim / 2, an entry a pair, or rotary_dim,
    an entry a feature.  With ``positions``, integers that broadcast to x's rows, the tables are (N, R) and each
    row of x takes the row of its position; a position outside the table gives NaN."""
    width, full = check("rope", x, cos, sin, positions, rotary_dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = dense_like(x)
    return out.copy_(rotate(x.to(wide), cos.to(wide), sin.to(wide), positions, interleaved, width, full))


def table_bytes(cos: Tensor, sin: Tensor, positions: Tensor | None) -> int:
    """Bytes of the tables that are read: with positions, of as many rows as there are positions at most."""
    if positions is None:
        return (cos.numel() + sin.numel()) * cos.element_size()
    rows = min(positions.numel(), cos.shape[0])
    return 2 * rows * cos.shape[1] * cos.element_size() + positions.numel() * positions.element_size()


def cost(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Cost:  # fmt: skip
    """Three operations a turned feature; x and the tables read and the output written once."""
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    turned_features = x.numel() // max(x.shape[-1], 1) * width
    moved = 2 * x.numel() * x.element_size() + table_bytes(cos, sin, positions)
    return Cost(flops=3 * turned_features, bytes=moved)


def sample(x: Tensor, b: int, tensor: Tensor | None, trailing: int) -> Tensor | None:
    """What of a tensor that broadcasts to x's rows (with ``trailing`` dimensions more) belongs to sample ``b``."""
    if tensor is None or tensor.dim() - trailing < x.dim() - 1 or tensor.shape[0] == 1:
        return tensor
    return tensor[b : b + 1]


def alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """Sample ``b`` by itself."""
    x, cos, sin, positions, *rest = args
    if positions is None:
        cos, sin = (sample(x, b, t, 1) for t in (cos, sin))
    return (x[b : b + 1], cos, sin, sample(x, b, positions, 0), *rest)


def eager(x: Tensor, cos: Tensor, sin: Tensor, positions: Any, interleaved: bool, rotary_dim: int | None) -> Tensor:
    """The op as models write it."""
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    return rotate(x, cos, sin, positions, interleaved, width, cos.shape[-1] == width).to(x.dtype)


def draw_rotation(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    """Random arguments: x, cos, sin, positions, interleaved, rotary_dim."""
    width = 2 * draw.integer(0, 20)
    shape = (*draw.shape(4, *[6] * draw.integer(0, 2)), width + draw.integer(0, 5))
    x = draw.tensor(shape, dtype, layouts=LAYOUTS)
    entries, kinds = draw.choice((width // 2, width)), (torch.float32, dtype)
    if draw.flag():
        rows = draw.integer(1, 9)
        lead = tuple(draw.choice((n, 1)) for n in shape[draw.integer(0, len(shape) - 1) : -1])
        positions = torch.randint(0, rows, lead, generator=draw.generator())
        tables: tuple[int, ...] = (rows, entries)
    else:
        positions = None
        tables = (*(draw.choice((n, 1)) for n in shape[draw.integer(0, len(shape) - 1) : -1]), entries)
    kind, layout = draw.choice(kinds), draw.choice(("contiguous", "unaligned", "padded", "strided"))
    cos, sin = make_tables(tables, kind, layout, draw.generator())
    return x, cos, sin, positions, draw.flag(), width


OP = register(
    Op(
        name="rope",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=5e-7, peak=1e-6),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        spellings=SPELLINGS,
        eager=eager,
        alone=alone,
        draw=draw_rotation,
        formula="pairs of features (a, b) -> (a cos - b sin, b cos + a sin), a table row for each position",
        source="Su et al. 2021, arXiv:2104.09864",
    )
)
