"""torch.export's serialized graph (schema 8) and its weights -> :class:`~fusegen.runtime.program.Program`.

The graph comes as the JSON dictionary that ``torch.export.save`` writes and ``ExportedProgramSerializer`` returns; no
class of PyTorch's deserializer is used, so that a graph from a file can only name operators, never run code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fusegen.runtime import state, symbols
from fusegen.runtime.errors import Error, GraphError
from fusegen.runtime.program import Node, Program, Ref, TensorSpec, check, refs, substitute
from fusegen.runtime.read import operators, values

SCHEMA_MAJOR = 8
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
# Checks of what the exporter already knew: sizes are checked again when shapes are bound.
_ASSERTIONS = {
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten._functional_assert_scalar.default",
    "aten._assert_async.default",
    "aten._assert_async.msg",
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
}
_WEIGHT_KEYS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
_MUTATIONS = {
    "buffer_mutation": "a buffer",
    "parameter_mutation": "a parameter",
    "user_input_mutation": "an input",
    "gradient_to_parameter": "a gradient",
    "gradient_to_user_input": "a gradient",
}


def program(document: Mapping[str, Any], weights: Mapping[str, Tensor], name: str, trust: bool = False) -> Program:
    """Read the graph ``document``, whose parameters, buffers and constants are ``weights`` by their full names.

    ``name`` is the program's.  Weights are not copied; those the graph does not use are left out, and two names of one
    tensor become one.  Raises :class:`GraphError` where something cannot be read, naming the node and operator.
    """
    _check_version(document, name)
    try:
        reader = _Reader(document["graph_module"]["signature"], document["graph_module"]["graph"], weights, trust)
        reader.read_inputs()
        reader.read_graph(document["graph_module"]["graph"], "", reader.renamed)
        outputs = reader.read_outputs()
        ranges = {k: _range(v) for k, v in document["range_constraints"].items()}
        guards = _guards(document.get("guards_code", []), reader.inputs)
    except Error as error:
        raise type(error)(error.what, ", ".join(w for w in (name, error.where) if w), error.mend) from None
    except _MALFORMED as error:
        raise GraphError(
            "the graph is not as torch.export writes it", f"{name}: {type(error).__name__} {error}"
        ) from None
    return state.check(check(replace(_finish(name, reader, outputs, ranges), guards=guards)))


def _check_version(document: Mapping[str, Any], name: str) -> None:
    version = document.get("schema_version") if isinstance(document, Mapping) else None
    major = version.get("major") if isinstance(version, Mapping) else None
    if major != SCHEMA_MAJOR:
        raise GraphError(
            f"the graph's schema version is {str(major)[:20]}, and {SCHEMA_MAJOR} is read",
            where=name,
            mend="export with PyTorch 2.11 to 2.13",
        )


def _range(constraint: Mapping[str, Any]) -> tuple[int, int]:
    low, high = constraint.get("min_val"), constraint.get("max_val")
    return int(low or 0), symbols.MAX_SIZE if high is None else int(high)


def _guards(texts: Iterable[str], inputs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    found = (symbols.from_guard(t, {k: v.shape for k, v in inputs.items()}) for t in texts)
    return tuple(dict.fromkeys(g for g in found if g is not None))


def _finish(name: str, reader: _Reader, outputs: tuple[str, ...], ranges: Mapping[str, tuple[int, int]]) -> Program:
    nodes = _without_dead_sizes(tuple(reader.nodes), outputs)
    used = {r for n in nodes for r in n.inputs()} | set(outputs)
    dynamic = {s for spec in reader.inputs.values() for size in spec.shape for s in symbols.symbols_of(size)}
    for node in nodes:
        for made in node.outputs:
            if not _within(reader.specs.get(made), dynamic):
                raise GraphError(f"{node.op} makes a size that depends on data", where=f"{name}, {node.name}")
    return Program(
        name=name,
        nodes=nodes,
        inputs=reader.inputs,
        outputs=outputs,
        weights={k: v for k, v in reader.weights.items() if k in used},
        symbols={s: ranges.get(s, (0, symbols.MAX_SIZE)) for s in sorted(dynamic)},
        specs={o: reader.specs[o] for n in nodes for o in n.outputs if o in reader.specs},
    )


def _within(spec: TensorSpec | None, known: set[str]) -> bool:
    return spec is None or all(symbols.symbols_of(size) <= known for size in spec.shape)


def _without_dead_sizes(nodes: tuple[Node, ...], outputs: tuple[str, ...]) -> tuple[Node, ...]:
    """Drop integer arithmetic that only dropped assertions used."""
    used, kept = set(outputs), []
    for node in reversed(nodes):
        if not (node.op.startswith((values.SYM, "aten.sym_")) and used.isdisjoint(node.outputs)):
            used.update(node.inputs())
            kept.append(node)
    return tuple(reversed(kept))


@dataclass
class _Reader:
    signature: Mapping[str, Any]
    graph: Mapping[str, Any]
    given: Mapping[str, Tensor]
    trust: bool
    inputs: dict[str, TensorSpec] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    renamed: dict[str, Ref] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def read_inputs(self) -> None:
        """Sort the graph's placeholders into inputs and weights."""
        taken = set(self.graph["tensor_values"]) | set(self.graph["sym_int_values"])
        seen: dict[tuple[Any, ...], str] = {}
        for entry in self.signature["input_specs"]:
            kind, body = values.union(entry)
            if kind in _WEIGHT_KEYS:
                self._weight(body["arg"]["name"], body[_WEIGHT_KEYS[kind]], taken, seen)
            elif kind == "user_input":
                self._input(body["arg"])
            elif kind != "constant_input":
                raise GraphError(f"an input of kind {kind.replace('_', ' ')!r} cannot be read")

    def _input(self, argument: Mapping[str, Any]) -> None:
        tag, inner = values.union(argument)
        if tag == "as_none":
            return
        if tag != "as_tensor":
            raise GraphError(
                f"an input is not a tensor but {tag[3:].replace('_', ' ')}",
                mend="pass numbers as constants when exporting",
            )
        spec = values.spec(self.graph["tensor_values"][inner["name"]])
        if spec is None:
            raise GraphError("an input's size is not integer arithmetic", where=inner["name"])
        self.inputs[inner["name"]] = spec

    def _weight(self, placeholder: str, full: str, taken: set[str], seen: dict[tuple[Any, ...], str]) -> None:
        if full not in self.given:
            raise GraphError("a weight is missing", where=full)
        tensor = self.given[full].detach()
        want = values.spec(self.graph["tensor_values"][placeholder])
        if want != TensorSpec(tuple(tensor.shape), tensor.dtype):
            raise GraphError(
                f"the weight is {tensor.dtype} {tuple(tensor.shape)} where the graph says {want}", where=full
            )
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (full,)
        name = seen.setdefault(storage, placeholder if full in taken else full)
        self.renamed[placeholder] = Ref(name)
        self.weights.setdefault(name, tensor)

    def read_graph(self, graph: Mapping[str, Any], prefix: str, local: dict[str, Any]) -> None:
        """Append a graph's nodes; ``local`` says what its names stand for, and takes those a nested graph makes."""
        for name, meta in graph["tensor_values"].items():
            if (spec := values.spec(meta)) is not None:
                self.specs[prefix + name] = spec
        for entry in graph["nodes"]:
            where = str(entry.get("name") or entry.get("target"))[:120]
            try:
                self._node(entry, prefix, local)
            except Error as error:
                raise type(error)(error.what, error.where or where, error.mend) from None
            except _MALFORMED as error:
                raise GraphError(
                    f"the node is not as torch.export writes it ({type(error).__name__}: {error})", where=where
                ) from None

    def _node(self, entry: Mapping[str, Any], prefix: str, local: dict[str, Any]) -> None:
        target = entry["target"]
        if target.startswith("torch.ops.higher_order."):
            self._nested(target.removeprefix("torch.ops.higher_order."), entry, prefix, local)
            return
        outputs = [prefix + o for o in values.outputs(entry)]
        if prefix:
            local.update((o.removeprefix(prefix), Ref(o)) for o in outputs)
        op = values.op_name(target)
        if op in _ASSERTIONS:
            return
        args = {a["name"]: substitute(values.decode(a["arg"]), local) for a in entry["inputs"]}
        if not op.startswith(values.SYM):
            args = operators.complete(operators.resolve(op, self.trust), args, str(entry.get("name") or ""))
        name = self._unique(prefix + str(entry.get("name") or (outputs[0] if outputs else op)))
        outputs += self._written(name, op, args, local)
        self.nodes.append(Node(name, op, args, tuple(outputs), values.source(entry)))

    def _written(self, name: str, op: str, args: Mapping[str, Any], local: dict[str, Any]) -> list[str]:
        """New names for what the node writes in place; later uses of the old ones are sent to them."""
        made = []
        for argument in operators.written(op):
            old, new = args[argument], f"{name}.{argument}"
            if not isinstance(old, Ref):
                raise GraphError(f"{op} writes to {argument!r}, which is no tensor")
            for key in (old.name, *(k for k, v in local.items() if v == old)):
                local[key] = Ref(new)
            if old.name in self.inputs or old.name in self.specs:
                self.specs[new] = self.inputs.get(old.name) or self.specs[old.name]
            made.append(new)
        return made

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.names:
            candidate, count = f"{name}_{count}", count + 1
        self.names.add(candidate)
        return candidate

    def _nested(self, kind: str, entry: Mapping[str, Any], prefix: str, local: dict[str, Any]) -> None:
        """Put a graph that only changes how gradients or casts are handled in the place of its call."""
        given = [values.union(a["arg"]) for a in entry["inputs"]]
        plain = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
        at = next((i for i, (tag, _) in enumerate(given) if tag == "as_graph"), None)
        if kind not in plain or at != plain[kind]:
            raise GraphError(f"the higher-order operator {kind} cannot be read", mend="export without control flow")
        if kind == "wrap_with_autocast" and given[2][1] is not False:
            raise GraphError(
                "an autocast region cannot be read", mend="export outside autocast and pass dtype= to compile"
            )
        graph, outer = given[at][1]["graph"], prefix + str(entry.get("name")) + "."
        inside: dict[str, Any] = {}
        for placeholder, actual in zip(graph["inputs"], given[at + 1 :], strict=True):
            for name in refs(values.decode(placeholder)):
                inside[name] = substitute(values.decode(dict([actual])), local)
        self.read_graph(graph, outer, inside)
        results = [r for a in graph["outputs"] for r in refs(values.decode(a))]
        for made, result in zip(values.outputs(entry), results, strict=True):
            local[made] = inside[result]

    def read_outputs(self) -> tuple[str, ...]:
        """The names of the values returned, in order; None outputs are left out."""
        out: list[str] = []
        for entry in self.signature["output_specs"]:
            kind, body = values.union(entry)
            if kind in _MUTATIONS:
                raise GraphError(
                    f"the graph writes to {_MUTATIONS[kind]}",
                    where=str(body["arg"].get("name")),
                    mend="export in eval mode",
                )
            tag, inner = values.union(body["arg"])
            if kind != "user_output" or tag not in {"as_tensor", "as_none"}:
                raise GraphError(
                    f"an output of kind {tag[3:].replace('_', ' ')!r} cannot be read", mend="return tensors only"
                )
            if tag == "as_tensor":
                out.extend(refs(substitute(Ref(inner["name"]), self.renamed)))
        return tuple(out)
