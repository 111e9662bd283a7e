"""The eager forms of rope, as diffusers and transformers write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.op import Spelling


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor, *, half: int = 11) -> Tensor:
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _rotate_half_wide(x: Tensor, cos: Tensor, sin: Tensor, *, half: int = 11) -> Tensor:
    y = x.float()
    return (y * cos + torch.cat((-y[..., half:], y[..., :half]), -1) * sin).to(x.dtype)


def _partial(x: Tensor, cos: Tensor, sin: Tensor, *, width: int = 14, half: int = 7) -> Tensor:
    return torch.cat((rotate_half(x[..., :width], cos, sin, half=half), x[..., width:]), -1)


def _partial_of_all(x: Tensor, cos: Tensor, sin: Tensor, *, width: int = 22, half: int = 11) -> Tensor:
    return torch.cat((rotate_half(x, cos, sin, half=half), x[..., width:]), -1)


def _chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _split(x: Tensor, cos: Tensor, sin: Tensor, *, half: int = 11) -> Tensor:
    a, b = torch.split(x, half, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def _rotate_pairs_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.float()
    return (y * cos + torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2) * sin).to(x.dtype)


def _partial_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, width: int = 14) -> Tensor:
    return torch.cat((rotate_pairs(x[..., :width], cos, sin), x[..., width:]), -1)


def rotate_unbound(x: Tensor, cos: Tensor, sin: Tensor, *, sizes: tuple[int, ...] = (5, 6, 8, -1, 2)) -> Tensor:
    a, b = x.reshape(sizes).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _unbound_halves(x: Tensor, cos: Tensor, sin: Tensor, *, sizes: tuple[int, ...] = (5, 6, 8, 2, -1)) -> Tensor:
    a, b = x.reshape(sizes).unbind(-2)
    turned = torch.cat([-b, a], dim=-1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


_END = 2**63 - 1


def _scattered(x: Tensor, cos: Tensor, sin: Tensor, *, sizes: tuple[int, ...] = (5, 6, 8, 11, 2)) -> Tensor:
    a, b = x.reshape(sizes).unbind(-1)
    out = torch.empty_like(x)
    first = torch.ops.aten.copy(out[..., 0::2], a * cos - b * sin)
    out = torch.slice_scatter(out, first, 3, 0, _END, 2)
    second = torch.ops.aten.copy(out[..., 1::2], a * sin + b * cos)
    return torch.slice_scatter(out, second, 3, 1, _END, 2).type_as(x)


def rotation(
    x: Any, cos: Any, sin: Any, *, interleaved: bool, entries: int, wide: bool, half: Any, width: Any, sizes: Any
) -> Mapping[str, Any] | str:
    """The op's arguments for what a spelling captured, or why it is no rotation.

    ``entries``: table entries for a pair.  ``wide``: the spelling computes in float32, whatever the table's dtype.
    """
    if x.shape is None or cos.shape is None or sin.shape is None or not isinstance(x.shape[-1], int):
        return "the shapes are not known"
    turned = x.shape[-1] if width is None else width
    if not isinstance(turned, int) or turned > x.shape[-1] or turned % 2 or (half is not None and 2 * half != turned):
        return f"{half} features are not half of the {turned} that turn"
    if sizes is not None and tuple(sizes[:-2]) != x.shape[:-1]:
        return f"x of {x.shape} is seen as {sizes}"
    if cos.shape != sin.shape or cos.shape[-1] != entries * (turned // 2) or cos.dtype != sin.dtype:
        return f"the tables of {cos.shape} and {sin.shape} do not have {entries * (turned // 2)} entries"
    lead = x.shape[-len(cos.shape) : -1]
    if len(cos.shape) > len(x.shape) or any(n not in (1, m) for n, m in zip(cos.shape[:-1], lead, strict=True)):
        return f"the tables of {cos.shape} do not broadcast to x of {x.shape}"
    if not wide and cos.dtype != x.dtype:
        return f"x is {x.dtype} and the tables are {cos.dtype}"
    return {"x": x, "cos": cos, "sin": sin, "interleaved": interleaved, "rotary_dim": width}


def _spelling(
    name: str, eager: Callable[..., Tensor], *, table: int = 22, pairs: bool = False, entries: int = 2,
    wide: bool = False,
) -> Spelling:  # fmt: skip
    def inputs() -> tuple[Tensor, ...]:
        return torch.zeros(5, 6, 8, 22), torch.zeros(table), torch.zeros(table)

    def call(x: Any, cos: Any, sin: Any, half: Any = None, width: Any = None, sizes: Any = None) -> Any:
        given: dict[str, Any] = {"interleaved": pairs, "entries": entries, "wide": wide}
        return rotation(x, cos, sin, half=half, width=width, sizes=sizes, **given)

    return Spelling(name, eager, inputs, call)


SPELLINGS = [
    _spelling("rotate_half", rotate_half),
    _spelling("rotate_half in float32", _rotate_half_wide, wide=True),
    _spelling("rotate_half of some", _partial, table=14),
    _spelling("rotate_half of some that are all", _partial_of_all),
    _spelling("two chunks", _chunks, table=11, entries=1),
    _spelling("two parts", _split, table=11, entries=1),
    _spelling("rotate_every_two", rotate_pairs, pairs=True),
    _spelling("rotate_every_two in float32", _rotate_pairs_wide, pairs=True, wide=True),
    _spelling("rotate_every_two of some", _partial_pairs, table=14, pairs=True),
    _spelling("unbound pairs", rotate_unbound, pairs=True, wide=True),
    _spelling("unbound halves", _unbound_halves, wide=True),
    _spelling("pairs written into an empty tensor", _scattered, table=11, pairs=True, entries=1, wide=True),
]
