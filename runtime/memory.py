"""Lays out the buffers of a static program in one arena, by when each is live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@dataclass(frozen=True)
class Interval:
    """A buffer of ``nbytes`` that is written at step ``start`` and last read at step ``end`` (both included)."""

    name: str
    nbytes: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Where each buffer lies.

    ``offsets``: name -> bytes from the arena's start; ``peak``: the arena's size; ``live``: the largest sum of buffers
    that are live at one step, below which no layout can go.
    """

    offsets: dict[str, int]
    peak: int
    live: int


def align(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(intervals: Sequence[Interval]) -> Layout:
    """Greedy, largest first: each buffer takes the lowest gap between those it shares a step with."""
    placed: list[tuple[int, int, Interval]] = []  # offset, end offset, interval; sorted by offset
    offsets: dict[str, int] = {}
    for one in sorted(intervals, key=lambda i: (-i.nbytes, i.start, i.name)):
        size, at, insert = align(one.nbytes), 0, 0
        for index, (low, high, other) in enumerate(placed):
            if other.start <= one.end and one.start <= other.end:
                if low - at >= size:
                    break
                at = max(at, high)
            insert = index + 1
        offsets[one.name] = at
        while insert < len(placed) and placed[insert][0] < at:
            insert += 1
        while insert > 0 and placed[insert - 1][0] > at:
            insert -= 1
        placed.insert(insert, (at, at + size, one))
    peak = max((high for _, high, _ in placed), default=0)
    return Layout(offsets, peak, _live(intervals))


def _live(intervals: Sequence[Interval]) -> int:
    change: dict[int, int] = {}
    for one in intervals:
        change[one.start] = change.get(one.start, 0) + align(one.nbytes)
        change[one.end + 1] = change.get(one.end + 1, 0) - align(one.nbytes)
    now = most = 0
    for step in sorted(change):
        now += change[step]
        most = max(most, now)
    return most
