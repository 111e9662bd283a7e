"""Our own graph format: a :class:`~fusegen.runtime.program.Program`, less its weights' values, as JSON.

Stable and versioned; writing and reading again gives an equal Program.  Values that JSON lacks are objects with one
key: ``{"ref": name}``, ``{"dtype": "float32"}``, ``{"device": "cpu"}``, ``{"layout": "strided"}``,
``{"memory_format": "channels_last"}``, ``{"float": "inf"}``, ``{"complex": [real, imaginary]}``; tuples are lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fusegen.runtime import state, symbols
from fusegen.runtime.errors import Error, FileError, GraphError
from fusegen.runtime.program import Applied, Node, Program, Ref, TensorSpec, check
from fusegen.runtime.read import json_text, operators, values

if TYPE_CHECKING:
    from fusegen.runtime.derived import Weight

FORMAT, VERSION = "fusegen.graph", 1
_KEYS = ("format", "version", "name", "inputs", "outputs", "symbols", "weights", "nodes", "specs", "applied", "guards")
_NODE_KEYS = ("name", "op", "args", "outputs", "source")
_LAYOUTS = {"strided": torch.strided}
_MEMORY = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
_MEMORY_FORMATS: dict[str, torch.memory_format] = {name: getattr(torch, name) for name in _MEMORY}
DTYPES: dict[str, torch.dtype] = {str(d).removeprefix("torch."): d for d in values.DTYPES.values()}


def dumps(program: Program) -> bytes:
    """The program's graph as UTF-8 JSON; the same program gives the same bytes."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": program.name,
        "inputs": {k: spec_to_json(v) for k, v in program.inputs.items()},
        "outputs": list(program.outputs),
        "symbols": {k: list(v) for k, v in program.symbols.items()},
        "weights": {k: spec_to_json(TensorSpec(tuple(v.shape), v.dtype)) for k, v in program.weights.items()},
        "nodes": [
            {
                "name": n.name,
                "op": n.op,
                "args": {k: _encode(v) for k, v in n.args.items()},
                "outputs": list(n.outputs),
                "source": n.source,
            }
            for n in program.nodes
        ],
        "specs": {k: spec_to_json(v) for k, v in program.specs.items()},
        "applied": [[a.rule, a.count, list(a.left)] for a in program.applied],
        "guards": list(program.guards),
    }
    return json.dumps(document, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()


def loads(text: bytes, weights: Mapping[str, Weight], where: str) -> Program:
    """The Program that :func:`dumps` wrote, with its weights by name (more than it uses are left out).

    Raises :class:`FileError` (with ``where``, the file and member) for JSON that is damaged or of another format, and
    :class:`GraphError` for a graph that means nothing: an operator that may not stand in a file, a name without a
    value, a weight of another shape or dtype.
    """
    document = json_text.load_object(text, where)
    try:
        return _program(document, weights)
    except Error as error:
        raise type(error)(error.what, ", ".join(w for w in (where, error.where) if w), error.mend) from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise GraphError(f"the graph is not of the format {FORMAT} {VERSION}: {error}"[:200], where=where) from None


def weight_specs(text: bytes, where: str) -> dict[str, TensorSpec]:
    """What a graph says of its weights: name -> spec, with integer sizes."""
    table = _object(json_text.load_object(text, where).get("weights"))
    return {k: spec_from_json(v, frozenset()) for k, v in table.items()}


def spec_to_json(spec: TensorSpec) -> list[Any]:
    """``["float32", ["batch", 3, 32, 32]]``."""
    return [str(spec.dtype).removeprefix("torch."), list(spec.shape)]


def _encode(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case Ref(name=name):
            return {"ref": name}
        case complex():
            return {"complex": [_encode(value.real), _encode(value.imag)]}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {type(value).__name__: str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case tuple():
            return [_encode(v) for v in value]
    raise GraphError(f"an argument of type {type(value).__name__} cannot be written")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "ref":
            return Ref(_text(inner))
        case "dtype":
            return DTYPES[inner]
        case "device":
            return _device(inner)
        case "layout":
            return _LAYOUTS[inner]
        case "memory_format":
            return _MEMORY_FORMATS[inner]
        case "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
        case "complex":
            real, imaginary = _decode(inner)
            return complex(real, imaginary)
    raise ValueError(f"a value of kind {kind!r}")


def _device(text: Any) -> torch.device:
    kind, _, index = _text(text).partition(":")
    return values.device(kind, int(index) if index else None)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is not a string")
    return value


def names(value: Any) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(value, list):
        raise TypeError("names are not a list")
    return tuple(_text(v) for v in value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object is missing")
    return value


def only(value: Any, keys: Collection[str]) -> dict[str, Any]:
    """An object with just these keys."""
    found = _object(value)
    if tuple(sorted(found)) != tuple(sorted(keys)):
        odd = sorted(found.keys() ^ set(keys))[0]
        raise ValueError(f"the key {odd!r} is {'unknown' if odd in found else 'missing'}")
    return found


def spec_from_json(value: Any, known: frozenset[str]) -> TensorSpec:
    """The inverse of :func:`spec_to_json`; sizes are made of the symbols ``known``."""
    dtype, shape = value
    for size in shape:
        if type(size) is int and 0 <= size <= symbols.MAX_SIZE:
            continue
        if not isinstance(size, str) or not symbols.symbols_of(size) <= known:
            raise ValueError(f"the size {size!r}")
    return TensorSpec(tuple(shape), DTYPES[dtype])


def symbol_from_json(name: str, value: Any) -> tuple[int, int]:
    """A symbol's range."""
    low, high = value
    if not name.isidentifier() or type(low) is not int or type(high) is not int or not 0 <= low <= high:
        raise ValueError(f"the range of {name!r}")
    return low, high


def _node(value: Any) -> Node:
    found = only(value, _NODE_KEYS)
    name, op = _text(found["name"]), _text(found["op"])
    try:
        args = {k: _decode(v) for k, v in _object(found["args"]).items()}
        if not op.startswith(values.SYM):
            args = operators.complete(operators.resolve(op), args, name)
        elif op.removeprefix(values.SYM) not in values.SYM_OPS:
            raise GraphError(f"there is no operator {op}")
    except Error as error:
        raise type(error)(error.what, error.where or name, error.mend) from None
    return Node(name, op, args, names(found["outputs"]), _text(found["source"]))


def _program(document: dict[str, Any], weights: Mapping[str, Weight]) -> Program:
    if document.get("format") != FORMAT:
        raise FileError(f"this is not a graph of the format {FORMAT}")
    if document.get("version") != VERSION:
        raise FileError(
            f"the graph's format is version {str(document.get('version'))[:20]}, and {VERSION} is read",
            mend="update fusegen",
        )
    found = only(document, _KEYS)
    sizes = {k: symbol_from_json(k, v) for k, v in _object(found["symbols"]).items()}
    known = frozenset(sizes)
    program = Program(
        name=_text(found["name"]),
        nodes=tuple(_node(n) for n in found["nodes"]),
        inputs={k: spec_from_json(v, known) for k, v in _object(found["inputs"]).items()},
        outputs=names(found["outputs"]),
        weights={k: _weight(k, spec_from_json(v, frozenset()), weights) for k, v in _object(found["weights"]).items()},
        symbols=sizes,
        specs={k: spec_from_json(v, known) for k, v in _object(found["specs"]).items()},
        applied=tuple(Applied(_text(rule), int(count), names(left)) for rule, count, left in found["applied"]),
        guards=tuple(_guard(g, known) for g in names(found["guards"])),
    )
    return state.check(check(program))


def _guard(text: str, known: frozenset[str]) -> str:
    if not symbols.symbols_of(text) <= known:
        raise ValueError(f"the guard {text!r}")
    return text


def _weight(name: str, spec: TensorSpec, weights: Mapping[str, Weight]) -> Weight:
    if name not in weights:
        raise GraphError("a weight is missing", where=name)
    got = TensorSpec(tuple(weights[name].shape), weights[name].dtype)
    if got != spec:
        raise GraphError(
            f"the weight is {got.dtype} {got.shape} where the graph says {spec.dtype} {spec.shape}", where=name
        )
    return weights[name]
