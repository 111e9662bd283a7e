"""Operators by name: which may stand in a graph, and their arguments in one normal form.

A graph from a file is data from a stranger, so it may only call operators that compute tensors from tensors: ATen's
that write to no argument, and fusegen's own, neither with a free-form string (``aten.from_file`` maps any path).  What
fusegen's own may write to, ``runtime/state.py`` says.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from fusegen.kernels import op as registry
from fusegen.runtime.errors import GraphError, UnsafeFileError
from fusegen.runtime.program import Ref

_NAME = re.compile(r"([A-Za-z]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_NAMESPACES = {"aten", "fusegen"}
# String arguments that pick one of a few behaviours; any other might name a file or a message.
_STRINGS = {
    *("activation", "approximate", "driver", "equation", "indexing", "interpolation", "mode", "norm", "ord", "p"),
    *("pad_mode", "padding", "padding_side", "reduce", "rounding_mode", "side", "UPLO"),
}
_SIZES = {"sym_size", "sym_stride", "sym_numel", "sym_storage_offset"}
_TENSORS = {"Tensor", "List[Tensor]"}
# Memory formats, layouts and dtypes by the integers C++ uses for them in schema defaults.
_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_LAYOUTS = (torch.strided,)
_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


@functools.lru_cache(maxsize=4096)
def resolve(name: str, trust: bool = False) -> Any:
    """The ``torch._ops.OpOverload`` called ``name`` (``"aten.conv2d.default"``).

    Raises :class:`GraphError` where there is none in this PyTorch, and :class:`UnsafeFileError` where it may do more
    than compute; ``trust`` lets operators of any namespace through, but only fusegen's own may write to arguments.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise GraphError(f"{name!r} is not the name of an operator", mend="only namespace.name.overload can be read")
    namespace, base, overload = found.groups()
    if namespace not in _NAMESPACES and not trust:
        raise UnsafeFileError(
            f"the graph calls {name}, an operator from outside PyTorch", mend="pass trust=True if you know who wrote it"
        )
    if namespace == "fusegen":
        registry.ops()
    try:
        op = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    except (AttributeError, RuntimeError):
        op = None
    if not isinstance(op, torch._ops.OpOverload):
        raise GraphError(f"PyTorch {torch.__version__} has no operator {name}", mend="update PyTorch, or export again")
    _check(name, op._schema, trust)
    return op


@functools.lru_cache(maxsize=4096)
def written(name: str) -> tuple[str, ...]:
    """The arguments that the operator of a node writes in place, in schema order."""
    if not name.startswith("fusegen."):
        return ()  # no other operator that writes can be read
    arguments = resolve(name, trust=True)._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _check(name: str, schema: Any, trust: bool) -> None:
    if schema.is_mutable and not name.startswith("fusegen."):
        raise GraphError(
            f"{name} writes to its argument",
            mend="export with exported_program.run_decompositions({}), which removes writes",
        )
    strings = [a.name for a in schema.arguments if "str" in str(a.type) and a.name not in _STRINGS]
    if strings and not trust:
        raise UnsafeFileError(f"the graph calls {name}, whose {strings[0]!r} could reach outside the graph")
    base = name.split(".")[1]
    made = schema.is_mutable or any(str(r.type) in _TENSORS for r in schema.returns)
    if base not in _SIZES and not made:
        raise GraphError(
            f"{name} makes no tensor", mend="a number taken from a tensor's data cannot be planned; export without it"
        )


def complete(op: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``given`` arguments of ``op`` in schema order, defaults filled in, each in its normal form.

    Lists become tuples, one number for a fixed-length list is repeated, an integer for a float becomes a float.
    """
    out: dict[str, Any] = {}
    for argument in op._schema.arguments:
        if argument.name in given:
            out[argument.name] = _normal(argument, given[argument.name])
        elif argument.has_default_value():
            out[argument.name] = _default(argument)
        else:
            raise GraphError(f"{op} lacks its argument {argument.name!r}", where=where)
    unknown = given.keys() - out.keys()
    if unknown:
        raise GraphError(
            f"{op} has no argument {sorted(unknown)[0]!r}", where=where, mend="the graph is newer than this PyTorch"
        )
    return out


def _normal(argument: Any, value: Any) -> Any:
    kind = str(argument.type)
    if "float" in kind and not isinstance(value, (bool, str)):
        if isinstance(value, int):
            return float(value)
        if isinstance(value, tuple):
            value = tuple(float(v) if type(v) is int else v for v in value)
    if argument.N and "List" in kind:
        if isinstance(value, (int, float, Ref)):
            return (value,) * argument.N
        if isinstance(value, tuple) and len(value) == 1:
            return value * argument.N
    return value


@functools.cache
def _enums(real_type: str) -> tuple[Any, ...] | None:
    for word, table in (("MemoryFormat", _MEMORY_FORMATS), ("Layout", _LAYOUTS), ("ScalarType", _DTYPES)):
        if word in real_type:
            return table
    return None


def _default(argument: Any) -> Any:
    value = argument.default_value
    if isinstance(value, list):
        return tuple(value)
    table = _enums(str(argument.real_type))
    if table is not None and isinstance(value, int):
        return table[value]
    return value
