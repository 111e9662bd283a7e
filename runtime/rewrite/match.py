"""Finds patterns in a program and puts fused ops in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusegen.runtime.errors import GraphError
from fusegen.runtime.program import Applied, Node, Program, Ref, refs
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite.graph import overload, spec_of
from fusegen.runtime.rewrite.pattern import SWAPS, Half, Literal, Pattern, from_end, is_half
from fusegen.runtime.rewrite.patterns import spellings


@dataclass(frozen=True)
class Captured:
    """A tensor that a wildcard matched, as a spelling's ``call`` sees it.

    ``shape`` (sizes, or names of symbolic ones) and ``dtype`` are None where the graph does not say.
    """

    name: str
    shape: tuple[int | str, ...] | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class State:
    """What one attempt has bound so far: wildcards and literals by name, pattern nodes to program nodes by name."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)


class Matcher:
    """Matches patterns in one program.

    ``hidden``: casts that are there but do not count (name of the value -> the value it casts); matching looks through.
    """

    def __init__(self, program: Program, hidden: Mapping[str, str]):
        self.program, self.hidden = program, hidden
        self.made = {o: (n, i) for n in program.nodes for i, o in enumerate(n.outputs)}
        self.users: dict[str, set[str]] = {}
        for node in program.nodes:
            if not (node.outputs and node.outputs[0] in hidden):
                for name in node.inputs():
                    self.users.setdefault(self.resolve(name), set()).add(node.name)
        self.outputs = {self.resolve(o) for o in program.outputs}

    def resolve(self, name: str) -> str:
        """The value behind hidden casts."""
        while name in self.hidden:
            name = self.hidden[name]
        return name

    def match(self, pattern: Pattern, root: Node) -> State | None:
        """How ``pattern`` fits with its output at ``root``, or None.  All its inner values must be used inside only."""
        made = {o: (n, i) for n in pattern.nodes for i, o in enumerate(n.outputs)}
        wild = set(pattern.wildcards)
        state = self._solve(
            [(Ref(pattern.output), Ref(root.outputs[made[pattern.output][1]]), None)], State(), made, wild
        )
        return state if state is not None and self._closed(state, root) else None

    def _closed(self, state: State, root: Node) -> bool:
        inside = {n.name for n in state.nodes.values()}
        for node in state.nodes.values():
            if node is not root and any(
                o in self.outputs or not self.users.get(o, set()) <= inside for o in node.outputs
            ):
                return False
        return True

    def _solve(self, goals: list[Any], state: State, made: Mapping[str, Any], wild: set[str]) -> State | None:
        """Satisfy all goals, trying both orders of arguments that may change places."""
        goals = list(goals)
        while goals:
            want, have, place = goals.pop()
            if isinstance(want, Ref) and want.name not in wild:
                opened = self._open(want, have, state, made)
                if opened is None:
                    return None
                state, alternatives = opened
                if len(alternatives) > 1:
                    tried = (self._solve([*goals, *a], state, made, wild) for a in alternatives)
                    return next((t for t in tried if t is not None), None)
                goals += alternatives[0]
                continue
            bound = self._bind(want, have, state, place)
            if isinstance(bound, list):
                goals += bound
            elif bound is None:
                return None
            else:
                state = bound
        return state

    def _open(
        self, want: Ref, have: Any, state: State, made: Mapping[str, Any]
    ) -> tuple[State, list[list[Any]]] | None:
        """Pair a pattern's node with the node that makes ``have``; its arguments are goals, in each order."""
        if not isinstance(have, Ref) or self.resolve(have.name) not in self.made:
            return None
        (inner, index), (node, at) = made[want.name], self.made[self.resolve(have.name)]
        known = state.nodes.get(inner.name)
        if known is not None:
            return (state, [[]]) if known is node and index == at else None
        if inner.op != node.op or index != at:
            return None
        state = replace(state, nodes={**state.nodes, inner.name: node})
        rank = self._rank(node)
        plain = [(v, node.args.get(k), (node.op, k, rank)) for k, v in inner.args.items()]
        if node.op not in SWAPS or (node.args.get("alpha", 1) != 1):
            return state, [plain]
        a, b = SWAPS[node.op]
        order = {a: b, b: a}
        swapped = [(v, node.args.get(order.get(k, k)), (node.op, k, rank)) for k, v in inner.args.items()]
        return state, [plain, swapped]

    def _rank(self, node: Node) -> int | None:
        for name in node.inputs():
            spec = spec_of(self.program, name)
            return None if spec is None else len(spec.shape)
        return None

    def _bind(self, want: Any, have: Any, state: State, place: Any) -> State | list[Any] | None:
        """Fit one value: more goals, the state with it bound, or None."""
        if isinstance(want, Ref):
            have = Ref(self.resolve(have.name)) if isinstance(have, Ref) else None
            return None if have is None else _bound(state, want.name, have)
        if isinstance(want, Literal):
            return None if any(True for _ in refs(have)) else _bound(state, want.name, have)
        if isinstance(want, Half):
            return _bound(state, "(half)", have) if is_half(have) else None
        if isinstance(want, tuple):
            same = isinstance(have, tuple) and len(want) == len(have)
            return [(w, h, place) for w, h in zip(want, have, strict=True)] if same else None
        if place is not None:
            have = from_end(place[0], place[1], have, place[2])
        return state if _equal(want, have) else None


