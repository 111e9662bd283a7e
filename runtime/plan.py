"""The plan: what runs for each node, why, what it costs, and where its output lies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.runtime import (
    add_norm,
    attention_int8,
    conv_int8,
    direct_conv,
    direct_conv_int8,
    few_rows,
    int8_rows,
    join,
    many_rows,
    many_rows_int8,
    moments,
    state,
    stored,
    upsample,
    winograd,
    winograd_modulated,
)  # fmt: skip
from fusegen.runtime.backends.base import Backend, Binding
from fusegen.runtime.cost import cost
from fusegen.runtime.derived import meta
from fusegen.runtime.errors import GraphError
from fusegen.runtime.memory import Interval, Layout, lay_out
from fusegen.runtime.program import Applied, Node, Program, TensorSpec, substitute
from fusegen.runtime.rewrite.graph import overload
from fusegen.runtime.specialize import Strided, place, specialize

_Find = Callable[[registry.Op, tuple[Any, ...]], registry.Picked]
PHASES = ("constant", "fixed", "per_step", "step")


@dataclass(frozen=True)
class Step:
    """One node of the plan.

    ``phase``: ``"constant"`` (depends on weights alone: worked out once), ``"fixed"`` (on inputs that stay the same
    over a trajectory: once for each one), ``"per_step"`` (also on inputs known ahead for every step), ``"step"`` (the
    rest).
    ``outputs``: the specs; ``bytes`` and ``flops``: the least it must do; ``depends``: the inputs it depends on.
    """

    node: Node
    binding: Binding
    phase: str
    depends: tuple[str, ...]
    outputs: tuple[Strided, ...]
    bytes: int
    flops: int

    def made(self) -> list[tuple[str, Strided]]:
        """The outputs but for those that are an argument, written in place."""
        written = state.writes(self.node).values()
        both = zip(self.node.outputs, self.outputs, strict=False)
        return [(name, spec) for name, spec in both if name not in written]


@dataclass(frozen=True)
class Plan:
    """A static program with every node bound.

    ``buffers``: value -> offset in the arena of ``layout.peak`` bytes; ``crossing``: values that one phase leaves to a
    later one; ``applied``: the rewrites behind the program, with their counts; ``notes``: choices made for the caller.
    """

    program: Program
    backend: str
    device: str
    deterministic: bool
    steps: tuple[Step, ...]
    layout: Layout
    crossing: frozenset[str]
    notes: tuple[str, ...] = ()

    @property
    def applied(self) -> tuple[Applied, ...]:
        """The rewrites behind the program."""
        return self.program.applied

    def counts(self) -> dict[str, int]:
        """How many nodes are bound to each kernel or routine, most frequent first; views are one row."""
        out: dict[str, int] = {}
        for step in self.steps:
            key = "view" if step.binding.how == "view" else f"{step.binding.how} {step.binding.name}"
            out[key] = out.get(key, 0) + 1
        return dict(sorted(out.items(), key=lambda kv: (-kv[1], kv[0])))

    def __str__(self) -> str:
        from fusegen.runtime.describe import text

        return text(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        from fusegen.runtime.describe import document

        return document(self)


def plan(
    program: Program,
    given: Mapping[str, TensorSpec],
    backend: Backend,
    deterministic: bool = False,
    fixed: Sequence[str] = (),
    per_step: Sequence[str] = (),
    notes: tuple[str, ...] = (),
    without: Collection[str] = (),
) -> Plan:
    """Bind every node of ``program`` for inputs of the specs ``given``.

    ``fixed`` and ``per_step`` name inputs of a trajectory; ``without``: ops whose kernels are left alone.  Raises
    :class:`RequestError` if the inputs do not fit and :class:`GraphError` naming a node that cannot run, or cannot be
    made deterministic where that is asked.
    """
    find = partial(_find, backend, without)
    static = _lowered(
        specialize(state.check(program), given), backend, partial(_declined, find, deterministic), deterministic
    )
    metas = metas_of(static)
    depends = _dependence(static)
    steps = []
    for node in static.nodes:
        inputs = depends[node.outputs[0]]
        phase = _phase(inputs, set(fixed), set(per_step))
        steps.append(_step(node, static, metas, backend, find, deterministic, phase, inputs))
    steps.sort(key=lambda s: PHASES.index(s.phase))  # stable: within a phase the order of the graph stays
    crossing = _crossing(steps, static)
    steps = [_unplan(s) if s.phase == "constant" or crossing.intersection(s.node.outputs) else s for s in steps]
    layout = lay_out(_intervals(steps, static))
    return Plan(static, backend.name, backend.device, deterministic, tuple(steps), layout, frozenset(crossing), notes)


def metas_of(static: Program) -> dict[str, Tensor]:
    """Every value of a static program as a meta tensor."""
    metas = {name: spec.meta() for name, spec in {**static.inputs, **static.specs}.items() if isinstance(spec, Strided)}
    return metas | {name: meta(weight) for name, weight in static.weights.items()}


def _lowered(program: Program, backend: Backend, declined: Callable[..., str | None], deterministic: bool) -> Program:
    """The static ``program`` in the backend's own forms, with our kernels' forms in the place of what they take."""
    if not backend.fuses:
        return backend.lower(program)
    static = backend.lower(conv_int8.settled(program, backend.no_int8_convolutions()))
    static = attention_int8.settled(static, declined, backend.unserved_int8_attention)
    static = direct_conv_int8.folded(static, declined, backend.unpacked_convolutions())
    static = upsample.folded(static, declined, backend.unpacked_convolutions())
    static = winograd.folded(static, declined, backend.unserved_int8())
    static = direct_conv.folded(static, declined, backend.unpacked_convolutions())
    static = int8_rows.folded(static, declined, backend.unserved_int8_rows())
    static = many_rows_int8.folded(static, declined, deterministic, backend.unpacked_int8())
    for rule in (winograd_modulated, join, moments, add_norm):
        static = rule.folded(static, declined)
    if backend.few_rows:
        static = few_rows.folded(static, declined, deterministic, backend.few_rows)
        static = many_rows.folded(static, declined, deterministic, backend.unpacked)
    return stored.folded(static)


def _dependence(program: Program) -> dict[str, tuple[str, ...]]:
    """Value -> the inputs it depends on, in call order."""
    order = {name: i for i, name in enumerate(program.inputs)}
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in program.inputs}
    found |= dict.fromkeys(program.weights, ())
    for node in program.nodes:
        union = {i for name in node.inputs() for i in found[name]}
        found |= dict.fromkeys(node.outputs, tuple(sorted(union, key=order.__getitem__)))
    return found


def _phase(inputs: Sequence[str], fixed: set[str], per_step: set[str]) -> str:
    if not inputs:
        return "constant"
    if fixed.issuperset(inputs):
        return "fixed"
    return "per_step" if (fixed | per_step).issuperset(inputs) else "step"


def _step(
    node: Node,
    program: Program,
    metas: Mapping[str, Tensor],
    backend: Backend,
    find: _Find,
    deterministic: bool,
    phase: str,
    depends: tuple[str, ...],
) -> Step:
    values = {k: substitute(v, metas) for k, v in node.args.items()}
    specs = tuple(program.specs[o] for o in node.outputs if o in program.specs)
    outs = tuple(s for s in specs if isinstance(s, Strided))
    if outs and all(o.alias for o in outs) and not state.writes(node):
        return Step(node, Binding("view", node.op), phase, depends, outs, 0, 0)
    if node.op.startswith("fusegen."):
        op = registry.get(node.op.split(".")[1])
        binding, least = _pick(op, node, values, backend, find, deterministic), op.cost(*values.values())
    else:
        _refuse_random(node)
        binding, least = (
            backend.bind(node, program, values, deterministic),
            cost(node, values, [o.meta() for o in outs]),
        )
    if deterministic and not binding.invariant:
        raise GraphError(
            f"{binding.name} may give a sample other bits in another batch",
            where=place(node),
            mend="pass deterministic=False",
        )
    return Step(node, binding, phase, depends, outs, least.bytes, least.flops)


def _find(backend: Backend, without: Collection[str], op: registry.Op, args: tuple[Any, ...]) -> registry.Picked:
    """The kernel for these arguments, unless the op's kernels are to be left alone."""
    if op.name in without:
        return registry.Picked(None, (registry.Declined(op.name, "it was asked to do without"),))
    return registry.pick(op, backend.device, args)


