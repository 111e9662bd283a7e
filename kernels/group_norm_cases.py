"""The cases of group_norm and join_group_norm: layouts, group sizes, parameters, and what is added or modulates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.op import Case


@dataclass(frozen=True)
class Inputs:
    """What a case is made of.

    ``layout``: contiguous, channels_last, rows ((B, C, L) that lies as (B, L, C)), strided (every other pixel) or
    unaligned (one element into a buffer).
    ``parameters``: the dtype of weight and bias, "same" as x or "fp32", "bias" for a bias alone, or "no".
    ``add``, ``modulation``: "no", "sample" (B, C), "axes" (B, C, 1, ...), "fp32" (B, C), "one" (1, C); the modulation
    also "chunk" (B, C, 1, ...) cut out of (B, 2 C, 1, ...).  ``moments``: whether x's are given.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    layout: str = "contiguous"
    parameters: str = "same"
    mean: float = 0.0
    activation: str = "silu"
    add: str = "no"
    modulation: str = "no"
    moments: bool = False
    small: bool = True
    bench: bool = False

    def tensor(self, g: Generator, dtype: torch.dtype, channels: int | None = None) -> Tensor:
        """A tensor of the shape (or of other channels) in the layout."""
        shape = (self.shape[0], channels or self.shape[1], *self.shape[2:])
        if self.layout == "strided":
            return (torch.randn(*shape[:-1], 2 * shape[-1], generator=g) + self.mean).to(dtype)[..., ::2]
        x = (torch.randn(shape, generator=g) + self.mean).to(dtype)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        if self.layout == "rows":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "unaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        return x

    def affine(self, g: Generator, dtype: torch.dtype, channels: int | None = None) -> Any:
        """Weight and bias (C,)."""
        kind, channels = self.parameters, channels or self.shape[1]
        own = torch.float32 if kind == "fp32" else dtype
        weight = (1 + 0.3 * torch.randn(channels, generator=g)).to(own) if kind in ("same", "fp32") else None
        bias = (0.3 * torch.randn(channels, generator=g)).to(own) if kind != "no" else None
        return weight, bias

    def per_channel(self, g: Generator, dtype: torch.dtype, kind: str, count: int, size: float) -> Any:
        """``count`` tensors of that kind, of that deviation."""
        if kind == "no":
            return (None,) * count
        (batch, channels), ones = self.shape[:2], (1,) * (len(self.shape) - 2)
        own = torch.float32 if kind == "fp32" else dtype
        if kind == "chunk":
            return (size * torch.randn(batch, 2 * channels, *ones, generator=g)).to(own).chunk(2, 1)
        shape = (1 if kind == "one" else batch, channels, *(ones if kind == "axes" else ()))
        return tuple((size * torch.randn(shape, generator=g)).to(own) for _ in range(count))


