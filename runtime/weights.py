"""A session's weights where its kernels read them: placed on the device once, prepacked once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fusegen.runtime.derived import Weight, ask, release, value
from fusegen.runtime.prepared import Prepared
from fusegen.runtime.specialize import Strided

Pack = Callable[[Tensor], tuple[Tensor, bytes]]
HOLES = 64 << 20  # bytes of weights that were worked on, behind which it is worth giving back the holes they left


class Weights:
    """Shared by the captures of one session.

    ``place`` puts a weight on the device; a packed form is found by what was asked for, and is kept once where two
    requests lead to the same layout.  ``made``: what captures worked out of weights alone, by what was asked for:
    it is kept for the others, and in the folder ``prepared`` for other processes.
    """

    def __init__(self, place: Callable[[Tensor], Tensor], prepared: Prepared | None = None):
        self._place, self._prepared = place, prepared
        self.made: dict[str, list[Tensor]] = {}
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
            ask(weight)
            made, layout = pack(value(weight))
            self._asked[request] = self._packed.setdefault((name, layout), made)
            self._worked += weight.nbytes
            release(weight)
        return self._asked[request]

    def find(self, request: str, given: Mapping[str, Weight], specs: Sequence[Strided]) -> list[Tensor] | None:
        """What was worked out for ``request`` of the weights ``given``, of these specs; None where nothing was."""
        if request not in self.made and self._prepared is not None:
            found = self._prepared.find(request, given, specs)
            if found is not None:
                self.made[request] = found
        if request not in self.made:
            for weight in given.values():
                ask(weight)
        return self.made.get(request)

    def keep(self, request: str, given: Mapping[str, Weight], values: list[Tensor]) -> None:
        """Keep what was worked out."""
        self.made[request] = values
        if self._prepared is not None:
            self._prepared.keep(request, given, values)

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