def _pick(
    op: registry.Op, node: Node, values: Mapping[str, Any], backend: Backend, find: _Find, deterministic: bool
) -> Binding:
    """Bind a fused op to the kernel that takes it, or to the reference."""
    picked = find(op, tuple(values.values()))
    if picked.kernel is not None:
        return Binding("kernel", picked.kernel.name, picked.declined, planned=backend.plans)
    return backend.hold(Binding("reference", f"{op.name} reference", picked.declined), node.op, values, deterministic)


def _declined(find: _Find, deterministic: bool, op: registry.Op, args: tuple[Any, ...]) -> str | None:
    """Why no kernel takes the op on these arguments, or None where one does; a deterministic plan asks for a sample, so
    that a batch is given the forms that its samples have."""
    picked = find(op, op.alone(args, 0) if deterministic and op.alone is not None else args)
    return None if picked.kernel else "; ".join(f"{d.kernel}: {d.reason}" for d in picked.declined) or "no kernel"


def _refuse_random(node: Node) -> None:
    if node.op.startswith("aten.") and torch.Tag.nondeterministic_seeded in overload(node.op).tags:
        off = node.args.get("dropout_p", node.args.get("p", 1.0)) == 0 or node.args.get("train") is False
        if not off:
            raise GraphError(
                f"{node.op} draws random numbers",
                where=place(node),
                mend="export the model in eval mode, noise as an input",
            )


def _unplan(step: Step) -> Step:
    return replace(step, binding=replace(step.binding, planned=False))


def roots(program: Program) -> dict[str, str]:
    """Value -> the value whose memory it lies in: itself, unless it is a view."""
    found = {name: name for name in [*program.inputs, *program.weights]}
    for node in program.nodes:
        for name in node.outputs:
            spec = program.specs.get(name)
            alias = spec.alias if isinstance(spec, Strided) else None
            found[name] = found[alias] if alias else name
    return found


def _crossing(steps: Sequence[Step], program: Program) -> set[str]:
    """Values made in one phase and used in a later one, and those whose memory they lie in."""
    made = {o: s.phase for s in steps for o in s.node.outputs}
    used = {n for s in steps for n in s.node.inputs() if made.get(n, s.phase) != s.phase}
    used |= {o for o in program.outputs if made.get(o, "step") != "step"}
    root = roots(program)
    return used | {root[n] for n in used if root[n] in made}


def _intervals(steps: Sequence[Step], program: Program) -> list[Interval]:
    root = roots(program)
    last: dict[str, int] = {}
    start: dict[str, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        for name in step.node.inputs():
            last[root[name]] = index
        if step.binding.planned:
            start |= {o: (index, spec.nbytes) for o, spec in step.made()}
    last |= {root[o]: len(steps) for o in program.outputs}
    return [Interval(name, nbytes, at, last.get(name, at)) for name, (at, nbytes) in start.items()]
