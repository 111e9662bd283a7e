"""How a node of a plan runs, and the call that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusegen.kernels.op import Declined


@dataclass(frozen=True)
class Binding:
    """How a node runs.

    ``how``: ``"kernel"`` (ours), ``"library"``, ``"aten"``, ``"view"`` (no memory moves) or ``"reference"`` (a fused op
    without a kernel here); ``name``: the kernel or routine; ``declined``: the kernels that did not take it, and why.
    ``planned``: its output is written into the arena.  ``invariant``: a sample's bits do not depend on the batch it is
    in; ``by_sample``: the arguments that are cut into samples, one call each, to make it so.
    """

    how: str
    name: str
    declined: tuple[Declined, ...] = ()
    planned: bool = False
    invariant: bool = True
    by_sample: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """A function and its arguments; a :class:`~fusegen.runtime.program.Ref` in them stands for a value.

    ``names``: those of the positional arguments, in order.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    names: tuple[str, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
