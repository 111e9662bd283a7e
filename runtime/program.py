"""The Program: an exported graph as plain data.

A program is a list of nodes in execution order over named values.  Every reader makes one, every rewrite takes one and
returns another, and nothing in it can run code.  Arguments are stored by the names of the operator's schema with all
defaults filled in, so that two graphs that mean the same look the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fusegen.runtime.errors import GraphError

if TYPE_CHECKING:
    from fusegen.runtime.derived import Weight


@dataclass(frozen=True)
class Ref:
    """A use of a value (a node's output, an input or a weight) by name."""

    name: str


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor.

    A dimension is an integer, the name of a symbol in ``Program.symbols``, or an integer expression of such symbols
    (``"2*s0"``), which :func:`fusegen.runtime.symbols.evaluate` evaluates.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Node:
    """One call.

    ``op``: ``"aten.conv2d.default"``, ``"fusegen.group_norm.default"``, or ``"sym.mul"`` … for integer arithmetic
    on symbolic sizes.  ``args``: schema argument name -> value; a value is a :class:`Ref`, a plain Python scalar or
    string, None, a ``torch.dtype`` / ``device`` / ``layout`` / ``memory_format``, or a tuple of such.  ``outputs``: the
    names it defines, one per output; what an op returns in lists is flattened, in order; behind them, one for each
    argument that the op writes in place (``runtime/state.py``).  ``source``: the module path it came from.
    """

    name: str
    op: str
    args: Mapping[str, Any]
    outputs: tuple[str, ...]
    source: str = ""

    def inputs(self) -> Iterator[str]:
        """The names of the values this node uses, in argument order, with repeats."""
        for value in self.args.values():
            yield from refs(value)


@dataclass(frozen=True)
class Applied:
    """What one rewrite did: how often it applied, and why each other match was left (one line each)."""

    rule: str
    count: int
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A graph with its weights.

    ``inputs``: name -> spec, in call order.  ``outputs``: names of values, in return order.  ``weights``: name ->
    tensor (parameters, buffers and constants; possibly mapped from a file: never write to one), or how it is made of
    others when it is needed.  ``symbols``: name of a dynamic size -> (smallest, largest allowed).  ``specs``: what is
    known of every other value's shape.  ``applied``: the rewrites behind it, in order.  ``guards``: expressions of
    symbols that the exporter took to be true (``"height % 8 == 0"``); for sizes that break one, the graph may mean
    something else.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: Mapping[str, TensorSpec]
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    symbols: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    applied: tuple[Applied, ...] = ()
    guards: tuple[str, ...] = ()

    def users(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that use it (once each)."""
        out: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs()):
                out.setdefault(name, []).append(node)
        return out

    def counts(self) -> dict[str, int]:
        """How often each op stands in the graph, most frequent first."""
        out: dict[str, int] = {}
        for node in self.nodes:
            out[node.op] = out.get(node.op, 0) + 1
        return dict(sorted(out.items(), key=lambda kv: (-kv[1], kv[0])))

    def with_nodes(self, nodes: tuple[Node, ...]) -> Program:
        """The same program with other nodes; values that no longer exist lose their spec."""
        made = {o for n in nodes for o in n.outputs}
        return replace(self, nodes=nodes, specs={k: v for k, v in self.specs.items() if k in made})


def check(program: Program) -> Program:
    """``program`` itself, if every name is defined once and before its first use; else :class:`GraphError`."""
    known: set[str] = set()

    def define(name: str) -> None:
        if not name or name in known:
            raise GraphError(
                f"the name {name!r} is defined twice" if name else "a value has no name", where=program.name
            )
        known.add(name)

    for name in (*program.inputs, *program.weights):
        define(name)
    for node in program.nodes:
        for name in node.inputs():
            if name not in known:
                raise GraphError(
                    f"{node.op} uses {name!r}, which nothing before it makes", where=f"{program.name}, {node.name}"
                )
        for name in node.outputs:
            define(name)
    for name in program.outputs:
        if name not in known:
            raise GraphError(f"the output {name!r} is made by nothing", where=program.name)
    if len({n.name for n in program.nodes}) != len(program.nodes):
        raise GraphError("two nodes have one name", where=program.name)
    return program


def refs(value: Any) -> Iterator[str]:
    """The names used in an argument value."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs(item)


def substitute(value: Any, table: Mapping[str, Any]) -> Any:
    """``value`` with every :class:`Ref` whose name is in ``table`` replaced by what stands there."""
    if isinstance(value, Ref):
        return table.get(value.name, value)
    if isinstance(value, tuple):
        return tuple(substitute(v, table) for v in value)
    return value
