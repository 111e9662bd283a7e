"""A session's weights where its kernels read them: placed on the device once, prepacked once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from fusegen.runtime.derived import Weight, release, value

Pack = Callable[[Tensor], tuple[Tensor, bytes]]
HOLES = 64 << 20  # bytes of weights that were worked on, behind which it is worth giving back the holes they left


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
        self._worked = 0

    def placed(self, name: str, weight: Weight) -> Tensor:
        """``weight`` on the device."""
        key = name, weight.shape
        if key not in self._placed:
            self._placed[key] = made = self._place(value(weight))
            self._worked += made.nbytes
            if made is not weight:
                release(weight)
        return self._placed[key]

    def forget(self, name: str, weight: Weight) -> None:
        """Hold a placed weight no longer: what was made of it is all that is used."""
        self._placed.pop((name, weight.shape), None)
        release(weight)

    def packed(self, request: Hashable, name: Hashable, weight: Weight, pack: Pack) -> Tensor:
        """The packed form of a weight that ``request`` names; ``pack`` makes it of the tensor and says its layout."""
        if request not in self._asked:
            made, layout = pack(value(weight))
            self._asked[request] = self._packed.setdefault((name, layout), made)
            self._worked += weight.nbytes
            release(weight)
        return self._asked[request]

    def settle(self) -> None:
        """Give back what the C library's allocator holds of the values that were packed and dropped."""
        trim = _trim() if self._worked > HOLES else None
        if trim is not None:
            trim(0)
        self._worked = 0


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``, or None with another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
