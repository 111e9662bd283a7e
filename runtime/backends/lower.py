"""Changes to a static program that serve any backend with epilogues."""

from __future__ import annotations

from dataclasses import replace

from fusegen.runtime.program import Node, Program, Ref


def gates_first(program: Program) -> Program:
    """``activation(gate) * value``, fused as the gate's multiplier, becomes ``value * gate`` fused as the value's.

    A library takes an activation or a second tensor into a product, not both; with the gate made first each of the two
    products takes one.
    """
    users = program.users()
    plain = {n.outputs[0]: n for n in program.nodes if n.op == "aten.linear.default"}
    taken: dict[str, Node] = {}  # value node -> the gate it multiplies
    for node in program.nodes:
        multiplier = node.args.get("multiplier") if node.op == "runtime.linear" else None
        value = plain.get(multiplier.name) if isinstance(multiplier, Ref) else None
        if value is not None and node.args["activation"] != "none" and users[value.outputs[0]] == [node]:
            if value.outputs[0] not in program.outputs:
                taken[value.name] = node
    gates = {gate.name: value for value, gate in taken.items()}
    by_name = {n.name: n for n in program.nodes}
    nodes: list[Node] = []
    for node in program.nodes:
        if node.name in taken:
            continue
        if node.name not in gates:
            nodes.append(node)
            continue
        value, inner = by_name[gates[node.name]], f"{node.outputs[0]}.gate"
        nodes.append(replace(node, name=f"{node.name}.gate", outputs=(inner,), args={**node.args, "multiplier": None}))
        args = {**dict.fromkeys(node.args), **value.args, "activation": "none", "multiplier": Ref(inner)}
        nodes.append(replace(node, args=args))
    return replace(program, nodes=tuple(nodes))
