"""torch.export's serialized argument values (schema 8) as plain ones.

Enumerations in the file are the serializer's own numbers, not PyTorch's: the tables below are its ``ScalarType``,
``Layout`` and ``MemoryFormat``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusegen.runtime import symbols
from fusegen.runtime.errors import GraphError
from fusegen.runtime.program import Ref, TensorSpec

DTYPES: dict[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
    29: torch.float8_e4m3fn,
    30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz,
    34: torch.uint32,
    35: torch.uint64,
}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
SYM = "sym."
SYM_OPS = {
    *("add", "sub", "mul", "floordiv", "mod", "pow", "truediv", "neg", "pos", "lshift", "rshift", "sqrt", "max", "min"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not", "ite", "trunc", "int", "float"),
}
_STRIDED = 7
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"  # torch.export's filler
_FLOAT_WORDS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
_DEVICES = {"cpu", "cuda", "meta"}


def union(value: Any) -> tuple[str, Any]:
    """The one key and value of a serialized union."""
    ((tag, inner),) = value.items()
    return tag, inner


def dtype(number: Any) -> torch.dtype:
    """A dtype by the serializer's number."""
    if number not in DTYPES:
        raise GraphError(f"dtype number {number} is not one that can be read")
    return DTYPES[number]


def layout(number: Any) -> torch.layout:
    """A layout by the serializer's number; only strided tensors are read."""
    if number != _STRIDED:
        raise GraphError("a sparse or opaque tensor layout cannot be read", mend="export with dense tensors")
    return torch.strided


def _float(value: Any) -> float:
    return _FLOAT_WORDS[value] if isinstance(value, str) else float(value)


def device(kind: str, index: int | None) -> torch.device:
    """A device that a graph may name."""
    if kind not in _DEVICES:
        raise GraphError(f"the device {str(kind)[:40]!r} is not one of {', '.join(sorted(_DEVICES))}")
    return torch.device(kind) if index is None else torch.device(kind, int(index))


def _symbolic(value: Mapping[str, Any]) -> Any:
    """A symbolic number's use: a name, or a plain number among names."""
    tag, inner = union(value)
    if tag == "as_name":
        return Ref(_name(inner))
    if tag not in {"as_int", "as_float", "as_bool"}:
        raise ValueError(tag)
    return _float(inner) if tag == "as_float" else inner


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is not a string")
    return value


def _tensor(value: Mapping[str, Any]) -> Ref:
    return Ref(_name(value["name"]))


def _optional_tensor(value: Mapping[str, Any]) -> Ref | None:
    tag, inner = union(value)
    return None if tag == "as_none" else _tensor(inner)


def _plain(kind: type) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}")
        return value

    return decode


def _each(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise TypeError("expected a list")
        return tuple(decode(v) for v in value)

    return run


_DECODE: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_tensor": _tensor,
    "as_tensors": _each(_tensor),
    "as_nested_tensors": _each(_each(_tensor)),
    "as_optional_tensor": _optional_tensor,
    "as_optional_tensors": _each(_optional_tensor),
    "as_int": _plain(int),
    "as_ints": _each(_plain(int)),
    "as_int_lists": _each(_each(_plain(int))),
    "as_float": _float,
    "as_floats": _each(_float),
    "as_float_lists": _each(_each(_float)),
    "as_string": _plain(str),
    "as_strings": _each(_plain(str)),
    "as_bool": _plain(bool),
    "as_bools": _each(_plain(bool)),
    "as_sym_int": _symbolic,
    "as_sym_ints": _each(_symbolic),
    "as_sym_float": _symbolic,
    "as_sym_floats": _each(_symbolic),
    "as_sym_bool": _symbolic,
    "as_sym_bools": _each(_symbolic),
    "as_scalar_type": dtype,
    "as_memory_format": lambda v: _MEMORY_FORMATS[v],
    "as_layout": layout,
    "as_device": lambda v: device(v["type"], v.get("index")),
    "as_complex": lambda v: complex(_float(v["real"]), _float(v["imag"])),
}


def decode(value: Mapping[str, Any]) -> Any:
    """An argument's value as :class:`~fusegen.runtime.program.Node` holds it."""
    tag, inner = union(value)
    if tag not in _DECODE:
        raise GraphError(f"an argument of kind {tag[3:].replace('_', ' ')!r} cannot be read")
    return _DECODE[tag](inner)


def size(value: Mapping[str, Any]) -> int | str | None:
    """A dimension: an integer, a symbol or expression, or None where it is more than integer arithmetic."""
    tag, inner = union(value)
    if tag == "as_int":
        if type(inner) is not int or not 0 <= inner <= symbols.MAX_SIZE:
            raise ValueError("a size is not a whole number")
        return inner
    return symbols.from_sympy(inner["expr_str"])


def spec(meta: Mapping[str, Any]) -> TensorSpec | None:
    """What is known of a tensor; None where a dimension cannot be said in integers and symbols."""
    sizes = tuple(size(s) for s in meta["sizes"])
    layout(meta["layout"])
    known = tuple(s for s in sizes if s is not None)
    return TensorSpec(known, dtype(meta["dtype"])) if len(known) == len(sizes) else None


def outputs(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The names a serialized node defines, nested lists flattened; an absent output gets a name nothing uses."""
    out: list[str] = []
    for index, item in enumerate(entry["outputs"]):
        value = decode(item)
        for part in value if isinstance(value, tuple) else (value,):
            out.append(part.name if isinstance(part, Ref) else f"{entry.get('name')}_absent_{index}")
    return tuple(out)


def op_name(target: str) -> str:
    """``"torch.ops.aten.add.Tensor"`` is ``"aten.add.Tensor"``, ``"_operator.mul"`` is ``"sym.mul"``."""
    if target.startswith("torch.ops."):
        return target.removeprefix("torch.ops.")
    for prefix in ("_operator.", "math.", "torch.sym_", "torch._sym_"):
        if target.startswith(prefix):
            name = target.removeprefix(prefix)
            if name in SYM_OPS:
                return SYM + name
    raise GraphError(f"{target[:80]!r} is not an operator that can be read")


def source(entry: Mapping[str, Any]) -> str:
    """The innermost module path a node came from: ``"down.0.block"``; empty at the top and where it is not known."""
    stack = (entry.get("metadata") or {}).get("nn_module_stack", "")
    parts = stack.split(";")[-1].split(",")
    return parts[1] if len(parts) >= 3 and parts[1] != _NO_STACK else ""
