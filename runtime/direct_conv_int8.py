"""3x3 convolutions in int8 by taps that a session packs, also behind a nearest 2x upsampling, where the plan finds a
kernel.

Where a CPU multiplies tiles of int8 :mod:`.winograd`, which has fewer products, would spend more on its transforms.
The codes are those of the two nodes that the op stands for, made by its kernel as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.direct_conv import FEW
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of
from fusegen.runtime.upsample import doubles
from fusegen.runtime.winograd import what_it_reads

RULE = "3x3 int8 convolution by packed taps"
_PLAIN: Mapping[str, Any] = {"padding": (1, 1), "dilation": (1, 1), "activation": "none"}
_STRIDES = ((1, 1), (2, 2))


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None], reason: str | None) -> Program:
    """The static ``program``, lowered and its strides known, with ``packed_conv2d_int8`` in the place of each
    convolution that a kernel takes.  ``declined(op, args)``: why none does, or None; ``reason``: why the backend has
    other kernels for them all.
    """
    sources = {o: n for n in program.nodes for o in n.outputs}
    fit = {n.name: n for n in program.nodes if _fits(n, program, sources)}
    if not fit or not registry.get("packed_conv2d_int8").kernels:
        return program
    if reason is not None:
        none = Applied(RULE, 0, (f"{len(fit)} convolutions: {reason}",))
        return replace(program, applied=(*program.applied, none))
    names, made, nodes, left = Names.of(program), dict[str, tuple[Ref, Ref]](), list[Node](), list[str]()
    for node in program.nodes:
        args = _arguments(node, program, sources) if node.name in fit else {}
        why = _stays(node, args, program, declined) if args else None
        left += [f"{node.name}: {why}"] if why is not None else []
        if not args or why is not None:
            nodes.append(node)
            continue
        weight = node.args["weight"]
        if weight.name not in made:
            taps, sums = (names.fresh(f"{weight.name}.{part}") for part in ("taps", "sums"))
            made[weight.name] = Ref(taps), Ref(sums)
            nodes.append(Node(taps, "fusegen.conv_taps_int8.default", {"weight": weight}, (taps, sums)))
        taps_and_sums = dict(zip(("taps", "sums"), made[weight.name], strict=True))
        given = {"x": args.pop("x"), **taps_and_sums, **args}
        nodes.append(replace(node, op="fusegen.packed_conv2d_int8.default", args=given))
    applied = Applied(RULE, len(fit) - len(left), tuple(left))
    program = replace(program, nodes=tuple(nodes), applied=(*program.applied, applied))
    return propagate(without_dead(program)[0]) if applied.count else program


def _fits(node: Node, program: Program, sources: Mapping[str, Node]) -> bool:
    """Whether it is a plain 3x3 convolution in int8 of enough channels by a weight of the program."""
    if node.op != "runtime.conv2d_int8" or what_it_reads(node, sources) is None:
        return False
    given = node.args["weight"]
    weight = program.weights.get(given.name) if isinstance(given, Ref) else None
    if weight is None or tuple(weight.shape[2:]) != (3, 3) or min(weight.shape[:2]) < FEW:
        return False
    return node.args["stride"] in _STRIDES and all(node.args[k] == v for k, v in _PLAIN.items())


def _arguments(node: Node, program: Program, sources: Mapping[str, Node]) -> dict[str, Any]:
    """The op's arguments but for the taps and their sums; x is what is upsampled, where it is."""
    x, stride = what_it_reads(node, sources), node.args["stride"][0]
    assert x is not None
    doubled = stride == 1 and x.name in sources and doubles(sources[x.name], program)
    outputs = int(program.weights[node.args["weight"].name].shape[0])
    return {
        "x": sources[x.name].args["input"] if doubled else x, "scale": node.args["scale"], "outputs": outputs,
        "bias": node.args["bias"], "residual": node.args["residual"], "stride": stride, "doubled": doubled,
    }  # fmt: skip


def _stays(
    node: Node, args: Mapping[str, Any], program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]
) -> str | None:
    """Why no kernel takes it, or None."""

    def meta(value: Any) -> Any:
        return spec_of(program, value.name).meta() if isinstance(value, Ref) else value

    weight: Tensor = meta(node.args["weight"])
    x, *rest = (meta(value) for value in args.values())
    return declined(registry.get("packed_conv2d_int8"), (x, *registry.get("conv_taps_int8").allocate(weight), *rest))
