"""From a Program with symbolic sizes to a static one.

Shapes are propagated node by node on meta tensors: the operators' own shape functions say what each value is, so that
nothing about an operator is written down twice.  Integer arithmetic on sizes is done here and folded into constants.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fusegen.runtime.errors import Error, GraphError, RequestError
from fusegen.runtime.no_dynamo import no_dynamo
from fusegen.runtime.program import Node, Program, TensorSpec, substitute
from fusegen.runtime.read.operators import written
from fusegen.runtime.read.values import SYM
from fusegen.runtime.rewrite.graph import overload
from fusegen.runtime.symbols import MAX_SIZE, evaluate, symbols_of

if TYPE_CHECKING:
    from fusegen.runtime.derived import Weight

# Operators outside torch.ops, that a backend's lowering puts into a static program: name -> its shape function, which
# takes the node's arguments as meta tensors and returns the outputs.
SHAPES: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {}

_SIZES: dict[str, Callable[..., Any]] = {
    "aten.sym_size.int": lambda x, dim: x.shape[dim],
    "aten.sym_numel.default": lambda x: x.numel(),
}
_SYM: dict[str, Callable[..., Any]] = {
    "not": operator.not_,
    "truediv": operator.truediv,
    "int": int,
    "float": float,
    "trunc": math.trunc,
    "ite": lambda condition, then, other: then if condition else other,
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
}


@dataclass(frozen=True)
class Strided(TensorSpec):
    """A static spec: every dimension is an integer, and the strides (elements) are known.

    ``alias`` names the value whose memory this one shares, where its node is a view or writes to it in place.
    """

    strides: tuple[int, ...] = ()
    alias: str | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape, which has no symbols."""
        return cast(tuple[int, ...], self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, without gaps."""
        return math.prod(self.sizes) * self.dtype.itemsize

    def dense(self) -> tuple[Any, ...]:
        """Shape, dtype, and the strides of the dimensions longer than one: the others' mean nothing."""
        strides = tuple(st for s, st in zip(self.sizes, self.strides, strict=True) if s > 1)
        return self.sizes, self.dtype, strides if math.prod(self.sizes) else ()

    def empty(self, device: str) -> Tensor:
        """A new tensor of this spec, its elements not set."""
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=device)

    def meta(self) -> Tensor:
        """A meta tensor of this spec."""
        return self.empty("meta")


def strided(x: Weight, alias: str | None = None) -> Strided:
    """The spec of a tensor, or of a weight that is not made yet."""
    return Strided(tuple(x.shape), x.dtype, tuple(x.stride()), alias)


def spec_of(program: Program, name: str) -> Strided:
    """The spec of a value of a static program: an input, a weight or a node's output."""
    spec = program.specs.get(name) or program.inputs.get(name)
    if isinstance(spec, Strided):
        return spec
    return strided(program.weights[name])


