"""What int8 costs layer by layer: each one's own error, its input being the one of the float32 program.

A probe does it in one evaluation: the program as it is, and beside every layer its int8 form on the same input, with
the norms of their difference and of the layer's output as the program's only outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.program import Node, Program, Ref, TensorSpec
from fusegen.runtime.quantize import OPS, quantize
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite import clean, linear
from fusegen.runtime.rewrite.graph import Names, overload, spec_of, without_dead

_SUB, _NORM = "aten.sub.Tensor", "aten.linalg_vector_norm.default"


def errors(
    program: Program, inputs: Mapping[str, Tensor], bits: str = "int8", keep: Collection[str] = ()
) -> dict[str, float]:
    """Layer -> the relative root mean square error of its output in int8 on these ``inputs``, the largest first.

    Each runs as this machine runs it: where that has no int8 products for a convolution, its error is that of the
    weight's codes alone.  The layers are those that :func:`~fusegen.runtime.quantize.quantize` makes int8; it raises
    what that raises.
    """
    probing, layers = _probe(program, quantize(program, bits, keep))
    if not layers:
        return {}
    values = compile_program(probing, "cpu", torch.float32)(**inputs)
    norms = [float(v) for v in values]
    found = {name: norms[2 * i] / max(norms[2 * i + 1], 1e-30) for i, name in enumerate(layers)}
    return dict(sorted(found.items(), key=lambda kv: -kv[1]))


def _probe(program: Program, made: Program) -> tuple[Program, list[str]]:
    """The probe, and the names of its layers in the order of its outputs, two each."""
    before = linear.as_linear(clean.canonical(program)[0])[0]
    int8 = {n.name: n for n in made.nodes if n.op in OPS}
    names, nodes, layers, outputs = Names.of(before), list[Node](), list[str](), list[str]()
    specs = dict(before.specs)
    for node in before.nodes:
        nodes.append(node)
        if node.name not in int8:
            continue
        layers.append(node.name)
        (own,) = node.outputs
        other, difference = names.fresh(f"{own}.in_int8"), names.fresh(f"{own}.difference")
        spec = spec_of(before, own)
        specs |= {name: spec for name in (other, difference) if spec is not None}
        nodes.append(replace(int8[node.name], name=other, outputs=(other,)))
        given = {"self": Ref(other), "other": Ref(own)}
        nodes.append(Node(difference, _SUB, complete(overload(_SUB), given, difference), (difference,)))
        for value in (difference, own):
            norm = names.fresh(f"{value}.norm")
            nodes.append(Node(norm, _NORM, complete(overload(_NORM), {"self": Ref(value)}, norm), (norm,)))
            specs[norm] = TensorSpec((), torch.float32)
            outputs.append(norm)
    weights = {**made.weights, **before.weights}
    probe = replace(before, weights=weights, specs=specs, outputs=tuple(outputs)).with_nodes(tuple(nodes))
    return without_dead(probe)[0], layers
