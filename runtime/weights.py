"""A session's weights where its kernels read them: placed on the device once, prepacked once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Weights:
    """Shared by the captures of one session.

    ``place`` puts a weight on the device; a packed form is found by what was asked for, and is kept once where two
    requests lead to the same layout.  ``constants``: what captures worked out of weights alone, for the others.
    """

    def __init__(self, place: Callable[[Tensor], Tensor]):
        self._place = place
        self.constants: dict[str, list[Tensor]] = {}
        self._placed: dict[tuple[str, Any], Tensor] = {}
        self._asked: dict[Hashable, Tensor] = {}
        self._packed: dict[Hashable, Tensor] = {}

    def placed(self, name: str, weight: Tensor) -> Tensor:
        """``weight`` on the device."""
        key = name, weight.shape
        if key not in self._placed:
            self._placed[key] = self._place(weight)
        return self._placed[key]

    def packed(self, request: Hashable, weight: Hashable, pack: Callable[[], tuple[Tensor, bytes]]) -> Tensor:
        """The packed form that ``request`` names; ``pack`` makes it and says its layout."""
        if request not in self._asked:
            made, layout = pack()
            self._asked[request] = self._packed.setdefault((weight, layout), made)
        return self._asked[request]
