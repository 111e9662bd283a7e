"""How a caller stops a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """What cancels from another thread; ``threading.Event`` is one."""

    def is_set(self) -> bool: ...


Cancel = Event | Callable[[], bool]


def asked(cancel: Cancel | None) -> bool:
    """Whether the caller has asked to stop."""
    return cancel is not None and (cancel() if callable(cancel) else cancel.is_set())
