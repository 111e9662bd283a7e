"""Weights that are worked out of others when a session places or packs them, and are not held meanwhile.

A weight in the compute dtype, the parts of three joined, a half of one: each would be a second copy of a file's bytes.
Plans need no more than shapes and strides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusegen.runtime.no_dynamo import no_dynamo
from fusegen.runtime.read import archive


class Derived:
    """``function`` of other weights: what is known of it without its values, and :meth:`value`, made anew each time."""

    __slots__ = ("_meta", "function", "of")

    def __init__(self, function: Callable[..., Tensor], *of: Weight):
        self.function, self.of = function, of
        with torch.no_grad(), no_dynamo():
            self._meta = function(*map(meta, of))

    def meta(self) -> Tensor:
        """Its shape, dtype and strides."""
        return self._meta

    def value(self) -> Tensor:
        """The tensor."""
        with torch.no_grad():
            return self.function(*map(value, self.of))

    def sources(self) -> list[Tensor]:
        """The tensors that it is made of in the end."""
        return [t for w in self.of for t in sources(w)]

    @property
    def shape(self) -> torch.Size:
        return self._meta.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._meta.dtype

    @property
    def device(self) -> torch.device:
        return self.sources()[0].device

    @property
    def nbytes(self) -> int:
        return self._meta.nbytes

    def stride(self) -> tuple[int, ...]:
        return tuple(self._meta.stride())

    def numel(self) -> int:
        return self._meta.numel()

    def dim(self) -> int:
        return self._meta.dim()


class Moved(Derived):
    """Others' values in another place: of converted ones, what the converted result is."""

    __slots__ = ()


class Converted(Derived):
    """A weight in another dtype."""

    __slots__ = ("source",)

    def __init__(self, source: Weight, dtype: torch.dtype):
        super().__init__(lambda w: w.to(dtype), source)
        self.source = source


Weight = Tensor | Derived


def converted(weight: Weight, dtype: torch.dtype) -> Weight:
    """``weight`` in ``dtype``, later; itself where it is in it, or what it came from by a conversion without loss."""
    if isinstance(weight, Converted) and torch.promote_types(weight.source.dtype, weight.dtype) == weight.dtype:
        weight = weight.source
    return weight if weight.dtype == dtype else Converted(weight, dtype)


def viewed(function: Callable[[Tensor], Tensor], weight: Weight) -> Weight:
    """A view of a weight: of a tensor at once, since it costs nothing."""
    return Moved(function, weight) if isinstance(weight, Derived) else function(weight)


def stored(weight: Weight) -> Weight | None:
    """What ``weight`` was before it was converted, or its parts were; None where it was not."""
    if isinstance(weight, Converted):
        return weight.source
    parts = [stored(w) for w in weight.of] if isinstance(weight, Moved) else []
    found = [w for w in parts if w is not None]
    alike = len(found) == len(parts) and len({w.dtype for w in found}) == 1
    return Moved(weight.function, *found) if isinstance(weight, Moved) and alike else None


def meta(weight: Weight) -> Tensor:
    """A weight's shape, dtype and strides, as a meta tensor."""
    if isinstance(weight, Derived):
        return weight.meta()
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")


def value(weight: Weight) -> Tensor:
    """A weight's tensor."""
    return weight.value() if isinstance(weight, Derived) else weight


def values(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """All of a program's weights as tensors, by name."""
    return {name: value(weight) for name, weight in weights.items()}


def sources(weight: Weight) -> list[Tensor]:
    """The tensors that a weight is made of."""
    return weight.sources() if isinstance(weight, Derived) else [weight]


def ask(weight: Weight) -> None:
    """Map the pages of the files that ``weight`` is read from: all of it will be."""
    for tensor in sources(weight):
        archive.ask(tensor)


def release(weight: Weight) -> None:
    """Let the system take back the pages of the files that ``weight`` was read from, until they are read again."""
    for tensor in sources(weight):
        archive.release(tensor)