def moments_of(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel of x (B, C, *) over its pixels: float64 (B, 2, C)."""
    rows = x.double().flatten(2) if x.dim() > 2 else x.double()[..., None]
    mean = rows.mean(2)
    return torch.stack([mean, (rows - mean[..., None]).square().mean(2)], 1)


def _case(inputs: Inputs) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        i = inputs
        x, parameters = i.tensor(g, dtype), i.affine(g, dtype)
        (add,), modulation = i.per_channel(g, dtype, i.add, 1, 2.0), i.per_channel(g, dtype, i.modulation, 2, 0.3)
        return (x, i.groups, *parameters, 1e-5, i.activation, add, *modulation, moments_of(x) if i.moments else None)

    return Case(inputs.name, build, bench=inputs.bench, small=inputs.small)


def _bench(*shape: int, add: str = "no", moments: bool = False) -> list[Inputs]:
    name = "x".join(map(str, shape)) + (" add" if add != "no" else "") + (" by moments" if moments else "")
    first = Inputs(name, shape, 32, add=add, moments=moments, bench=True, small=False)
    return [first, replace(first, name=f"{name} channels-last", layout="channels_last")]


_INPUTS = [
    Inputs("small", (2, 8, 4, 4), 4),
    Inputs("no activation", (2, 8, 4, 4), 4, activation="none"),
    Inputs("channels-last", (2, 12, 5, 7), 3, "channels_last"),
    Inputs("no batch", (0, 8, 4, 4), 2),
    Inputs("no pixels", (2, 8, 0, 4), 2),
    Inputs("one element", (1, 1, 1, 1), 1),
    Inputs("one pixel", (3, 64, 1, 1), 8),
    Inputs("prime sizes", (3, 21, 13, 11), 7),
    Inputs("prime sizes channels-last", (3, 21, 13, 11), 7, "channels_last"),
    Inputs("prime group channels-last", (2, 34, 9, 19), 2, "channels_last"),
    Inputs("one group", (2, 20, 17, 5), 1),
    Inputs("one group channels-last", (2, 20, 17, 5), 1, "channels_last"),
    Inputs("groups are channels", (2, 33, 9, 8), 33),
    Inputs("groups are channels, channels-last", (2, 33, 9, 8), 33, "channels_last"),
    Inputs("mean far above deviation", (2, 16, 16, 16), 4, mean=64.0, activation="none"),
    Inputs("mean far above deviation, channels-last", (2, 16, 16, 16), 4, "channels_last", mean=64.0, small=False),
    Inputs("no parameters", (2, 12, 7, 9), 4, parameters="no"),
    Inputs("bias alone", (2, 12, 7, 9), 4, parameters="bias"),
    Inputs("float32 parameters", (2, 12, 7, 9), 4, parameters="fp32"),
    Inputs("float32 parameters, channels-last", (2, 36, 7, 9), 4, "channels_last", parameters="fp32"),
    Inputs("strided", (2, 12, 7, 9), 4, "strided"),
    Inputs("unaligned", (2, 12, 7, 9), 4, "unaligned"),
    Inputs("two dimensions", (5, 24), 6),
    Inputs("three dimensions", (2, 24, 37), 6),
    Inputs("rows", (2, 24, 37), 6, "rows"),
    Inputs("rows of a prime width", (3, 34, 19), 2, "rows", add="axes"),
    Inputs("rows of one channel", (2, 1, 9), 1, "rows"),
    Inputs("one row", (2, 24, 1), 6, "rows"),
    Inputs("five dimensions", (2, 16, 3, 5, 7), 4),
    Inputs("large, one sample", (1, 64, 96, 80), 32, small=False),
    Inputs("large, one sample channels-last", (1, 64, 96, 80), 32, "channels_last", small=False),
    Inputs("a group larger than the cache", (1, 8, 256, 161), 1, small=False),
    Inputs("a group larger than the cache, channels-last", (1, 8, 256, 161), 1, "channels_last", small=False),
    Inputs("a group wider than a tile, channels-last", (1, 600, 37, 5), 2, "channels_last", small=False),
    Inputs("added", (3, 24, 7, 9), 4, add="sample"),
    Inputs("added, channels-last", (3, 24, 7, 9), 4, "channels_last", add="axes"),
    Inputs("added by one", (2, 12, 5, 5), 3, add="one"),
    Inputs("added in float32, channels-last", (2, 34, 9, 19), 2, "channels_last", add="fp32"),
    Inputs("added to one pixel", (3, 24, 1, 1), 4, add="sample"),
    Inputs(
        "added, a group wider than a tile, channels-last", (1, 600, 37, 5), 2, "channels_last", add="axes", small=False
    ),
    Inputs("added, a group larger than the cache", (1, 8, 256, 161), 1, add="axes", small=False),
    Inputs("added, large, channels-last", (1, 64, 96, 80), 32, "channels_last", add="sample", small=False),
    Inputs("modulated", (3, 24, 7, 9), 4, modulation="chunk"),
    Inputs("modulated and added, channels-last", (3, 24, 7, 9), 4, "channels_last", add="axes", modulation="chunk"),
    Inputs("by moments", (2, 12, 7, 9), 4, moments=True),
    Inputs("by moments, no pixels", (2, 8, 0, 4), 2, moments=True),
    Inputs("by moments, one pixel", (3, 24, 1, 1), 4, add="sample", moments=True),
    Inputs("by moments, channels-last", (3, 34, 13, 11), 2, "channels_last", moments=True),
    Inputs("by moments, mean far above deviation", (2, 16, 16, 16), 4, "channels_last", mean=64.0, moments=True),
    Inputs("by moments, added", (2, 24, 9, 19), 4, "channels_last", add="fp32", modulation="chunk", moments=True),
    Inputs("by moments, large", (1, 64, 96, 80), 32, "channels_last", moments=True, small=False),
    Inputs("by moments, rows of a prime width", (3, 34, 19), 2, "rows", add="axes", moments=True),
    Inputs("modulated, no parameters", (2, 12, 5, 5), 3, parameters="no", modulation="fp32", activation="none"),
]
CASES = [
    _case(i)
    for i in [
        *_INPUTS,
        *_bench(2, 320, 64, 64),
        *_bench(2, 640, 32, 32),
        *_bench(2, 1280, 16, 16),
        *_bench(2, 960, 64, 64),
        *_bench(1, 128, 256, 256),
        *_bench(1, 128, 512, 512),
        *(i for shape in ((1, 128, 512, 512), (1, 256, 256, 256)) for i in _bench(*shape, moments=True)[1:]),
        *_bench(16, 64, 32, 32),
        *_bench(16, 160, 8, 8),
        *_bench(2, 320, 64, 64, add="axes"),
    ]
]
