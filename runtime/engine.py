"""Sessions: a program that answers calls, one captured plan for each set of input shapes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime import collector, measure, state
from fusegen.runtime.backends.base import Backend
from fusegen.runtime.capture import Capture
from fusegen.runtime.errors import OutOfMemoryError, RequestError
from fusegen.runtime.plan import Plan, plan
from fusegen.runtime.prepared import Prepared
from fusegen.runtime.program import Program, TensorSpec
from fusegen.runtime.specialize import bind_symbols, evaluate
from fusegen.runtime.weights import Weights

GIB = 1 << 30
# What allocators say when there is no memory: PyTorch's on the CPU and on CUDA, and the C++ library's.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


class Session:
    """A compiled program: call it with the inputs, in order or by name, for its output (a tuple if there are several).

    Inputs are tensors on any device; outputs are new contiguous tensors on the backend's device, the caller's own.
    Inputs that the program writes (``state``: name -> its values, ``runtime/state.py``) are written in place.  One
    lock serialises calls from several threads.  Captured shapes are kept, least recently used first out, within
    ``memory`` bytes beyond the weights.  Raises :class:`RequestError` for inputs that do not fit, and
    :class:`OutOfMemoryError`, after which the next call works.
    """

    def __init__(
        self,
        program: Program,
        backend: Backend,
        deterministic: bool = False,
        memory: int = 4 * GIB,
        notes: tuple[str, ...] = (),
        without: Collection[str] = (),
        prepared: Prepared | None = None,
    ):
        self.program, self.backend, self.deterministic = program, backend, deterministic
        self.memory, self.notes, self.without = memory, notes, without
        self.weights, self.state = Weights(backend.place, prepared), state.versions(program)
        self._captures: OrderedDict[Any, Capture] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        given = self._given(inputs, named)
        with self.running():
            capture = self.capture(given)
            with self.whole(capture):
                for name, value in given.items():
                    capture.load(name, value)
                capture.run("step")
                if self.backend.graph:  # it read, and wrote, copies
                    for name in self.state:
                        given[name].copy_(capture.value(name))
                return _outputs(capture)

    def pinned(self, inputs: Mapping[str, Tensor]) -> Pinned:
        """The session on inputs whose memory stays: for a loop that writes them, or lets the program do so."""
        return Pinned(self, self._given((), dict(inputs)), inputs)

    def zeros(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """New memory for the inputs that the program writes, where the symbols have the values ``sizes``."""
        specs = {name: self.program.inputs[name] for name in self.state}
        shapes = {name: [evaluate(d, sizes) for d in spec.shape] for name, spec in specs.items()}
        return {k: torch.zeros(shapes[k], dtype=v.dtype, device=self.backend.device) for k, v in specs.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """What a run takes: the lock, inference mode, and errors of an allocator as our own."""
        with self._lock, _running():
            yield

    @property
    def plan(self) -> Plan:
        """The plan of the shapes last called; :meth:`planned` makes one for any."""
        with self._lock:
            if not self._captures:
                raise RequestError("nothing has been planned yet", mend="call the session, or session.planned(specs)")
            return next(reversed(self._captures.values())).plan

    def planned(
        self, given: Mapping[str, TensorSpec | Tensor], fixed: Sequence[str] = (), per_step: Sequence[str] = ()
    ) -> Plan:
        """The plan for inputs of these specs, without running anything."""
        specs = {k: TensorSpec(tuple(v.shape), v.dtype) for k, v in given.items()}
        how = self.deterministic, fixed, per_step, self.notes, self.without
        return plan(self.program, specs, self.backend, *how)

    def profile(self, *inputs: Tensor, **named: Tensor) -> list[measure.Share]:
        """The measured share of time of each kernel and routine, the largest first, and what is spent between them.

        A program that writes its inputs is measured pinned, as its loop runs it.
        """
        given = self._given(inputs, named)
        if self.state:
            pinned = self.pinned(given)
            pinned()
            with self.running():
                return measure.shares(pinned.capture, pinned)
        self(**given)
        with self.running():
            return measure.shares(self.capture(given), lambda: self(**given))

    def trajectory(self, fixed: Mapping[str, Tensor], per_step: Mapping[str, Tensor]) -> Trajectory:
        """A run of many steps, of which ``fixed`` inputs stay the same and ``per_step`` inputs are known ahead.

        A ``per_step`` tensor has a row for each step: the input of that step, or one number for all of its elements.
        Nodes that depend on these alone run once, not in the loop.
        """
        for name in [*fixed, *per_step]:
            if name not in self.program.inputs:
                raise RequestError(
                    f"there is no input {name!r}", mend=f"the inputs are {', '.join(self.program.inputs)}"
                )
        lengths = {v.shape[0] if v.ndim else 0 for v in per_step.values()}
        if len(lengths) > 1 or 0 in lengths or set(fixed) & set(per_step):
            raise RequestError(
                "per_step inputs need the same number of rows, at least one, and no name in fixed as well"
            )
        return Trajectory(self, dict(fixed), dict(per_step))

    def capture(self, given: Mapping[str, Tensor], fixed: Sequence[str] = (), per_step: Sequence[str] = ()) -> Capture:
        """The capture for inputs like ``given``, made where there is none; under the session's lock."""
        key = (tuple((k, tuple(v.shape), v.dtype) for k, v in given.items()), frozenset(fixed), frozenset(per_step))
        if key not in self._captures:
            self._captures[key] = self.fresh(given, fixed, per_step)
        self._captures.move_to_end(key)
        while len(self._captures) > 1 and sum(c.nbytes for c in self._captures.values()) > self.memory:
            self._captures.popitem(last=False)
        return self._captures[key]

    def fresh(self, given: Mapping[str, Tensor], fixed: Sequence[str] = (), per_step: Sequence[str] = ()) -> Capture:
        """A new capture for inputs like ``given``, with what is made of weights alone."""
        with collector.resting():
            made = Capture(self.planned(given, fixed, per_step), self.backend, self.weights)
            made.run("constant")
        return made

    @contextmanager
    def whole(self, capture: Capture) -> Iterator[None]:
        """Drop the capture where a run fails half-way, and with it the memory its values hold."""
        try:
            yield
        except BaseException:
            self._captures = OrderedDict((k, c) for k, c in self._captures.items() if c is not capture)
            raise

    def _given(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = list(self.program.inputs)
        if len(inputs) > len(names):
            raise RequestError(f"{len(inputs)} inputs were given, there are {len(names)}", mend=", ".join(names))
        found = dict(zip(names, inputs, strict=False))
        for name, value in named.items():
            if name not in names or name in found:
                what = "was given twice" if name in found else "is no input"
                raise RequestError(f"{name!r} {what}", mend=f"the inputs are {', '.join(names)}")
            found[name] = value
        missing = [n for n in names if n not in found]
        if missing:
            raise RequestError(f"input {missing[0]!r} is missing", mend=f"the inputs are {', '.join(names)}")
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise RequestError(f"input {name!r} is a {type(value).__name__}", mend="give a torch.Tensor")
        out = {n: found[n].detach().to(self.backend.device).contiguous() for n in names}
        for name in self.state:
            _same_memory(name, out[name], found[name])
        return out


class Trajectory:
    """``trajectory(i, x)`` for step ``i``: the session's output, without what does not change.  Made by a session.

    ``x``: the one input that is neither fixed nor per_step; further ones by name.
    """

    def __init__(self, session: Session, fixed: dict[str, Tensor], per_step: dict[str, Tensor]):
        self.session, self.fixed, self.per_step = session, fixed, per_step
        self.free = [n for n in session.program.inputs if n not in fixed and n not in per_step]
        self.steps = next((len(v) for v in per_step.values()), 0)
        self._capture: Capture | None = None
        self._left: dict[str, Tensor] = {}
        self._rows: list[dict[str, Tensor]] = []

    def __call__(self, step: int, *inputs: Tensor, **named: Tensor) -> Any:
        if self.per_step and not 0 <= step < self.steps:
            raise RequestError(f"step {step} does not exist", mend=f"there are {self.steps}, from 0")
        given = dict(zip(self.free, inputs, strict=False)) | named
        session = self.session
        with session.running():
            full = session._given((), {**self.fixed, **self._row(step, given), **given})
            capture = session.capture(full, tuple(self.fixed), tuple(self.per_step))
            with session.whole(capture):
                if self._capture is not capture:
                    self._prepare(capture, full, given)
                for name, value in {**full, **self._left, **(self._rows[step] if self._rows else {})}.items():
                    capture.load(name, value)
                capture.run("step")
                return _outputs(capture)

    def _row(self, step: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ``per_step`` inputs of a step; a row of one number fills the input."""
        program = self.session.program
        known = {k: TensorSpec(tuple(v.shape), v.dtype) for k, v in {**self.fixed, **given}.items()}
        out = {}
        for name, rows in self.per_step.items():
            row, spec = rows[step], program.inputs[name]
            if row.ndim == 0 and spec.shape:
                inputs = {k: v for k, v in program.inputs.items() if k in known}
                values = bind_symbols(Program(program.name, (), inputs, (), {}, program.symbols), known)
                row = row.expand([evaluate(d, values) for d in spec.shape])
            out[name] = row
        return out

    def _prepare(self, capture: Capture, full: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        """Run what does not depend on the free inputs, and keep what it leaves to the loop."""
        self._capture = None
        phases = {o: s.phase for s in capture.plan.steps for o in s.node.outputs}
        for name, value in full.items():
            capture.load(name, value)
        capture.run("fixed")
        self._left = {n: capture.value(n) for n in capture.plan.crossing if phases[n] == "fixed"}
        self._rows = []
        for step in range(self.steps):
            for name, value in self._row(step, given).items():
                capture.load(name, value.to(self.session.backend.device).contiguous())
            capture.run("per_step")
            self._rows.append({n: capture.value(n) for n in capture.plan.crossing if phases[n] == "per_step"})
        self._capture = capture


class Pinned:
    """A session's step on inputs whose memory stays; call it any number of times.  Made by :meth:`Session.pinned`.

    It reads the tensors it was made with as they are at each call, and returns the output (a tuple if there are
    several) where it lies: it holds until the next call.
    """

    def __init__(self, session: Session, given: Mapping[str, Tensor], inputs: Mapping[str, Tensor]):
        for name, value in given.items():
            _same_memory(name, value, inputs[name])
        self.session, self.given = session, given
        self.capture = self._captured()

    def _captured(self) -> Capture:
        with self.session.running():
            made = self.session.fresh(self.given)
            for name, value in self.given.items():
                made.pin(name, value)
            return made

    def __call__(self) -> Any:
        with self.session.running():
            try:
                self.capture.run("step")
            except BaseException:
                self.capture = self._captured()
                raise
            values = [self.capture.value(name) for name in self.capture.plan.program.outputs]
        return values[0] if len(values) == 1 else tuple(values)


def _same_memory(name: str, ours: Tensor, given: Tensor) -> None:
    if ours.data_ptr() != given.data_ptr():
        raise RequestError(f"input {name!r} is used where it lies", mend=f"give a contiguous tensor on {ours.device}")


def _outputs(capture: Capture) -> Any:
    """The outputs in memory of the caller's own, outside inference mode, so that anything may be done with them."""
    values = [capture.value(name) for name in capture.plan.program.outputs]
    with torch.inference_mode(False):
        made = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values]
    for out, value in zip(made, values, strict=True):
        out.copy_(value)
    return made[0] if len(made) == 1 else tuple(made)


@contextmanager
def _running() -> Iterator[None]:
    """Inference mode; an allocator's failure becomes :class:`OutOfMemoryError`."""
    try:
        with torch.inference_mode():
            yield
    except MemoryError:
        raise OutOfMemoryError("there is not enough memory", mend="ask for a smaller batch or size") from None
    except RuntimeError as error:
        if any(words in str(error).lower() for words in _NO_MEMORY):
            raise OutOfMemoryError("there is not enough memory", mend="ask for a smaller batch or size") from None
        raise
