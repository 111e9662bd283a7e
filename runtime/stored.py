"""What a session packs of float32 weights for bfloat16 it packs of them as they are stored, not of a copy in bfloat16.

The copy would be written and read for this alone, and a filter of Winograd's algorithm rounded twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fusegen.runtime.derived import stored
from fusegen.runtime.program import Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate

# An op of weights alone that rounds them itself, and what else it is told then.
_PACKING: dict[str, dict[str, Any]] = {
    "fusegen.conv_taps.default": {},
    "fusegen.linear_panels.default": {"dtype": torch.bfloat16},
}


def folded(program: Program) -> Program:
    """The static ``program``, with weights as they are stored where an op that packs them reads them in bfloat16."""
    names, weights, nodes = Names.of(program), dict(program.weights), list[Node]()
    made: dict[str, Ref] = {}
    for node in program.nodes:
        refs = {k: v.name for k, v in node.args.items() if isinstance(v, Ref)} if node.op in _PACKING else {}
        found = {name: stored(weights[name]) if name in weights else None for name in refs.values()}
        if not found or not all(w is not None and w.dtype == torch.float32 for w in found.values()):
            nodes.append(node)
            continue
        for name, weight in found.items():
            if name not in made and weight is not None:
                made[name] = Ref(names.fresh(f"{name}.stored"))
                weights[made[name].name] = weight
        args = {**node.args, **{k: made[name] for k, name in refs.items()}, **_PACKING[node.op]}
        nodes.append(replace(node, args=args))
    if not made:
        return program
    return propagate(without_dead(replace(program, weights=weights, nodes=tuple(nodes)))[0])
