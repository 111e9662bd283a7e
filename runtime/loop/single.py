"""The single loop: samples that take one pass, or a chain of passes, some of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fusegen.runtime.errors import Cancelled
from fusegen.runtime.loop.cancel import Cancel, asked

Pass = Callable[[Any], Any]
Progress = Callable[[int, int], object]


def parts(count: int, most: int) -> list[range]:
    """``count`` samples in as few parts of at most ``most`` as can be, alike in length: a new length costs a plan."""
    many = -(-count // most)
    each = -(-count // many) if many else 0
    return [range(i * each, min((i + 1) * each, count)) for i in range(many)]


def single(
    chain: Sequence[Pass],
    count: int,
    most: int,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Iterator[Any]:
    """What the last pass of ``chain`` gives for each part of ``count`` samples, in order.

    The first pass is given the ``range`` of a part's samples, each other one what the one before it gave.
    ``progress(done, total)`` counts samples; ``cancel`` is asked before every pass and raises :class:`Cancelled`.
    """
    done = 0
    for part in parts(count, most):
        value: Any = part
        for run in chain:
            if asked(cancel):
                raise Cancelled("the generation was cancelled", f"after {done} of {count} samples")
            value = run(value)
        done += len(part)
        if progress is not None:
            progress(done, count)
        yield value
