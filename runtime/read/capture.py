"""A live ``nn.Module`` -> :class:`~fusegen.runtime.program.Program`.

The module is exported by ``torch.export`` and its serialized graph read by
:mod:`~fusegen.runtime.read.exported`: the one reader serves both live modules and files.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusegen.runtime.errors import Error, GraphError, RequestError
from fusegen.runtime.program import Program, TensorSpec
from fusegen.runtime.read import exported
from fusegen.runtime.symbols import symbols_of


def capture(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
    name: str = "",
) -> Program:
    """Export ``module`` in eval mode, as called with ``args`` and ``kwargs``.

    ``dynamic`` says which sizes may vary: ``{"x": {0: ("batch", 1, 64)}}`` gives dimension 0 of the argument ``x`` the
    symbol ``batch`` from 1 to 64 (the same name elsewhere is the same size; a bare ``"batch"`` has no bounds);
    ``torch.export.Dim`` objects and whatever else ``torch.export.export`` takes as ``dynamic_shapes`` are passed on.
    The weights are the module's own, not copies.  Raises :class:`GraphError` where the module cannot be exported or
    its graph not read, with PyTorch's reason on one line, and :class:`RequestError` for a wrong ``dynamic``.
    """
    shapes = _dynamic(module, args, kwargs or {}, dynamic)
    with _evaluating(module), torch.no_grad():
        try:
            program = torch.export.export(module, tuple(args), dict(kwargs or {}), dynamic_shapes=shapes)
        except Error:
            raise
        except Exception as error:
            raise GraphError(
                f"torch.export could not export {type(module).__name__}", mend=_first_line(error)
            ) from error
    name = name or type(module).__name__
    return _renamed(exported.program(serialize(program), _weights(program), name, trust=True), shapes)


def serialize(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """The JSON dictionary of an exported program, as ``torch.export.save`` writes it, without its weights."""
    try:
        from torch._export.serde.serialize import ExportedProgramSerializer, _to_json_bytes
    except ImportError:
        raise GraphError(
            f"PyTorch {torch.__version__} does not have the serializer that is used", mend="use PyTorch 2.11 to 2.13"
        ) from None
    operators = (n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    if any(op._schema.is_mutable and op.namespace != "fusegen" for op in operators):
        program = program.run_decompositions({})  # decomposes nothing, but turns writes into new values
    serializer = ExportedProgramSerializer()
    # The weights are not wanted here.  PyTorch 2.11 has no options to leave them out, and pickles them in vain.
    unwanted = ("serialize_state_dict", "serialize_constants", "serialize_example_inputs")
    options = dict.fromkeys(set(unwanted) & inspect.signature(serializer.serialize).parameters.keys(), False)
    artifact = serializer.serialize(program, **options)
    document: dict[str, Any] = json.loads(_to_json_bytes(artifact.exported_program))
    return document


def _weights(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    constants = {k: v for k, v in program.constants.items() if isinstance(v, Tensor)}
    return {**program.state_dict, **constants}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; each submodule gets back the mode it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _first_line(error: Exception) -> str:
    """The first line of PyTorch's message, and the first reason it lists."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    reason = next((line for line in lines[1:] if line.startswith("- ")), "")
    return f"{type(error).__name__}: {lines[0].split('! For more')[0]} {reason}"[:600]


def _dynamic(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> Any:
    """``value`` as ``torch.export.export`` takes it: names made into ``Dim``s, arguments not mentioned made static."""
    if not isinstance(value, Mapping):
        return value
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise RequestError(f"{type(module).__name__} cannot be called so: {error}", where="args, kwargs") from None
    unknown = sorted(str(k) for k in value.keys() - bound.keys())
    if unknown:
        raise RequestError(f"there is no argument {unknown[0]!r}; there are {', '.join(bound)}", where="dynamic")
    dims: dict[str, Any] = {}
    return {k: _with_dims(value.get(k), dims) for k in bound}


def _with_dims(item: Any, dims: dict[str, Any]) -> Any:
    if isinstance(item, Mapping):
        return {k: _with_dims(v, dims) for k, v in item.items()}
    if isinstance(item, list) or (isinstance(item, tuple) and not isinstance(next(iter(item), None), str)):
        return type(item)(_with_dims(v, dims) for v in item)
    name, low, high = item if isinstance(item, tuple) and len(item) == 3 else (item, None, None)
    if not isinstance(name, str):
        return item
    try:
        made = torch.export.Dim(name, min=low, max=high)
    except Exception as error:
        raise RequestError(
            f"{name!r} from {low} to {high} is not a size that can vary", "dynamic", _first_line(error)
        ) from None
    first = dims.setdefault(name, made)
    if (first.min, first.max) != (made.min, made.max) and low is not None:
        raise RequestError(f"the size {name!r} is given two different ranges", where="dynamic")
    return first


def _renamed(program: Program, shapes: Any) -> Program:
    """The program with the symbols that ``shapes`` names called by those names."""
    table: dict[str, str] = {}
    for name, dims in shapes.items() if isinstance(shapes, dict) else ():
        for at, dim in dims.items() if isinstance(dims, dict) and name in program.inputs else ():
            made_of = symbols_of(program.inputs[name].shape[at])
            wanted = getattr(getattr(dim, "root", dim), "__name__", "")  # a derived size, 8*h, is named by its root
            if len(made_of) == 1 and wanted.isidentifier() and wanted not in program.symbols:
                table.update(dict.fromkeys(made_of, wanted))
    word = re.compile(r"\b[A-Za-z_]\w*")

    def size(value: int | str) -> int | str:
        return word.sub(lambda m: table.get(m[0], m[0]), value) if isinstance(value, str) else value

    def spec(value: TensorSpec) -> TensorSpec:
        return TensorSpec(tuple(size(s) for s in value.shape), value.dtype)

    return dataclasses.replace(
        program,
        inputs={k: spec(v) for k, v in program.inputs.items()},
        specs={k: spec(v) for k, v in program.specs.items()},
        symbols={table.get(k, k): v for k, v in program.symbols.items()},
        guards=tuple(str(size(g)) for g in program.guards),
    )
