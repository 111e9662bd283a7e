"""The patterns of all spellings, from a file that is traced ahead of time.

Tracing costs about a second in imports, so ``patterns.json`` ships beside this module, each op's part keyed by a digest
of its spellings' source; an op that is not in the file, or has changed since, is traced when first needed.  After a
change to spellings::

    python -m fusegen.runtime.rewrite.trace
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusegen.kernels import op as registry
from fusegen.kernels.op import Spelling
from fusegen.runtime.errors import GraphError
from fusegen.runtime.program import Node
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite import pattern as form
from fusegen.runtime.rewrite.graph import overload
from fusegen.runtime.rewrite.pattern import Pattern
from fusegen.runtime.rewrite.spellings import ATEN

FILE = Path(__file__).with_name("patterns.json")


def spellings() -> dict[str, Sequence[Spelling]]:
    """The op of a node -> the spellings it replaces: those of every registered op, then ATen's."""
    own = {f"fusegen.{name}.default": op.spellings for name, op in sorted(registry.ops().items()) if op.spellings}
    return {**own, **ATEN}


def digest(op: str, given: Sequence[Spelling]) -> str:
    """A digest of the source of an op's spellings; empty where there is no source to read."""
    parts = [op]
    try:
        for spelling in given:
            parts += [spelling.name, inspect.getsource(spelling.eager), inspect.getsource(spelling.inputs)]
    except (OSError, TypeError):
        return ""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@functools.cache
def load() -> tuple[Pattern, ...]:
    """Every op's patterns: larger ones first, then in the order of ops and of their spellings."""
    shipped = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    found: list[Pattern] = []
    for op, given in spellings().items():
        entry = shipped.get(op)
        if entry is not None and entry["digest"] and entry["digest"] == digest(op, given):
            found += [form.from_json(op, p) for p in entry["patterns"]]
        else:
            from fusegen.runtime.rewrite.trace import trace_op  # a second of imports, so only when needed

            found += trace_op(op, given)
    known = [p for p in map(_completed, found) if p is not None]
    return tuple(sorted(known, key=lambda p: -len(p.nodes)))


def _completed(pattern: Pattern) -> Pattern | None:
    """The pattern with its operators' defaults filled in by this PyTorch; the file holds only what differs.

    None where this PyTorch lacks an operator or argument of it: no graph it reads has them either.
    """
    try:
        nodes = tuple(Node(n.name, n.op, _complete(n), n.outputs) for n in pattern.nodes)
    except GraphError:
        return None
    return Pattern(pattern.op, pattern.spelling, pattern.half, pattern.wildcards, nodes, pattern.output)


def _complete(node: Node) -> Mapping[str, Any]:
    args = complete(overload(node.op), node.args, node.name)
    return {k: v for k, v in args.items() if (node.op, k) not in form.IGNORED}
