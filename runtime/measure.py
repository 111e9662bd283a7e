"""Where the time of a captured plan goes: each kernel's share, and what is spent between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusegen.runtime.capture import Capture

BETWEEN = "outside kernels"
RUNS, SECONDS = 5, 0.3  # at least so many runs, and so long


@dataclass(frozen=True)
class Spent:
    """What one node took, and the least it must do (:class:`~fusegen.runtime.plan.Step`)."""

    seconds: float
    flops: int
    bytes: int


@dataclass(frozen=True)
class Share:
    """What one kernel or routine took of a profiled run: seconds, its part of the whole, and that of each call."""

    name: str
    seconds: float
    part: float
    calls: tuple[Spent, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations of all calls, of the direct algorithm where a kernel has one that does fewer."""
        return sum(c.flops for c in self.calls)

    @property
    def bytes(self) -> int:
        """Bytes that all calls must move."""
        return sum(c.bytes for c in self.calls)

    def to_json(self) -> dict[str, Any]:
        """As plain data, all calls in one."""
        return {
            "name": self.name, "seconds": self.seconds, "part": self.part, "calls": len(self.calls),
            "flops": self.flops, "bytes": self.bytes,
        }  # fmt: skip


def shares(capture: Capture, call: Callable[[], Any]) -> list[Share]:
    """The median seconds of every kernel and routine in a run, and those of ``call`` (which runs it whole) beyond them.

    What a clock and an empty closure take is measured too, and taken off; views count as outside.
    """
    runs = _runs(call)
    empty = statistics.median(_timed(lambda: None) for _ in range(1000))
    whole = statistics.median(_timed(call) for _ in range(runs))
    taken: dict[int, list[float]] = {}
    steps = []
    for _ in range(runs):
        steps = capture.profile("step")
        for index, (_, seconds) in enumerate(steps):
            taken.setdefault(index, []).append(seconds)
    found: dict[str, list[Spent]] = {}
    for index, (step, _) in enumerate(steps):
        if step.binding.how != "view":
            seconds = max(0.0, statistics.median(taken[index]) - empty)
            name = f"{step.binding.how} {step.binding.name}"
            found.setdefault(name, []).append(Spent(seconds, step.flops, step.bytes))
    took = {name: sum(c.seconds for c in calls) for name, calls in found.items()}
    inside = sum(took.values())
    whole = max(whole, inside)
    rows = [Share(name, took[name], took[name] / whole, tuple(calls)) for name, calls in found.items()]
    rows.append(Share(BETWEEN, whole - inside, (whole - inside) / whole))
    return sorted(rows, key=lambda r: -r.seconds)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _runs(call: Callable[[], Any]) -> int:
    once = min(_timed(call) for _ in range(3))
    return max(RUNS, min(1000, int(SECONDS / max(once, 1e-6))))