def bind_symbols(program: Program, given: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The value of each symbol that makes the inputs ``given`` fit ``program.inputs``.

    Raises :class:`RequestError`, naming the input, where rank, dtype or size does not fit, or a symbol's range is left.
    """
    values: dict[str, int] = {}
    later: list[tuple[str, int, str, int]] = []
    for name, spec in program.inputs.items():
        got = given[name]
        _check_input(program, name, spec, got)
        for dim, (want, size) in enumerate(zip(spec.shape, got.shape, strict=True)):
            if isinstance(want, int):
                _require(want == size, program, name, spec, got, f"dimension {dim} must be {want}")
            elif want in program.symbols and want not in values:
                low, high = program.symbols[want]
                _require(low <= int(size) <= high, program, name, spec, got, f"dimension {dim} is out of range")
                values[want] = int(size)
            else:
                later.append((name, dim, want, int(size)))
    for name, dim, want, size in later:
        _solve(want, size, values)
        fits = symbols_of(want) <= values.keys() and evaluate(want, values) == size
        known = ", ".join(f"{k}={v}" for k, v in sorted(values.items()))
        _require(
            fits, program, name, program.inputs[name], given[name], f"dimension {dim} must be {want} where {known}"
        )
    _check_guards(program, values)
    return values


def _check_guards(program: Program, values: Mapping[str, int]) -> None:
    """What the exporter took to be true of the sizes must be: elsewhere the graph may mean something else."""
    for guard in program.guards:
        if symbols_of(guard) <= values.keys() and not evaluate(guard, values):
            known = ", ".join(f"{k}={v}" for k, v in sorted(values.items()))
            where = f"{program.name}, {known}"
            raise RequestError(f"the graph was exported for sizes with {guard}", where, "export it for these")


def _check_input(program: Program, name: str, spec: TensorSpec, got: TensorSpec) -> None:
    _require(len(spec.shape) == len(got.shape), program, name, spec, got, f"{len(spec.shape)} dimensions are expected")
    _require(spec.dtype == got.dtype, program, name, spec, got, f"{_short(spec.dtype)} is expected")


def _require(fits: bool, program: Program, name: str, spec: TensorSpec, got: TensorSpec, mend: str) -> None:
    if fits:
        return
    ranges = [
        f"{s} from {program.symbols[s][0]}"
        + (f" to {program.symbols[s][1]}" if program.symbols[s][1] < MAX_SIZE else " up")
        for s in dict.fromkeys(s for d in spec.shape for s in sorted(symbols_of(d)))
        if s in program.symbols
    ]
    text = f"expected {describe(spec)}" + (f", {', '.join(ranges)}" if ranges else "")
    raise RequestError(f"input {name!r} is {describe(got)}, {text}", where=f"program {program.name}", mend=mend)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(spec: TensorSpec) -> str:
    """``float32[2, 3, 32, 32]``."""
    return f"{_short(spec.dtype)}[{', '.join(map(str, spec.shape))}]"


def _solve(want: str, size: int, values: dict[str, int]) -> None:
    """Find the one unknown symbol of a linear expression, where there is just one."""
    unknown = symbols_of(want) - values.keys()
    if len(unknown) != 1:
        return
    (name,) = unknown
    at0, at1 = (evaluate(want, {**values, name: v}) for v in (0, 1))
    if at1 != at0 and (size - at0) % (at1 - at0) == 0:
        values[name] = (size - at0) // (at1 - at0)


def concrete(program: Program, wanted: Mapping[str, int]) -> dict[str, TensorSpec]:
    """The inputs' specs with every open size settled: as ``wanted``, else 1, or the least that the graph allows."""
    values = {name: wanted.get(name, max(1, low)) for name, (low, _) in program.symbols.items()}
    return {
        name: TensorSpec(tuple(evaluate(d, values) for d in spec.shape), spec.dtype)
        for name, spec in program.inputs.items()
    }


def specialize(program: Program, given: Mapping[str, TensorSpec]) -> Program:
    """The static program for these input specs: no symbols, all ``specs`` :class:`Strided`, inputs contiguous.

    Raises :class:`RequestError` where the inputs do not fit, :class:`GraphError` naming a node that cannot be planned.
    """
    values = bind_symbols(program, given)
    inputs = {
        name: strided(torch.empty([evaluate(d, values) for d in spec.shape], dtype=spec.dtype, device="meta"))
        for name, spec in program.inputs.items()
    }
    return propagate(replace(program, inputs=inputs, symbols={}, specs={}))


def propagate(program: Program) -> Program:
    """``program`` (its inputs static) with the spec of every value found and integers folded."""
    metas = {name: spec.meta() for name, spec in program.inputs.items() if isinstance(spec, Strided)}
    metas |= {name: strided(w).meta() for name, w in program.weights.items()}
    specs: dict[str, Strided] = {}
    folded: dict[str, Any] = {}
    memo: dict[Any, list[tuple[Strided, str | None]]] = {}
    nodes = []
    with no_dynamo():
        for node in program.nodes:
            args = {k: substitute(v, folded) for k, v in node.args.items()} if folded else node.args
            if node.op.startswith(SYM) or node.op in _SIZES:
                folded[node.outputs[0]] = _integer(node, args, metas)
                continue
            node = replace(node, args=args) if args is not node.args else node
            for name, (spec, argument) in zip(node.outputs, _infer(node, metas, memo), strict=False):
                metas[name] = spec.meta()
                specs[name] = replace(spec, alias=args[argument].name) if argument else spec
            nodes.append(node)
    return replace(program, nodes=tuple(nodes), specs=specs)


def _integer(node: Node, args: Mapping[str, Any], metas: Mapping[str, Tensor]) -> Any:
    values = [substitute(v, metas) for v in args.values()]
    try:
        if node.op in _SIZES:
            return _SIZES[node.op](*values)
        name = node.op.removeprefix(SYM)
        function = _SYM[name] if name in _SYM else cast(Callable[..., Any], getattr(operator, name))
        return function(*values)
    except Exception as error:
        raise GraphError(f"{node.op} on sizes failed: {error}", where=place(node)) from None


def place(node: Node) -> str:
    """``node name, module path`` for messages."""
    return f"node {node.name}" + (f", {node.source}" if node.source else "")


def _infer(
    node: Node, metas: Mapping[str, Tensor], memo: dict[Any, list[tuple[Strided, str | None]]]
) -> list[tuple[Strided, str | None]]:
    """Each output's spec and the argument it is a view of; equal calls are worked out once."""
    values = {k: substitute(v, metas) for k, v in node.args.items()}
    key = (node.op, tuple(_key(v) for v in values.values()))
    if key not in memo:
        storages = {v.untyped_storage()._cdata: k for k, v in values.items() if isinstance(v, Tensor)}
        try:
            outs = _call_meta(node.op, values)
        except Error:
            raise
        except Exception as error:
            raise GraphError(f"{node.op} does not fit its arguments: {error}", where=place(node)) from None
        made = [(strided(t), storages.get(t.untyped_storage()._cdata)) for t in outs]
        memo[key] = made + [(strided(values[name]), name) for name in written(node.op)]
    return memo[key]


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple):
        return tuple(_key(v) for v in value)
    return type(value), value  # 1, 1.0 and True are equal, and mean different dtypes


def _call_meta(op: str, values: dict[str, Any]) -> Sequence[Tensor]:
    if op in SHAPES:
        out = SHAPES[op](**values)
        return (out,) if isinstance(out, Tensor) else out
    handle = overload(op)
    if "device" in values:
        values["device"] = torch.device("meta")
    args, kwargs = arrange(handle, values)
    out = handle(*args, **kwargs)
    return (out,) if isinstance(out, Tensor) else [t for t in out or () if t is not None]


def arrange(handle: Any, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name as the positional list and keyword arguments that ``handle`` is called with."""
    args, kwargs = [], {}
    for argument in handle._schema.arguments:
        if argument.name in values:
            value = values[argument.name]
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
    return args, kwargs
