"""What an op is, and how one of its kernels is picked.

An :class:`Op` says what a fused operation means: its schema, its reference in eager PyTorch, the eager spellings it
replaces, its nasty cases, its tolerance and its cost.  Fast kernels register on it, one :class:`Kernel` each.
:func:`pick` binds one to given arguments and says why each of the others declined.  The registry also makes every op
a ``torch.library`` operator (``torch.ops.fusegen.<name>``), so that export and compile keep it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.draw import Draw

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = torch.library.Library("fusegen", "FRAGMENT")


@dataclass(frozen=True)
class Tolerance:
    """Error bounds against the float64 reference.

    ``rms``: root mean square of the error over that of the reference; ``peak``: largest error over the reference's
    largest magnitude.  Both hold; a NaN or infinity that the reference does not have is an error of any size.
    """

    rms: float
    peak: float


@dataclass(frozen=True)
class Cost:
    """What the op must do at the least: floating-point operations, and bytes read or written once.

    ``written``: how many of the bytes, told by an op that mostly reads (memory is read faster than it is copied).
    ``products``: the dtype that its operations are of, where the inputs' is another ("int8" of float inputs).
    """

    flops: int
    bytes: int
    written: int | None = None
    products: str = ""


@dataclass(frozen=True)
class Case:
    """Arguments for tests and benchmarks.

    ``build(generator, dtype)`` returns the op's positional arguments as CPU tensors, in schema order, a full list.
    ``bench`` marks realistic sizes (benchmarks run these); ``small`` marks those the Triton interpreter can do in
    about a second.
    """

    name: str
    build: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    bench: bool = False
    small: bool = False


@dataclass(frozen=True)
class Spelling:
    """An eager form the op replaces.

    ``eager`` is called with tensors made by ``inputs()`` and traced into a pattern; its parameters are the pattern's
    wildcards.  Keyword-only parameters with defaults are literals (``eps``, ``scale`` …) that match any value found
    in the graph, and every default must differ from every other constant of the trace.  ``call(**captures)`` turns
    what was matched (wildcard and literal names) into the op's arguments by name, or returns a string: the reason
    this match cannot be replaced.
    """

    name: str
    eager: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Mapping[str, Any] | str]


class Launch:
    """One kernel bound to its arguments, ready to run any number of times.

    ``run()`` reads the tensors it was bound to, at the addresses they had.  Where a tensor has moved since (same shape,
    strides and dtype), ``move(index, tensor)`` re-points positional argument ``index``; the caller keeps the tensor
    alive while it is read.  ``keep(index)`` says that what that argument holds will not change: what a run makes of it
    alone may be kept for the next.  A subclass a device.
    """

    def run(self) -> None:
        raise NotImplementedError

    def move(self, index: int, tensor: Tensor) -> None:
        raise NotImplementedError

    def keep(self, index: int) -> None:
        pass


@dataclass(frozen=True)
class Kernel:
    """A fast version of an op.

    ``decline(*args)`` gives the reason it cannot serve these arguments, or None; it looks at shapes, strides, dtypes
    and the other arguments, never at data, so meta tensors do.  ``bind(outs, args)`` returns a :class:`Launch` that
    overwrites ``outs`` (already allocated by the op's ``allocate``).  ``rank``: the highest that does not decline wins.
    """

    name: str
    device: str  # "cpu" or "cuda"
    decline: Callable[..., str | None]
    bind: Callable[[tuple[Tensor, ...], tuple[Any, ...]], Launch]
    rank: int = 0


@dataclass(frozen=True)
class Declined:
    """A kernel that was not picked, and its reason."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Picked:
    """What :func:`pick` found; ``kernel`` is None where only the reference can serve."""

    kernel: Kernel | None
    declined: tuple[Declined, ...]

    def refusal(self) -> str:
        """Why no kernel serves; empty where one does."""
        reasons = "; ".join(f"{d.kernel}: {d.reason}" for d in self.declined)
        return "" if self.kernel is not None else reasons or "there is no kernel"


def first_sample(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """Sample ``b`` alone where only the first argument has a batch."""
    return (args[0][b : b + 1], *args[1:])


def is_channels_last(x: Tensor) -> bool:
    """Whether x (B, C, H, W) is dense with channels innermost; what is also contiguous counts as contiguous."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def is_last(x: Tensor) -> bool:
    """Whether x (B, C, H, W) or (B, C, L) is dense with channels innermost; what is also contiguous counts as that."""
    if x.dim() == 3:
        return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    return is_channels_last(x)


@dataclass(frozen=True)
class Op:
    """A fused operation; see the module's text and ``docs/map.md`` for how to add one.

    ``reference(*args)`` is the ground truth, in eager PyTorch, for every dtype and layout: it computes in float32 or
    wider and returns the dtype and strides of ``allocate(*args)``, which makes the uninitialised outputs (on the
    device of the arguments, meta included).  ``mutates`` names the arguments written in place.  ``eager(*args)`` is the
    op as a user of eager PyTorch would write it, with PyTorch's own fast routines, for benchmarks; None where no such
    form has the same meaning.  ``alone(args, b)``: the arguments of sample ``b`` by itself, whose result must have the
    bits it has in the batch; None where the output has no batch axis.  ``draw(draw, dtype)``: valid arguments that
    nobody chose, a full list in schema order, for the tests (``draw.py``): some ten thousand elements at most, sizes 0
    and 1 and every layout that is allowed among them; ``dtype`` is a key of ``tolerance``.  ``formula`` and ``source``
    (a paper or a routine) are one line each.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    allocate: Callable[..., tuple[Tensor, ...]]
    cost: Callable[..., Cost]
    tolerance: Mapping[torch.dtype, Tolerance]
    cases: Sequence[Case]
    spellings: Sequence[Spelling] = ()
    mutates: tuple[str, ...] = ()
    eager: Callable[..., Any] | None = None
    alone: Callable[[tuple[Any, ...], int], tuple[Any, ...]] | None = first_sample
    draw: Callable[[Draw, torch.dtype], tuple[Any, ...]] | None = None
    formula: str = ""
    source: str = ""
    kernels: list[Kernel] = field(default_factory=list)

    def case(self, name: str) -> Case:
        """The case of that name; the error lists those there are."""
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(f"{self.name} has no case {name!r}; it has {', '.join(c.name for c in self.cases)}")


_OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enter an op in the registry and make it ``torch.ops.fusegen.<name>`` (schema, CPU, CUDA, fake)."""
    if op.name in _OPS:
        raise ValueError(f"the op {op.name} is registered twice")
    _OPS[op.name] = op
    LIBRARY.define(op.name + op.schema)

    def call(*args: Any) -> Any:
        return run(op, args)

    def fake(*args: Any) -> Any:
        return _returned(op.allocate(*args))

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(op.name, call, device)
    torch.library.register_fake(f"fusegen::{op.name}", fake, lib=LIBRARY)
    return op


def _returned(outs: tuple[Tensor, ...]) -> Any:
    """What an operator with these outputs returns: None, the one tensor, or the tuple."""
    return outs if len(outs) > 1 else outs[0] if outs else None


def ops() -> dict[str, Op]:
    """Every registered op by name, with its kernels loaded."""
    from fusegen.kernels import catalogue  # the one list of op and kernel modules

    catalogue.load()
    return dict(_OPS)


def get(name: str) -> Op:
    """The op of that name; the error lists those there are."""
    known = ops()
    if name not in known:
        raise KeyError(f"no op is called {name!r}; there are {', '.join(sorted(known))}")
    return known[name]


def pick(op: Op, device: str, args: tuple[Any, ...]) -> Picked:
    """The best kernel of ``op`` for these arguments (in schema order, a full list) on ``"cpu"`` or ``"cuda"``."""
    declined: list[Declined] = []
    for kernel in sorted((k for k in op.kernels if k.device == device), key=lambda k: -k.rank):
        reason = kernel.decline(*args)
        if reason is None:
            return Picked(kernel, tuple(declined))
        declined.append(Declined(kernel.name, reason))
    return Picked(None, tuple(declined))


def complete(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` with the schema's defaults filled in to a full list."""
    schema = getattr(torch.ops.fusegen, op.name).default._schema.arguments
    return args + tuple(a.default_value for a in schema[len(args) :])


def run(op: Op, args: tuple[Any, ...]) -> Any:
    """Run ``op`` once, eagerly, with the kernel :func:`pick` finds, else with the reference."""
    ops()
    args = complete(op, args)
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    outs = op.allocate(*args)  # refuses what does not fit, before a kernel looks at it
    kernel = pick(op, device, args).kernel
    if kernel is None:
        made = op.reference(*args)
        return made if isinstance(made, Tensor) else _returned(made)
    kernel.bind(outs, args).run()
    return _returned(outs)
