"""Quantization: a Program in, one whose large products are of int8 out.

The layers that do most of the work, linear layers over rows of tokens or pixels and convolutions of many channels,
become the ops ``linear_int8`` and ``conv2d_int8``: weights int8 with a float32 scale for each output channel, inputs
quantized as they come; attention over many keys becomes ``attention_int8``.  The first and last layers, whose errors
nothing averages out, have few channels; the embeddings of time have few rows: these stay as they are, as does what is
named in ``keep``.  What the result is worth, :mod:`.quality` measures.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fusegen.kernels.attention_int8 import MOST_DIM
from fusegen.kernels.conv2d_int8 import LONGEST
from fusegen.kernels.linear_int8 import quantize_int8, scale_int8
from fusegen.runtime.derived import Derived, release, value
from fusegen.runtime.errors import RequestError
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite import clean, linear
from fusegen.runtime.rewrite.graph import FLOATS, Names, rank, spec_of, without_dead

BITS = ("int8",)
NARROW = 32  # channels, of a layer's input and output, below which it stays
# ... of a convolution behind an upsampling, which other dtypes do in as few products: on a Zen 5 bfloat16 takes as long
# at 64 channels, 1.12 to 1.19 times as long at 96, 1.37 at 128.
FEW_UPSAMPLED = 96
RULE = "int8 weights"
MANY_KEYS = 128  # of attention, below which it stays: errors average out over keys, and text has few
ATTENTION = "aten.scaled_dot_product_attention.default"
OPS = {
    "fusegen.linear_int8.default": "linear layers", "fusegen.conv2d_int8.default": "convolutions",
    "fusegen.attention_int8.default": "attentions",
}  # fmt: skip


def quantize(program: Program, bits: str = "int8", keep: Collection[str] = ()) -> Program:
    """``program`` (floating-point, as exported) with int8 weights; what it was made of and what stayed is in
    ``applied``.  ``keep``: names of nodes, weights or modules that stay as they are.

    Raises :class:`RequestError` for other ``bits``, a name in ``keep`` that is none of the program's, a program that is
    quantized already, and a weight that holds an infinity or NaN, naming it.
    """
    if bits not in BITS:
        raise RequestError(f"{bits!r} is no kind of quantization", "quantize", f"use one of {', '.join(BITS)}")
    if any(n.op in OPS for n in program.nodes):
        raise RequestError("the program is quantized already", program.name, "quantize the one it was made from")
    for name in keep:
        if not known(program, name):
            raise RequestError(f"no layer or weight is called {name!r}", program.name, "fusegen plan shows the names")
    program = linear.as_linear(clean.canonical(program)[0])[0]
    made = _Quantizer(program, tuple(keep))
    for node in program.nodes:
        made.node(node)
    return made.finish()


def quantized(program: Program) -> dict[str, int]:
    """How many linear layers, convolutions and attentions of ``program`` are of int8; empty where none is."""
    found: dict[str, int] = {}
    for node in program.nodes:
        if node.op in OPS:
            found[OPS[node.op]] = found.get(OPS[node.op], 0) + 1
    return found


def described(program: Program) -> str:
    """``quantized`` in words, as a note of a plan; empty where nothing is."""
    found = quantized(program)
    stayed = sum(n.op in (*_LAYERS, ATTENTION) for n in program.nodes)
    *most, last = (f"{count} {what}" for what, count in found.items()) if found else ("",)
    counts = " and ".join((", ".join(most), last) if most else (last,))
    return f"{counts} multiply in int8, {stayed} stay" if found else ""


def known(program: Program, name: str) -> bool:
    """Whether ``name`` is that of a node or weight of ``program``, or of a module that weights are in."""
    return any(_named(k, name) for k in (*(n.name for n in program.nodes), *program.weights))


def _named(own: str, name: str) -> bool:
    return own == name or own.startswith(f"{name}.")


@dataclass
class _Quantizer:
    """Walks the nodes; each layer that can be is put as its int8 op."""

    program: Program
    keep: tuple[str, ...]
    nodes: list[Node] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    made: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)  # weight -> its codes and scales
    count: int = 0

    def __post_init__(self) -> None:
        self.names, self.weights = Names.of(self.program), dict(self.program.weights)
        self.sources = {o: n.op for n in self.program.nodes for o in n.outputs}

    def node(self, node: Node) -> None:
        """Keep the node, or its int8 form."""
        if node.op not in _LAYERS and node.op != ATTENTION:
            self.nodes.append(node)
            return
        why = self._attends(node) if node.op == ATTENTION else self._stays(node)
        if why:
            self.left.append(f"{node.name}: {why}")
            self.nodes.append(node)
            return
        self.count += 1
        if node.op == ATTENTION:
            names = {"q": "query", "k": "key", "v": "value", "scale": "scale"}
            args = {own: node.args[name] for own, name in names.items()}
            self.nodes.append(replace(node, op="fusegen.attention_int8.default", args=args))
            return
        codes, scale = self._codes(node.args["weight"].name)
        args = {"x": node.args["input"], "weight": codes, "scale": scale, "bias": node.args["bias"]}
        args |= {"residual": None, "activation": "none"}
        op, more = _LAYERS[node.op]
        self.nodes.append(replace(node, op=op, args=args | {k: node.args[k] for k in more}))

    def _stays(self, node: Node) -> str:
        """Why the layer stays as it is; empty where it does not."""
        weight = node.args["weight"]
        if not isinstance(weight, Ref) or weight.name not in self.weights:
            return "its weight is computed"
        found = self.weights[weight.name]
        if any(_named(own, name) for own in (node.name, weight.name) for name in self.keep):
            return "it was to be kept"
        if found.dtype not in FLOATS:
            return f"its weight is {found.dtype}"
        if node.args.get("groups", 1) != 1:
            return "its channels are in groups"
        if min(found.shape[:2]) < NARROW or math.prod(found.shape[1:]) > LONGEST:
            return f"it has {found.shape[1]} channels, and {found.shape[0]} behind it"
        if found.shape[1] < FEW_UPSAMPLED and self._upsampled(node):
            return f"it is one with the upsampling before it, and has {found.shape[1]} channels"
        lines = rank(self.program, node.args["input"])
        if node.op == linear.LINEAR and (lines is None or lines < 3):
            return "its rows are few: one a sample"
        return ""

    def _attends(self, node: Node) -> str:
        """Why attention stays as it is; empty where it does not."""
        if any(_named(node.name, name) for name in self.keep):
            return "it was to be kept"
        if node.args["attn_mask"] is not None or node.args["is_causal"] or node.args["dropout_p"]:
            return "it has a mask"
        q, k = (spec_of(self.program, node.args[name].name) for name in ("query", "key"))
        if q is None or k is None or not len(q.shape) == len(k.shape) == 4 or k.dtype not in FLOATS:
            return "it has no heads"
        keys, dim = k.shape[2:]
        if not isinstance(dim, int) or dim > MOST_DIM or (node.args["scale"] or 1.0) <= 0:
            return f"its heads are of {dim}, its scale {node.args['scale']}"
        if isinstance(keys, int) and keys < MANY_KEYS:
            return f"its keys are few: {keys}"
        return ""

    def _upsampled(self, node: Node) -> bool:
        """Whether the layer reads an upsampling, which the plan makes one with it."""
        before = self.sources.get(node.args["input"].name, "")
        return node.op != linear.LINEAR and before.startswith("aten.upsample_nearest2d.")

    def _codes(self, name: str) -> tuple[Ref, Ref]:
        """The weights of codes and scales of a weight, one for all its layers; codes are made when they are packed."""
        if name not in self.made:
            source = self.weights[name]
            codes, scale = Derived(codes_of_weight, source), scale_of_weight(name, value(source), self.program.name)
            release(source)
            refs = self.names.fresh(f"{name}.int8"), self.names.fresh(f"{name}.scale")
            self.weights |= dict(zip(refs, (codes, scale), strict=True))
            self.made[name] = Ref(refs[0]), Ref(refs[1])
        return self.made[name]

    def finish(self) -> Program:
        """The program; weights that nothing uses any more are gone."""
        done = Applied(RULE, self.count, tuple(self.left))
        program = replace(self.program, weights=self.weights, applied=(*self.program.applied, done))
        return without_dead(program.with_nodes(tuple(self.nodes)))[0]


# A layer's op -> its int8 op, and the arguments that it has besides.
_LAYERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    linear.LINEAR: ("fusegen.linear_int8.default", ()),
    "aten.conv2d.default": ("fusegen.conv2d_int8.default", ("stride", "padding", "dilation")),
}


def codes_of_weight(weight: Tensor) -> Tensor:
    """A weight (O, ...) as int8 codes of its shape, by its rows' largest magnitudes; of a meta tensor a meta tensor."""
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=torch.int8, device="meta")
    return quantize_int8(weight.detach().flatten(1))[0].view(weight.shape)


def scale_of_weight(name: str, weight: Tensor, where: str = "") -> Tensor:
    """What a weight's codes are multiplied by, float32 (O,); that of a row of zeros is 0.

    Raises :class:`RequestError` naming the weight where it is not finite.
    """
    try:
        return scale_int8(weight.detach().flatten(1))
    except ValueError as error:
        message = f"the weight {name!r} holds an infinity or NaN"
        raise RequestError(message, where, "get a model that is whole") from error
