"""Linear layers of many rows, and 1x1 convolutions, as ops on a weight in panels, where the plan finds a kernel.

A library's product takes one epilogue, and a gated layer is two products; ``packed_gated_linear`` does it in one pass.
A row's bits are its own, so that a batch need not be cut into samples.  The panels depend on the weight alone: a
session makes them once.  As in :mod:`.upsample`, this is done once sizes and strides are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.derived import Weight
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import Strided, propagate, spec_of

# Measured on a Zen 5 against oneDNN on packed weights, in bfloat16: 1.02 to 1.5 times as fast, but for fewer rows than
# MANY on a weight of more than LARGE elements, whose reading is the time (0.74 to 1.0), and for few inputs or outputs
# (0.8).  In float32 on a Zen 3 from MANY rows on 0.95 to 1.27, a gated layer 1.3 to 1.5; 16 rows 0.77, 64 0.92.
FEW, MANY, LARGE, NARROW = 16, 128, 1 << 22, 64
DTYPES = (torch.float32, torch.bfloat16)
RULE = "products of many rows by packed weights"
LINEAR = ("aten.linear.default", "runtime.linear")
_CONV = "runtime.conv2d"
_VIEW = "aten.as_strided.default"
_PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
Declined = Callable[[Op, tuple[Any, ...]], str | None]


def folded(
    program: Program, declined: Declined, deterministic: bool, unpacked: Callable[[torch.dtype], str | None]
) -> Program:
    """The static ``program``, lowered and its strides known, with ``packed_linear`` or ``packed_gated_linear`` in the
    place of each layer of many rows, or of many a sample where the plan is ``deterministic``: then a sample's layer is
    the same in any batch.  ``declined(op, args)``: why no kernel takes them, or None; ``unpacked(dtype)``: why the
    backend leaves all those of a dtype to its library, or None.
    """
    if not registry.get("packed_linear").kernels:
        return program
    why = {dtype: unpacked(dtype) for dtype in DTYPES}
    folding = _Folding(program, declined, deterministic, [dtype for dtype in DTYPES if why[dtype] is None])
    stay = [dtype for n in program.nodes if (dtype := folding.many(n)) is not None and why[dtype] is not None]
    left = tuple(f"{stay.count(dtype)} layers: {why[dtype]}" for dtype in DTYPES if dtype in stay)
    if not any(folding.fits(n) for n in program.nodes):
        return replace(program, applied=(*program.applied, *((Applied(RULE, 0, left),) if left else ())))
    for node in program.nodes:
        folding.node(node)
    applied = Applied(RULE, folding.count, (*folding.left, *left))
    program = replace(program, nodes=tuple(folding.nodes), applied=(*program.applied, applied))
    return propagate(without_dead(program)[0]) if folding.count else program


class _Folding:
    """Walks the nodes in order and puts the op in the place of each layer that fits."""

    def __init__(self, program: Program, declined: Declined, deterministic: bool, dtypes: Sequence[torch.dtype]):
        self.program, self.declined, self.deterministic, self.dtypes = program, declined, deterministic, dtypes
        self.names, self.users = Names.of(program), program.users()
        self.by_output = {o: n for n in program.nodes for o in n.outputs}
        self.nodes: list[Node] = []
        self.gates = {g.name for n in program.nodes if self.fits(n) and (g := self._gate(n)) is not None}
        self.panels: dict[tuple[Any, Any], str] = {}  # weight and gate -> the value that is their panels
        self.count = 0
        self.left: list[str] = []

    def fits(self, node: Node) -> bool:
        """Whether it is a layer of many rows in a dtype that ours take."""
        return self.many(node) in self.dtypes

    def many(self, node: Node) -> torch.dtype | None:
        """The dtype of a layer of many rows by a weight of the program, all of it in one of DTYPES, else None."""
        weight = node.args["weight"] if node.op in (*LINEAR, _CONV) else None
        if not isinstance(weight, Ref) or weight.name not in self.program.weights:
            return None
        x, shape = self._spec(node.args["input"]), self.program.weights[weight.name].shape
        if node.op == _CONV and (shape[2:] != (1, 1) or any(node.args[k] != v for k, v in _PLAIN.items())):
            return None
        rows = math.prod(x.sizes) // max(1, shape[1]) // (x.sizes[0] if self.deterministic and len(x.sizes) > 1 else 1)
        alike = x.dtype == self.program.weights[weight.name].dtype and x.dtype in DTYPES
        enough = rows >= MANY or (x.dtype != torch.float32 and rows >= FEW and math.prod(shape) <= LARGE)
        return x.dtype if alike and enough and min(shape[:2]) >= NARROW else None

    def node(self, node: Node) -> None:
        """Keep the node, or the op in its place."""
        gate = self._gate(node) if self.fits(node) else None
        if not self.fits(node) or node.name in self.gates or (gate is None and node.args.get("multiplier") is not None):
            self.nodes.append(node)
            return
        made = self._gated(node, gate) if gate is not None else self._product(node)
        if isinstance(made, str):
            self.left.append(f"{node.name}: {made}")
            made = [node]
        else:
            self.count += 1
        self.nodes += made

    def _spec(self, ref: Ref) -> Strided:
        return spec_of(self.program, ref.name)

    def _gate(self, node: Node) -> Node | None:
        """The activated layer of the same input that ``node``'s product is multiplied by, and by nothing else."""
        multiplier = node.args.get("multiplier")
        gate = self.by_output.get(multiplier.name) if isinstance(multiplier, Ref) else None
        if gate is None or gate.op not in LINEAR or node.op not in LINEAR or not self.fits(gate):
            return None
        alone = self.users[gate.outputs[0]] == [node] and gate.outputs[0] not in self.program.outputs
        alike = gate.args["input"] == node.args["input"] and self._weight(gate).shape == self._weight(node).shape
        single = gate.args.get("residual") is None and gate.args.get("multiplier") is None
        return gate if alone and alike and single else None

    def _weight(self, node: Node) -> Weight:
        return self.program.weights[node.args["weight"].name]

    def _gated(self, node: Node, gate: Node) -> list[Node] | str:
        """Both layers in one, or why not; the gate's node is then dead."""
        activation = gate.args.get("activation", "none")
        given = {"bias": node.args["bias"], "gate_bias": gate.args["bias"], "activation": activation}
        return self._op("packed_gated_linear", node, self._spec(node.args["input"]).meta(), given, gate)

    def _product(self, node: Node) -> list[Node] | str:
        """The layer as one product, between views as rows where it is a convolution; or why not."""
        x, activation = node.args["input"], node.args.get("activation", "none")
        given = {"bias": node.args["bias"], "residual": node.args.get("residual"), "activation": activation}
        if node.op != _CONV:
            return self._op("packed_linear", node, self._spec(x).meta(), given)
        images = {"x": x} | ({"residual": given["residual"]} if given["residual"] is not None else {})
        views: list[Node] = []
        for name, ref in images.items():
            if not channels_last(self._spec(ref)):
                return f"{name} is not channels-last"
            views.append(self._rows(node, name, ref))
            given[name] = Ref(views[-1].name)
        dtype = self._spec(x).dtype
        rows = {v.name: torch.empty(v.args["size"], dtype=dtype, device="meta") for v in views}
        x_rows = given.pop("x")
        made = self._op("packed_linear", node, rows[x_rows.name], given, x=x_rows, metas=rows)
        if isinstance(made, str):
            return made
        product, out = self.names.fresh(f"{node.name}.product"), self._spec(Ref(node.outputs[0]))
        made[-1] = replace(made[-1], name=product, outputs=(product,))
        return [*views, *made, view(node.name, product, out.sizes, out.strides, node.outputs)]

    def _rows(self, node: Node, what: str, ref: Ref) -> Node:
        """A view of an image as rows of its channels."""
        batch, channels, height, width = self._spec(ref).sizes
        name = self.names.fresh(f"{node.name}.{what}_rows")
        return view(name, ref.name, (batch * height * width, channels), (channels, 1), (name,))

    def _op(
        self, name: str, node: Node, x_meta: Tensor, given: dict[str, Any], gate: Node | None = None,
        x: Ref | None = None, metas: Mapping[str, Tensor] | None = None,
    ) -> list[Node] | str:  # fmt: skip
        """The panels where nobody has made them yet, and the op of that name on ``x``; or why no kernel takes it."""
        weights = {"weight": node.args["weight"], "gate": None if gate is None else gate.args["weight"]}
        specs = [None if w is None else self._spec(w).meta() for w in weights.values()]
        of = torch.float32 if x_meta.dtype == torch.float32 else None
        (panels_meta,) = registry.get("linear_panels").allocate(*specs, of)
        outputs = self._weight(node).shape[0]
        rest = (self._meta(v, metas or {}) if isinstance(v, Ref) else v for v in given.values())
        reason = self.declined(registry.get(name), (x_meta, panels_meta, outputs, *rest))
        if reason is not None:
            return reason
        before = []
        if tuple(weights.values()) not in self.panels:
            panels = self.panels[tuple(weights.values())] = self.names.fresh(f"{node.args['weight'].name}.panels")
            before = [Node(panels, "fusegen.linear_panels.default", {**weights, "dtype": of}, (panels,))]
        found = Ref(self.panels[tuple(weights.values())])
        args = {"x": x or node.args["input"], "panels": found, "outputs": outputs, **given}
        return [*before, replace(node, op=f"fusegen.{name}.default", args=args)]

    def _meta(self, ref: Ref, metas: Mapping[str, Tensor]) -> Tensor:
        return metas[ref.name] if ref.name in metas else self._spec(ref).meta()


def channels_last(spec: Strided) -> bool:
    """Whether an image's pixels are rows of its channels, one after the other."""
    return spec.meta().is_contiguous(memory_format=torch.channels_last)


def view(name: str, of: str, size: tuple[int, ...], stride: tuple[int, ...], outputs: tuple[str, ...]) -> Node:
    """The node that views the value ``of`` so."""
    return Node(name, _VIEW, {"self": Ref(of), "size": size, "stride": stride, "storage_offset": None}, outputs)
