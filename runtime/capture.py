"""A plan made ready to run: a file of registers and one closure for each node that has work to do.

Building runs every node once on the first inputs, so that kernels are bound to real memory.  A value is *stable* where
its memory never moves between runs (weights, the arena, pinned inputs, views of them): a kernel that reads stable
values alone is called with no preparation, and a view of one costs nothing again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.runtime import closures, state
from fusegen.runtime.backends import aten
from fusegen.runtime.backends.base import Backend
from fusegen.runtime.backends.binding import Call
from fusegen.runtime.closures import At, Run
from fusegen.runtime.derived import Weight
from fusegen.runtime.errors import GraphError
from fusegen.runtime.plan import PHASES, Plan, Step
from fusegen.runtime.program import Ref, substitute
from fusegen.runtime.specialize import Strided, place, strided
from fusegen.runtime.weights import Weights


class Capture:
    """A plan, bound.  Not for two threads at once; the session holds the lock.

    ``nbytes``: the memory it holds beyond the program's weights.
    """

    def __init__(self, plan: Plan, backend: Backend, weights: Weights):
        self.plan, self.backend, self.weights = plan, backend, weights
        self.registers: list[Any] = []
        self.index: dict[str, int] = {}
        self.stable: set[str] = set()
        self.runs: dict[str, list[tuple[Step, Run]]] = {phase: [] for phase in PHASES}
        self.loops: dict[str, Run] = {}
        self.versions = state.versions(plan.program)
        self._held: dict[str, Tensor] = {}
        self.arena = torch.empty(plan.layout.peak, dtype=torch.uint8, device=backend.device)
        self.nbytes = plan.layout.peak
        self._deaths = _deaths(plan)
        backend.prepare(plan)
        self._readers = Counter(name for s in plan.steps for name in dict.fromkeys(s.node.inputs()))

    def load(self, name: str, value: Tensor) -> None:
        """Set an input, or a value that an earlier phase left; a recorded graph reads it where it first was."""
        if self.backend.graph:
            held = self._held.get(name)
            value = self._held[name] = value.clone() if held is None else held.copy_(value)
        self._set(name, value)

    def pin(self, name: str, value: Tensor) -> None:
        """Set an input once and for all: runs read it, and write it, where it lies."""
        self._set(name, value)
        self.stable.update(self.versions.get(name, (name,)))

    def _set(self, name: str, value: Tensor) -> None:
        for version in self.versions.get(name, (name,)):
            self.registers[self.slot(version)] = value

    def value(self, name: str) -> Tensor:
        """A value as it now is."""
        found = self.registers[self.index[name]]
        assert isinstance(found, Tensor)
        return found

    def run(self, phase: str) -> None:
        """Run a phase whose inputs are loaded; the first time, bind its nodes."""
        if phase in self.loops:
            self.loops[phase]()
        else:
            self.build(phase)

    def build(self, phase: str) -> None:
        """Bind the nodes of a phase, running each once; the constant ones, which never run again, are let go."""
        for step in self.plan.steps:
            if step.phase == phase and not self._known(step):
                run = self._bind(step)
                if run is not None and phase != "constant":
                    self.runs[phase].append((step, run))
                self._keep(step)
                if phase == "constant":
                    self.weights.settle()  # what packing one weight left is not there while the next are packed
        if phase == "constant":
            self.stable.update(o for s in self.plan.steps if s.phase == phase for o in s.node.outputs)
        self.weights.settle()
        loop = closures.loop([run for _, run in self.runs[phase]])
        self.loops[phase] = self._recorded(loop) if self.backend.graph and phase == "step" else loop

    def _recorded(self, loop: Run) -> Run:
        """The replay of ``loop``.  While it is recorded nothing is computed, and what is not planned moves to memory of
        the recording's own: this first time the outputs are those of the run before."""
        slots = [self.index[name] for name in self.plan.program.outputs]
        found = [self.registers[slot] for slot in slots]
        replay = self.backend.record(loop)
        moved = [self.registers[slot] for slot in slots]

        def run() -> None:
            replay()
            self._put(slots, moved)

        self._put(slots, found)
        return run

    def _put(self, slots: Sequence[int], values: Sequence[Any]) -> None:
        for slot, value in zip(slots, values, strict=True):
            self.registers[slot] = value

    def _request(self, step: Step) -> str:
        """What names the constants that ``step`` makes of weights alone and a later phase reads, in any capture of the
        session; "" where it makes none."""
        weights, given = self.plan.program.weights, dict.fromkeys(step.node.inputs())
        crossing = step.phase == "constant" and self.plan.crossing.issuperset(step.node.outputs)
        kept = crossing and step.binding.how != "view" and weights.keys() >= given.keys()
        shapes = [tuple(weights[name].shape) for name in given] if kept else []
        return f"{step.binding.name} {step.node.op} {step.node.args} {shapes}" if kept else ""

    def _given(self, step: Step) -> dict[str, Weight]:
        """The weights that ``step`` reads."""
        weights = self.plan.program.weights
        return {name: weights[name] for name in dict.fromkeys(step.node.inputs()) if name in weights}

    def _known(self, step: Step) -> bool:
        """Whether another capture worked out what ``step`` makes: then its values are taken over."""
        request, given = self._request(step), self._given(step)
        found = self.weights.find(request, given, step.outputs) if request else None
        for name, value in zip(step.node.outputs, found or (), strict=bool(found)):
            self.registers[self.slot(name)] = value
        return found is not None

    def _keep(self, step: Step) -> None:
        """Keep what ``step`` made of weights for other captures, and let go of those that it alone reads."""
        if request := self._request(step):
            self.weights.keep(request, self._given(step), [self.value(name) for name in step.node.outputs])
        if step.phase == "constant":
            for name in self._alone(step):
                self.registers[self.index[name]] = None
                self.weights.forget(name, self.plan.program.weights[name])

    def _alone(self, step: Step) -> list[str]:
        """The weights that no other step reads."""
        weights, outputs = self.plan.program.weights, self.plan.program.outputs
        mine = {name for name in step.node.inputs() if name in weights and name not in outputs}
        return sorted(name for name in mine if self._readers[name] == 1)

    def profile(self, phase: str) -> list[tuple[Step, float]]:
        """Run a phase; the seconds of each of its steps."""
        out = []
        for step, run in self.runs[phase]:
            start = time.perf_counter()
            run()
            out.append((step, time.perf_counter() - start))
        return out

    def slot(self, name: str) -> int:
        """The register of a value; a weight's is filled."""
        if name not in self.index:
            self.index[name] = len(self.registers)
            weight = self.plan.program.weights.get(name)
            self.registers.append(None if weight is None else self.weights.placed(name, weight))
            if weight is not None:
                self.stable.add(name)
        return self.index[name]

    def _constant(self, value: Any) -> int:
        self.registers.append(value)
        return len(self.registers) - 1

    def _bind(self, step: Step) -> Run | None:
        if step.binding.how == "kernel":
            return self._launch(step)
        if step.binding.how == "reference":
            op = registry.get(step.node.op.split(".")[1])
            call = Call(op.reference, tuple(step.node.args.values()), tuple(step.node.args))
        elif step.binding.how == "view":
            call = aten.call(step.node, False, torch.device(self.backend.device))
        else:
            call = self.backend.call(step.node, step.binding, self.plan.program, self.weights)
        return self._function(step, call)

    def _function(self, step: Step, call: Call) -> Run | None:
        """The closure of a function that returns its outputs, or writes the planned one."""
        if step.binding.by_sample:
            call = closures.by_sample(call, step.binding.by_sample, step.outputs[0], self.backend.device)
        slots = [self.slot(name) for name, _ in step.made()]
        get = closures.getter(tuple(substitute(a, _Slots(self)) for a in call.args), self._constant)
        dead = self._dying(step)
        if step.binding.planned:
            out = self._planned(step.node.outputs[0], step.outputs[0])
            self.registers[slots[0]] = out
            self.stable.add(step.node.outputs[0])
            run = closures.writing(call.function, get, {**call.kwargs, "out": out}, self.registers, dead)
        else:
            run = closures.returning(call.function, get, call.kwargs, self.registers, slots, dead)
        run()
        if self.backend.fuses:  # elsewhere no kernel goes by the plan's strides
            self._check(step)
        if step.binding.how == "view" and self.stable.issuperset(step.node.inputs()):
            self.stable.update(step.node.outputs)
            return None
        return run

    def _check(self, step: Step) -> None:
        """What a routine returned must be laid out as planned: the kernels that read it go by the plan."""
        for name, spec in zip(step.node.outputs, step.outputs, strict=True):
            found = self.registers[self.index[name]]
            if isinstance(found, Tensor) and strided(found).dense() != spec.dense():
                raise GraphError(
                    f"{step.binding.name} returned {tuple(found.shape)} strides {found.stride()} {found.dtype}",
                    place(step.node),
                    f"the plan says {spec.sizes} strides {spec.strides} {spec.dtype}; this is a fault in fusegen",
                )

    def _launch(self, step: Step) -> Run:
        """The closure of one of our kernels, bound to the memory its outputs have."""
        op = registry.get(step.node.op.split(".")[1])
        kernel = next(k for k in op.kernels if k.name == step.binding.name and k.device == self.backend.device)
        args = tuple(substitute(v, _Registers(self)) for v in step.node.args.values())
        made = step.made()
        outs = tuple(self._planned(n, s) if step.binding.planned else self._own(s, step.phase) for n, s in made)
        launch = kernel.bind(outs, args)
        for at, v in enumerate(step.node.args.values()):
            if isinstance(v, Ref) and v.name in self.plan.program.weights:
                launch.keep(at)
        slots = [self.slot(name) for name, _ in made]
        moving = [
            (at, self.index[v.name])
            for at, v in enumerate(step.node.args.values())
            if isinstance(v, Ref) and v.name not in self.stable
        ]
        if step.binding.planned or step.phase == "constant":  # what runs once needs no copy of its outputs
            for slot, out in zip(slots, outs, strict=True):
                self.registers[slot] = out
            self.stable.update(name for name, _ in made)
            run = closures.launching(launch, moving, self.registers, self._dying(step))
        else:
            run = closures.copying(launch, moving, self.registers, slots, outs)
        run()
        return run

    def _planned(self, name: str, spec: Strided) -> Tensor:
        at = self.plan.layout.offsets[name]
        flat = self.arena[at : at + spec.nbytes].view(spec.dtype)
        return flat.as_strided(spec.sizes, spec.strides)

    def _own(self, spec: Strided, phase: str) -> Tensor:
        if phase != "constant":  # those are the session's, and outlive this capture
            self.nbytes += spec.nbytes
        return spec.empty(self.backend.device)

    def _dying(self, step: Step) -> tuple[int, ...]:
        """The registers of this phase's own values that are last used here; the arena's stay."""
        names = self._deaths.get(step.node.name, ())
        return tuple(self.index[n] for n in names if n not in self.stable and n in self.index)


class _Registers(Mapping[str, Any]):
    """The registers' values by name."""

    def __init__(self, capture: Capture):
        self.capture = capture

    def __getitem__(self, name: str) -> Any:
        return self.capture.registers[self.capture.slot(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.capture.index)

    def __len__(self) -> int:
        return len(self.capture.index)


class _Slots(_Registers):
    """The registers' places by name."""

    def __getitem__(self, name: str) -> At:
        return At(self.capture.slot(name))


def _deaths(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Node -> the values last used there that nobody outside its phase needs."""
    keep = plan.crossing | set(plan.program.outputs) | set(plan.program.inputs) | set(plan.program.weights)
    keep |= {v for names in state.versions(plan.program).values() for v in names}
    last: dict[str, str] = {}
    for step in plan.steps:
        last.update(dict.fromkeys([*step.node.outputs, *step.node.inputs()], step.node.name))
    out: dict[str, tuple[str, ...]] = {}
    for name, node in last.items():
        if name not in keep:
            out[node] = (*out.get(node, ()), name)
    return out
