"""Linear layers of many rows in int8 as ops on a weight in panels, where the plan finds a kernel.

``packed_linear_int8`` gives the bits of ``linear_int8``; a layer whose two halves are gate and value and what gates
them are one ``packed_gated_linear_int8``.  A session packs each weight once, in the place of the weight.  As in
:mod:`.upsample`, this is done once sizes and strides are known.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.linear_int8 import ACTIVATIONS
from fusegen.runtime.derived import meta, viewed
from fusegen.runtime.many_rows import Declined
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of

# It is faster from some four rows on (Emerald Rapids).  But up to as many as a prompt's chunk has a weight may serve
# single rows too, which take it as it lies, and would be held twice.
MANY = 65
RULE = "int8 products of many rows by packed weights"
_LINEAR, _GATE, _VIEW = "fusegen.linear_int8.default", "fusegen.gated_mlp_act.default", "aten.as_strided.default"
_CONSTANT = ("scale", "bias")


def folded(program: Program, declined: Declined, deterministic: bool, reason: str | None) -> Program:
    """The static ``program``, lowered and its strides known, with ``packed_linear_int8`` or
    ``packed_gated_linear_int8`` in the place of each ``linear_int8`` of many rows; the gated ones, which round once
    less, of many a sample where the plan is ``deterministic``.  ``declined(op, args)``: why no kernel takes them, or
    None; ``reason``: why the backend leaves them all as they are.
    """
    folding = _Folding(program, declined, deterministic)
    fit = [n for n in program.nodes if folding.fits(n)]
    if not fit or reason is not None:
        left = (Applied(RULE, 0, (f"{len(fit)} layers: {reason}",)),) if fit else ()
        return replace(program, applied=(*program.applied, *left))
    for node in program.nodes:
        folding.node(node)
    applied = Applied(RULE, folding.count, tuple(folding.left))
    made = replace(program, nodes=tuple(folding.nodes), weights=folding.weights, applied=(*program.applied, applied))
    return propagate(without_dead(made)[0]) if folding.count else replace(program, applied=made.applied)


class _Folding:
    """Walks the nodes in order and puts the op in the place of each layer that fits."""

    def __init__(self, program: Program, declined: Declined, deterministic: bool):
        self.program, self.declined, self.deterministic = program, declined, deterministic
        self.names, self.users, self.weights = Names.of(program), program.users(), dict(program.weights)
        self.by_output = {o: n for n in program.nodes for o in n.outputs}
        self.nodes: list[Node] = []
        self.gated = {layer.name for n in program.nodes if (layer := self._gated_layer(n)) is not None}
        self.panels: dict[tuple[str, ...], Ref] = {}  # weight, or its value and gate -> their panels
        self.halves: dict[str, list[Ref]] = {}  # weight -> those of its rows
        self.count = 0
        self.left: list[str] = []

    def fits(self, node: Node) -> bool:
        """Whether it is a layer of many rows by a weight of the program."""
        return node.op == _LINEAR and self._weight(node) is not None and math.prod(self._rows(node)) >= MANY

    def _rows(self, layer: Node) -> tuple[int, ...]:
        return spec_of(self.program, layer.args["x"].name).sizes[:-1]

    def _weight(self, node: Node) -> str | None:
        """The weight that a layer reads, be it as a view of a 1x1 convolution's."""
        name = node.args["weight"].name
        source = self.by_output.get(name)
        if source is not None and source.op == _VIEW:
            name = source.args["self"].name
            whole = name in self.weights and tuple(self.weights[name].shape) == (*source.args["size"], 1, 1)
            return name if whole else None
        return name if name in self.weights else None

    def node(self, node: Node) -> None:
        """Keep the node, or the op in its place; a layer that is gated goes with what gates it."""
        layer = self._gated_layer(node)
        if layer is None and (not self.fits(node) or node.name in self.gated):
            self.nodes.append(node)
            return
        made = self._product(node) if layer is None else self._gated(node, layer)
        if isinstance(made, str):
            self.left.append(f"{node.name}: {made}")
        else:
            self.count += 1
        self.nodes += [node] if isinstance(made, str) else made

    def _gated_layer(self, node: Node) -> Node | None:
        """The layer whose halves ``node`` alone reads, as gate and value."""
        layer = self.by_output.get(node.args["x"].name) if node.op == _GATE and node.args["up"] is None else None
        if layer is None or node.args["activation"] not in ACTIVATIONS or not self.fits(layer):
            return None
        alone = self.users[layer.outputs[0]] == [node] and layer.outputs[0] not in self.program.outputs
        given = [layer.args[k].name for k in _CONSTANT if layer.args[k] is not None]
        bare = layer.args["residual"] is None and layer.args["activation"] == "none"
        enough = not self.deterministic or math.prod(self._rows(layer)[1:]) >= MANY
        return layer if alone and bare and enough and all(name in self.weights for name in given) else None

    def _product(self, node: Node) -> list[Node] | str:
        weight = self._weight(node)
        assert weight is not None
        args = {k: v for k, v in node.args.items() if k != "weight"}
        return self._op("packed_linear_int8", node, args, {"weight": Ref(weight), "gate": None})

    def _gated(self, node: Node, layer: Node) -> list[Node] | str:
        """The layer and what gates it in one; the layer's node is then dead."""
        weight = self._weight(layer)
        assert weight is not None
        order = ("gate", "value") if node.args["gate_first"] else ("value", "gate")
        codes = dict(zip(order, self._halves(weight), strict=True))
        scale = dict(zip(order, self._halves(layer.args["scale"].name), strict=True))
        bias: dict[str, Ref | None] = {"gate": None, "value": None}
        if layer.args["bias"] is not None:
            bias = dict(zip(order, self._halves(layer.args["bias"].name), strict=True))
        args = {"x": layer.args["x"], "scale": scale["value"], "gate_scale": scale["gate"]}
        args |= {"bias": bias["value"], "gate_bias": bias["gate"], "activation": node.args["activation"]}
        return self._op("packed_gated_linear_int8", node, args, {"weight": codes["value"], "gate": codes["gate"]})

    def _halves(self, name: str) -> list[Ref]:
        """The two halves of a weight's rows, as weights of their own."""
        if name not in self.halves:
            weight, half = self.weights[name], self.weights[name].shape[0] // 2
            self.halves[name] = [Ref(self.names.fresh(f"{name}.{part}")) for part in ("first_half", "second_half")]
            for at, ref in zip((0, half), self.halves[name], strict=True):
                self.weights[ref.name] = viewed(partial(_part, at=at, count=half), weight)
        return self.halves[name]

    def _op(self, name: str, node: Node, args: dict[str, Any], weights: dict[str, Ref | None]) -> list[Node] | str:
        """The panels where nobody has made them yet, and the op of that name; or why no kernel takes it."""
        metas = [None if ref is None else meta(self.weights[ref.name]) for ref in weights.values()]
        (panels,) = registry.get("linear_panels").allocate(*metas)
        assert metas[0] is not None
        key, outputs = tuple(r.name for r in weights.values() if r is not None), metas[0].shape[0]
        before, found = list[Node](), self.panels.get(key)
        if found is None:
            found = Ref(self.names.fresh(f"{key[0]}.panels"))
            before = [Node(found.name, "fusegen.linear_panels.default", {**weights, "dtype": None}, (found.name,))]
        given: dict[str, Any] = {"x": args.pop("x"), "panels": found}
        scales = [k for k in args if k.endswith("scale")]
        given |= {k: args.pop(k) for k in scales} | {"outputs": outputs} | args
        reason = self.declined(registry.get(name), tuple(self._meta(v, found, panels) for v in given.values()))
        if reason is not None:
            return reason
        self.panels[key] = found
        return [*before, replace(node, op=f"fusegen.{name}.default", args=given)]

    def _meta(self, value: Any, panels: Ref, packed: Any) -> Any:
        if not isinstance(value, Ref):
            return value
        if value == panels:
            return packed
        found = self.weights.get(value.name)
        return meta(found) if found is not None else spec_of(self.program, value.name).meta()


def _part(weight: Tensor, at: int, count: int) -> Tensor:
    return weight.narrow(0, at, count)
