"""A 3x3 convolution by Winograd's algorithm, where the plan finds a kernel that takes it.

As in :mod:`.upsample`, it is done once sizes and strides are known, and the filters, which depend on the weight alone,
are worked out once a session.  One in int8 of a nearest 2x upsampling reads what is upsampled; those of other dtypes
that module has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of
from fusegen.runtime.upsample import doubles

FEW = 16  # input channels below which the transforms cost what they save, in float32
RULE = "3x3 convolution by Winograd's algorithm"
RULE_INT8 = "3x3 int8 convolution by Winograd's algorithm"
_PLAIN: Mapping[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "activation": "none"}
# What a layer must be besides: a quantized one has no groups, and no multiplier.
_CONVOLUTIONS = {"runtime.conv2d": {**_PLAIN, "groups": 1, "multiplier": None}, "runtime.conv2d_int8": _PLAIN}
_QUANTIZE = "fusegen.quantize_uint8.default"


@dataclass(frozen=True)
class _Form:
    """Winograd's form of convolutions by weights of a dtype.

    ``filters``: the op that makes the weight's filters; ``few``: input channels below which the transforms cost what
    they save; ``given``: the node's arguments that the filters are made of, ``more``: what else their op is told.
    """

    rule: str
    op: str
    filters: str
    few: int
    given: tuple[str, ...] = ("weight",)
    more: tuple[tuple[str, Any], ...] = ()


# Larger tiles where products are of float32.  On a Zen 5 in bfloat16 16 channels took up to twice as long as oneDNN, 24
# 0.87 times; in int8 32 up to 1.6 times, 48 0.8 to 1.3 times, 64 0.2 (8 x 8 pixels) to 1.0 (64 x 64).
# Where filters of 36 points would take too much memory, they are made of taps in every call.
_FORMS = {
    torch.float32: (
        _Form(RULE, "winograd_conv2d", "winograd_filters", FEW, more=(("transposed", False),)),
        _Form(RULE, "winograd_conv2d", "winograd_taps", FEW),
    ),
    torch.bfloat16: (_Form(RULE, "winograd_conv2d", "conv_taps", 24, more=(("doubled", False),)),),
    torch.int8: (_Form(RULE_INT8, "winograd_conv2d_int8", "winograd_int8_filters", 64, ("weight", "scale")),),
}


def folded(
    program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None], unpacked: str | None = None
) -> Program:
    """The static ``program``, lowered and its strides known, with Winograd's form in the place of each convolution
    that a kernel takes.  ``declined(op, args)``: why none does, or None; ``unpacked``: why those of int8 stay anyway.
    """
    made = _Folding(program, declined, unpacked)
    nodes = [new for node in program.nodes for new in made.nodes_of(node)]
    if made.applied():
        program = replace(program, applied=(*program.applied, *made.applied()))
    if not any(made.counts.values()):
        return program
    return propagate(without_dead(replace(program, nodes=tuple(nodes)))[0])


def what_it_reads(node: Node, sources: Mapping[str, Node]) -> Ref | None:
    """What a convolution reads, of one in int8 what its codes were made of; None where that is not known."""
    given = node.args.get("input")
    source = sources.get(node.args["codes"].name) if "codes" in node.args else None
    if source is not None and source.op == _QUANTIZE:
        given = source.args["x"]
    return given if isinstance(given, Ref) else None


class _Folding:
    """Walks the nodes of a program; each convolution that can be is put in Winograd's form."""

    def __init__(self, program: Program, declined: Callable[..., str | None], unpacked: str | None):
        self.program, self.declined, self.unpacked = program, declined, unpacked
        self.names, self.made = Names.of(program), dict[str, dict[str, Ref]]()  # weight -> its filters
        self.sources = {o: n for n in program.nodes for o in n.outputs}
        self.counts, self.left = dict[str, int](), dict[str, list[str]]()

    def applied(self) -> tuple[Applied, ...]:
        """What was done, and what was left and why, by rule."""
        rules = dict.fromkeys((*self.counts, *self.left))
        return tuple(Applied(rule, self.counts.get(rule, 0), tuple(self.left.get(rule, ()))) for rule in rules)

    def nodes_of(self, node: Node) -> list[Node]:
        """The node, or what takes its place: its form, behind the filters where they are not made yet."""
        forms, x = self._forms(node), what_it_reads(node, self.sources)
        if not forms or x is None:
            return [node]
        outputs = int(self.program.weights[node.args["weight"].name].shape[0])
        doubled = forms[0].rule == RULE_INT8 and x.name in self.sources and doubles(self.sources[x.name], self.program)
        if doubled:
            x = self.sources[x.name].args["input"]
        tail = {"outputs": outputs, "bias": node.args["bias"], "residual": node.args["residual"], "doubled": doubled}
        reasons = [self._stays(node, form, x, tail) for form in forms]
        if None not in reasons:
            self.left.setdefault(forms[0].rule, []).append(f"{node.name}: {'; '.join(map(str, reasons))}")
            return [node]
        form = forms[reasons.index(None)]
        self.counts[form.rule] = self.counts.get(form.rule, 0) + 1
        weight, before = node.args["weight"].name, list[Node]()
        if weight not in self.made:
            given = {k: node.args[k] for k in form.given}
            parts = tuple(self.names.fresh(f"{weight}.winograd.{part}") for part in ("filters", "scale")[: len(given)])
            self.made[weight] = dict(zip(("filters", "scale"), map(Ref, parts), strict=False))
            before = [Node(parts[0], f"fusegen.{form.filters}.default", given | dict(form.more), parts)]
        return [*before, replace(node, op=f"fusegen.{form.op}.default", args={"x": x, **self.made[weight], **tail})]

    def _forms(self, node: Node) -> tuple[_Form, ...]:
        """The forms of a plain 3x3 convolution of enough channels by a weight of the program, the first the best."""
        plain = _CONVOLUTIONS.get(node.op)
        if plain is None or any(node.args[k] != v for k, v in plain.items()):
            return ()
        given = node.args["weight"]
        weight = self.program.weights.get(given.name) if isinstance(given, Ref) else None
        if weight is None or tuple(weight.shape[2:]) != (3, 3):
            return ()
        forms = _FORMS.get(weight.dtype, ())
        return tuple(f for f in forms if weight.shape[1] >= f.few and registry.get(f.op).kernels)

    def _stays(self, node: Node, form: _Form, x: Ref, tail: Mapping[str, Any]) -> str | None:
        """Why no kernel takes the node's form, or None."""
        if form.rule == RULE_INT8 and self.unpacked is not None:
            return self.unpacked
        made = registry.get(form.filters).allocate(*(self._meta(node.args[k]) for k in form.given))
        rest = (self._meta(v) if isinstance(v, Ref) else v for v in tail.values())
        return self.declined(registry.get(form.op), (self._meta(x), *made, *rest))

    def _meta(self, ref: Ref) -> Tensor:
        return spec_of(self.program, ref.name).meta()
