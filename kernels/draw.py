"""Random arguments for an op: sizes, layouts and values that nobody chose.

An op says in ``Op.draw(draw, dtype)`` what its arguments may be.  Every choice goes through one :class:`Draw`, so that
the source of the choices is the caller's: Hypothesis in the tests, which shrinks what fails, or a ``random.Random``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
LAYOUTS = ("contiguous", "unaligned", "padded", "strided", "transposed", "channels_last")


class Draw:
    """Choices, all of them made by ``integer(low, high)``, both ends included."""

    def __init__(self, integer: Callable[[int, int], int]):
        self.integer = integer

    def choice(self, options: Sequence[T]) -> T:
        """One of ``options``; put the simplest first, failures shrink towards it."""
        return options[self.integer(0, len(options) - 1)]

    def flag(self) -> bool:
        """True or False."""
        return bool(self.integer(0, 1))

    def shape(self, *highest: int, low: int = 0) -> tuple[int, ...]:
        """A size in [low, highest] for each of ``highest``."""
        return tuple(self.integer(low, high) for high in highest)

    def generator(self) -> torch.Generator:
        """A seeded generator, for values that :meth:`tensor` does not make."""
        return torch.Generator().manual_seed(self.integer(0, 2**31))

    def dense(self, shape: Sequence[int], dtype: torch.dtype, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        """A contiguous tensor of normal values."""
        return (torch.randn(tuple(shape), generator=self.generator()) * scale + mean).to(dtype)

    def tensor(
        self, shape: Sequence[int], dtype: torch.dtype, mean: float = 0.0, scale: float = 1.0,
        layouts: Sequence[str] = LAYOUTS,
    ) -> Tensor:  # fmt: skip
        """Normal values in one of ``layouts``; a shape that cannot have the one drawn is contiguous."""
        return laid_out(self.dense(shape, dtype, mean, scale), self.choice(layouts))

    def maybe(self, shape: Sequence[int], dtypes: Sequence[torch.dtype], mean: float = 0.0) -> Tensor | None:
        """A parameter: None, or dense in one of ``dtypes``."""
        dtype = self.choice((None, *dtypes))
        return None if dtype is None else self.dense(shape, dtype, mean)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in that layout: unaligned (one element past the start of a buffer), padded (each row of the last
    dimension followed by three more elements), strided (every other element of it), transposed (the first two
    dimensions swapped in memory), channels_last (four dimensions) or contiguous.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no layout is called {layout!r}; there are {', '.join(LAYOUTS)}")
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "padded" and x.dim():
        return torch.cat([x, x.new_zeros(*x.shape[:-1], 3)], -1)[..., : x.shape[-1]]
    if layout == "strided" and x.dim():
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x
