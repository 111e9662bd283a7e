"""The cases of rope, and how those of qk_norm_rope make their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import laid_out
from fusegen.kernels.op import Case


def make_tables(shape: tuple[int, ...], dtype: torch.dtype, layout: str, g: Generator) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles at random, both in that layout."""
    angle = 9 * torch.randn(shape, generator=g)
    return laid_out(angle.cos().to(dtype), layout), laid_out(angle.sin().to(dtype), layout)


def make_x(shape: tuple[int, ...], layout: str, g: Generator, dtype: torch.dtype) -> Tensor:
    """``layout``: draw.py's, "heads" (x is (B, H, L, D) of memory (B, L, H, D)) or "packed" (that, beside k and v)."""
    if layout == "heads":
        b, h, n, d = shape
        return torch.randn(b, n, h, d, generator=g).to(dtype).transpose(1, 2)
    if layout == "packed":
        b, h, n, d = shape
        return torch.randn(b, n, 3, h, d, generator=g).to(dtype)[:, :, 1].transpose(1, 2)
    return laid_out(torch.randn(shape, generator=g).to(dtype), layout)


def _case(
    name: str,
    shape: tuple[int, ...],
    tables: tuple[int, ...],
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    positions: tuple[int, ...] | None = None,
    outside: bool = False,
    layout: str = "contiguous",
    table_layout: str = "contiguous",
    kind: torch.dtype | None = torch.float32,
    bench: bool = False,
    small: bool = False,
) -> Case:
    """``tables``: their shape; ``positions``: theirs; ``outside``: some lie outside the tables; ``kind``: the tables'
    dtype, x's where None."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = make_x(shape, layout, g, dtype)
        cos, sin = make_tables(tables, kind or dtype, table_layout, g)
        at = None if positions is None else torch.randint(0, tables[0], positions, generator=g)
        if at is not None and outside:
            at.view(-1)[::3] = torch.tensor([-1, tables[0], -(2**40)])[: at.view(-1)[::3].numel()]
        return x, cos, sin, at, interleaved, rotary_dim

    return Case(name, build, bench=bench, small=small)


CASES = [
    _case("half tables", (2, 3, 7, 16), (7, 8), small=True),
    _case("full tables", (2, 3, 7, 16), (1, 1, 7, 16)),
    _case("heads, tables of x's dtype", (2, 3, 7, 24), (2, 1, 7, 24), layout="heads", kind=None, small=True),
    _case("packed q of qkv", (2, 3, 5, 32), (5, 16), layout="packed", small=True),
    _case("interleaved, half tables", (2, 3, 7, 16), (7, 8), interleaved=True),
    _case("interleaved, full tables", (2, 7, 3, 24), (1, 7, 1, 24), interleaved=True, small=True),
    _case("interleaved, tables of x's dtype", (2, 7, 3, 72), (7, 1, 36), interleaved=True, kind=None, small=True),
    _case("partial", (2, 3, 7, 16), (7, 3), rotary_dim=6, small=True),
    _case("partial interleaved, odd width", (2, 7, 3, 19), (2, 7, 1, 8), interleaved=True, rotary_dim=8, small=True),
    _case("nothing turned", (2, 3, 5), (3, 0), rotary_dim=0, small=True),
    _case("one pair", (2, 5, 2), (5, 1)),
    _case("no length", (2, 3, 0, 8), (0, 4), small=True),
    _case("no batch", (0, 3, 5, 8), (5, 4)),
    _case("no width", (2, 3, 0), (3, 0)),
    _case("rank 2", (5, 12), (5, 6)),
    _case("head dim 40", (1, 2, 5, 40), (5, 20), layout="heads"),
    _case("head dim 80", (1, 2, 5, 80), (5, 80)),
    _case("head dim 96 partial", (1, 2, 5, 96), (5, 12), rotary_dim=24),
    _case("head dim 256", (1, 2, 3, 256), (3, 128)),
    _case("tables for each head", (2, 3, 4, 16), (3, 1, 8)),
    _case("tables for each batch and head", (2, 3, 4, 16), (2, 3, 1, 16), small=True),
    _case("one position", (2, 3, 4, 16), (8,)),
    _case("strided tables", (2, 7, 3, 16), (1, 7, 1, 8), interleaved=True, table_layout="strided", small=True),
    _case("padded tables", (2, 3, 7, 16), (7, 8), table_layout="padded", kind=None),
    _case("positions", (3, 2, 5, 16), (11, 8), positions=(3, 1, 5)),
    _case("positions of a decoding step", (5, 4, 1, 32), (64, 32), positions=(5, 1, 1)),
    _case("positions, interleaved", (3, 5, 2, 16), (11, 16), positions=(3, 5, 1), interleaved=True, small=True),
    _case("positions outside the tables", (2, 2, 9, 8), (5, 4), positions=(9,), outside=True, small=True),
    _case("unaligned", (2, 3, 5, 24), (5, 12), layout="unaligned", table_layout="unaligned"),
    _case("strided", (2, 3, 5, 24), (5, 12), layout="strided", small=True),
    _case("padded", (2, 3, 5, 24), (5, 12), layout="padded"),
    _case("channels-last", (2, 3, 5, 24), (5, 12), layout="channels_last"),
    _case("llama q 1x32x2048x128", (1, 32, 2048, 128), (1, 1, 2048, 128), layout="heads", kind=None, bench=True),
    _case("llama k 1x8x4096x128", (1, 8, 4096, 128), (4096, 64), layout="heads", bench=True),
    _case("decode 16x32x1x128", (16, 32, 1, 128), (4096, 64), positions=(16, 1, 1), bench=True),
    _case("flux 1x4608x24x128", (1, 4608, 24, 128), (1, 4608, 1, 128), interleaved=True, bench=True),
    _case("gpt-j 1x1024x16x256", (1, 1024, 16, 256), (1, 1024, 1, 64), interleaved=True, rotary_dim=64, bench=True),
    _case("neox 1x32x2048x96", (1, 32, 2048, 96), (1, 1, 2048, 24), rotary_dim=24, layout="packed", bench=True),
]
