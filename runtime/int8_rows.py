"""1x1 convolutions in int8 as linear layers over the rows of their pixels, where the plan finds a kernel.

An image whose channels are innermost is rows of them.  ``linear_int8`` has a scale for each pixel where the convolution
has one for a sample, and no pass of its own that quantizes.  As in :mod:`.upsample`, this is done once sizes and
strides are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.many_rows import channels_last, view
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of
from fusegen.runtime.winograd import what_it_reads

# Measured on a Zen 5 against oneDNN with what quantizes for it, no residual: 48 channels of 64 x 64 pixels take 1.3
# times as long, 64 0.95 times, more 0.84 to 1.04; of 16 x 16 pixels 0.2 to 0.3 times up to 128 channels.
FEW = 64
RULE = "1x1 int8 convolutions as linear layers"
_CONV, _LINEAR = "runtime.conv2d_int8", "fusegen.linear_int8.default"
_PLAIN: Mapping[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None], reason: str | None) -> Program:
    """The static ``program``, lowered and its strides known, with ``linear_int8`` between views in the place of each
    1x1 convolution that a kernel takes.  ``declined(op, args)``: why none does, or None; ``reason``: why the backend
    leaves them all to its library.
    """
    sources = {o: n for n in program.nodes for o in n.outputs}
    names, left, nodes, count = Names.of(program), list[str](), list[Node](), 0
    for node in program.nodes:
        made: list[Node] | str | None = _rows(node, sources, program, names, declined, reason)
        if isinstance(made, list):
            count += 1
            nodes += made
            continue
        left += [f"{node.name}: {made}"] if made else []
        nodes.append(node)
    if count or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, count, tuple(left))))
    return propagate(without_dead(replace(program, nodes=tuple(nodes)))[0]) if count else program


def _rows(
    node: Node, sources: Mapping[str, Node], program: Program, names: Names, declined: Callable[..., str | None],
    reason: str | None,
) -> list[Node] | str | None:  # fmt: skip
    """What takes the place of a 1x1 convolution by a weight of the program, or why it stays; None for other nodes."""
    if node.op != _CONV or any(node.args[k] != v for k, v in _PLAIN.items()):
        return None
    x, weight = what_it_reads(node, sources), program.weights.get(node.args["weight"].name)
    if x is None or weight is None or tuple(weight.shape[2:]) != (1, 1) or min(weight.shape[:2]) < FEW:
        return None
    if reason is not None:
        return reason
    images = {"x": x} | ({"residual": node.args["residual"]} if node.args["residual"] is not None else {})
    given, before = {"bias": node.args["bias"], "residual": None, "activation": node.args["activation"]}, list[Node]()
    for what, ref in images.items():
        spec = spec_of(program, ref.name)
        if not channels_last(spec):
            return f"{what} is not channels-last"
        batch, channels, height, width = spec.sizes
        name = names.fresh(f"{node.name}.{what}_rows")
        before.append(view(name, ref.name, (batch * height * width, channels), (channels, 1), (name,)))
        given[what] = Ref(name)
    flat = names.fresh(f"{node.args['weight'].name}.rows")
    shape = tuple(weight.shape[:2])
    before.append(view(flat, node.args["weight"].name, shape, (shape[1], 1), (flat,)))
    args = {"x": given.pop("x"), "weight": Ref(flat), "scale": node.args["scale"], **given}
    metas = {v.name: torch.empty(v.args["size"], dtype=node.args["dtype"], device="meta") for v in before}
    metas[flat] = metas[flat].to(torch.int8)
    specs = (_meta(v, metas, program) for v in args.values())
    stays = declined(registry.get("linear_int8"), tuple(specs))
    if stays is not None:
        return stays
    product, out = names.fresh(f"{node.name}.product"), spec_of(program, node.outputs[0])
    made = Node(product, _LINEAR, args, (product,))
    return [*before, made, view(node.name, product, out.sizes, out.strides, node.outputs)]


def _meta(value: Any, metas: Mapping[str, torch.Tensor], program: Program) -> Any:
    if not isinstance(value, Ref):
        return value
    return metas[value.name] if value.name in metas else spec_of(program, value.name).meta()
