"""State: inputs of a program that its nodes write in place, such as a key-value cache, and the order this imposes.

A node that writes to arguments defines, behind what its operator returns, one more value for each of them: what that
memory holds from then on.  Later uses name the new value, so data flow alone says what comes before what, and every
rewrite may go by it.  Only inputs can be written: weights are shared, and may be mapped from a file.
"""

from __future__ import annotations

from fusegen.runtime.errors import GraphError
from fusegen.runtime.program import Node, Program, Ref
from fusegen.runtime.read.operators import written


def writes(node: Node) -> dict[str, str]:
    """Argument that the node writes -> the value that its memory holds from then on; in schema order."""
    names = written(node.op)
    return dict(zip(names, node.outputs[len(node.outputs) - len(names) :], strict=True)) if names else {}


def versions(program: Program) -> dict[str, tuple[str, ...]]:
    """Input that is written -> the values that lie in its memory, itself first, the last one what a run leaves."""
    found: dict[str, tuple[str, ...]] = {}
    home: dict[str, str] = {}
    for node in program.nodes:
        for argument, new in writes(node).items():
            old = node.args[argument].name
            home[new] = home.get(old, old)
            found[home[new]] = (*found.get(home[new], (home[new],)), new)
    return found


def check(program: Program) -> Program:
    """``program`` itself, if only inputs are written and none is used by an earlier name; else GraphError."""
    current, stale = set(program.inputs), set[str]()
    for node in program.nodes:
        where = f"{program.name}, node {node.name}"
        for name in node.inputs():
            if name in stale:
                raise GraphError(f"{node.op} uses {name!r}, which was written over before", where)
        for argument, new in writes(node).items():
            old = node.args[argument]
            if not isinstance(old, Ref) or old.name not in current:
                raise GraphError(f"{node.op} writes to {argument!r}, which is no input of the program", where)
            stale.add(old.name)
            current.add(new)
    for name in program.outputs:
        if name in stale:
            raise GraphError(f"the output {name!r} was written over", program.name)
    return program