def _equal(want: Any, have: Any) -> bool:
    return bool(want == have) and isinstance(want, bool) == isinstance(have, bool) and not isinstance(have, Ref)


def _bound(state: State, name: str, value: Any) -> State | None:
    if name not in state.bound:
        return replace(state, bound={**state.bound, name: value})
    known = state.bound[name]
    return state if type(known) is type(value) and known == value else None


def replace_spellings(
    program: Program, patterns: tuple[Pattern, ...], hidden: Mapping[str, str] | None = None
) -> tuple[Program, tuple[Applied, ...]]:
    """Put fused ops in the place of the patterns found, the earlier pattern first, and say what was done.

    A node belongs to one match at most.  What a replaced root used is left for dead-code elimination.
    """
    matcher = Matcher(program, hidden or {})
    roots: dict[str, list[Node]] = {}
    for node in program.nodes:
        roots.setdefault(node.op, []).append(node)
    taken: set[str] = set()
    new: dict[str, Node] = {}
    rules: dict[str, tuple[int, list[str]]] = {}
    for pattern in (p for p in patterns if all(n.op in roots for n in p.nodes)):
        ending = next(n for n in pattern.nodes if pattern.output in n.outputs)
        for root in roots.get(ending.op, ()):
            state = matcher.match(pattern, root)
            if state is None or any(n.name in taken for n in state.nodes.values()):
                continue
            made = _fused(program, pattern, root, state)
            count, left = rules.get(pattern.rule, (0, []))
            if isinstance(made, str):
                left.append(f"{root.name}: {made}")
            else:
                new[root.name] = made
                taken |= {n.name for n in state.nodes.values()}
            rules[pattern.rule] = (count + (not isinstance(made, str)), left)
    applied = tuple(Applied(rule, count, tuple(left)) for rule, (count, left) in rules.items())
    if not new:
        return program, applied
    return program.with_nodes(tuple(new.get(n.name, n) for n in program.nodes)), applied


def _fused(program: Program, pattern: Pattern, root: Node, state: State) -> Node | str:
    """The node of the fused op, or the reason there is none."""
    spelling = next(s for s in spellings()[pattern.op] if s.name == pattern.spelling)
    captures = {k: _captured(program, v) for k, v in state.bound.items() if k != "(half)"}
    given = spelling.call(**captures)
    if isinstance(given, str):
        return given
    args = {k: Ref(v.name) if isinstance(v, Captured) else v for k, v in given.items()}
    try:
        return replace(root, op=pattern.op, args=complete(overload(pattern.op), args, root.name))
    except GraphError as error:
        raise GraphError(f"the spelling {pattern.spelling!r} of {pattern.op} is wrong: {error}") from None


def _captured(program: Program, value: Any) -> Any:
    if not isinstance(value, Ref):
        return value
    spec = spec_of(program, value.name)
    return Captured(value.name, spec.shape if spec else None, spec.dtype if spec else None)
