"""Rows of the last dimension, as the norms over it see them: views by two strides, parameters and modulation.

A modulation tensor (scale, shift or gate) goes with x (B, ..., C): it is (B, C), the same for all that lies between, or
has x's number of dimensions and broadcasts to x; its last dimension is C.  A batch of 1 serves every sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusegen.kernels.strides import merged


@dataclass(frozen=True)
class Rows:
    """``outer`` x ``inner`` rows; for each tensor its (outer, inner) strides in elements, 0 where it broadcasts."""

    outer: int
    inner: int
    strides: tuple[tuple[int, int], ...]


def rows_of(tensors: Sequence[Tensor]) -> Rows | None:
    """The rows of tensors of one shape (*, C), in the order of a contiguous one; None where two strides are too few."""
    shape = tensors[0].shape
    dense = [math.prod(shape[i + 1 :]) for i in range(len(shape) - 1)]
    found = merged(shape[:-1], [dense, *(t.stride()[:-1] for t in tensors)], limit=2)
    if found is None:
        return None
    (outer, inner), (_, *strides) = found
    return Rows(outer, inner, tuple((far, near) for far, near in strides))


def spread(tensor: Tensor, x: Tensor) -> Tensor:
    """A modulation tensor as a view of x's shape, with stride 0 where it broadcasts."""
    if tensor.dim() == 2 and x.dim() > 2:
        tensor = tensor.reshape(tensor.shape[0], *(1,) * (x.dim() - 2), tensor.shape[1])
    return tensor.expand(x.shape)


def check_parameters(op: str, x: Tensor, **given: Tensor | None) -> None:
    """Raises ValueError where a weight or bias is not (C,) for x (*, C)."""
    if x.dim() < 1:
        raise ValueError(f"{op}: x has no dimension to normalize")
    for name, tensor in given.items():
        if tensor is not None and tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, x's last dimension is {x.shape[-1]}")


def check_modulation(op: str, x: Tensor, **given: Tensor | None) -> None:
    """Raises ValueError where a scale, shift or gate does not go with x."""
    for name, tensor in given.items():
        if tensor is not None and not modulates(tensor.shape, x.shape):
            raise ValueError(f"{op}: {name} of shape {tuple(tensor.shape)} does not go with x of {tuple(x.shape)}")


def modulates(shape: Sequence[Any], x: Sequence[Any]) -> bool:
    """Whether a modulation tensor of that shape goes with x; sizes may be names of symbolic ones."""
    if len(shape) == 2 and len(x) > 2:
        x = (x[0], x[-1])
    return len(shape) == len(x) and shape[-1] == x[-1] and all(n in (1, m) for n, m in zip(shape, x, strict=True))


def finish(y: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """(y * weight + bias) * (1 + scale) + shift in y's dtype: what follows the statistics."""
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if scale is not None:
        y = y * (1 + spread(scale, y).to(y.dtype))
    if shift is not None:
        y = y + spread(shift, y).to(y.dtype)
    return y


def modulated(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """y * (1 + scale) + shift as a model writes it, each step in the dtype at hand."""
    y = y if scale is None else y * (1 + spread(scale, y))
    return y if shift is None else y + spread(shift, y)


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """Sample ``b`` by itself: parameters have one dimension, all else has the batch first, or 1 there."""
    batch = args[0].shape[0]
    return tuple(a[b : b + 1] if isinstance(a, Tensor) and a.dim() > 1 and a.shape[0] == batch else a for a in args)
