"""Shape functions without importing PyTorch's compiler.

PyTorch's Python shape functions are wrapped so that its compiler leaves them alone, and at the first call the wrapper
imports that compiler (``torch._dynamo``, about two seconds, and onnx and onnxruntime with it where they are installed)
only to ask it for the mark.  They also ask whether a size is symbolic, which imports sympy (a quarter of a second),
though here every size is a number.  A program that is never compiled need not wait for either.
"""

from __future__ import annotations

import builtins
import importlib
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch._prims_common

_DYNAMO, _SYMBOLS = "torch._dynamo", "torch.fx.experimental.symbolic_shapes"
# What the functions for symbolic sizes say of numbers.
_OF_NUMBERS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), lambda a: a),
    **dict.fromkeys(("statically_known_true", "guarding_hint_or_throw"), lambda a: a),
    "has_guarding_hint": lambda a: True,
    "is_nested_int": lambda a: False,
    "sym_and": lambda *args: all(args),
    "sym_or": lambda *args: any(args),
    "sym_eq": operator.eq,
}


class _StandIn(types.ModuleType):
    """Answers what it was given; whatever else is asked of it comes from the real module."""

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == _SYMBOLS and name == "__path__":  # every import of a name asks; the real one has none
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Nothing:
    """Stands for sympy: ``Basic`` is a class of which no number and no tensor is."""

    Basic = type("Basic", (), {})


def _plain(value: Any) -> bool:
    """Whether it is a number, or several."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return type(value) in (bool, int, float)


def _numbers(name: str) -> Callable[..., Any]:
    """The function ``name`` of numbers; what else it is given, the real one gets."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and all(map(_plain, args)):
            return _OF_NUMBERS[name](*args)
        return getattr(_real(_SYMBOLS), name)(*args, **kwargs)

    return function


def _made() -> list[_StandIn]:
    dynamo, symbols = _StandIn(_DYNAMO), _StandIn(_SYMBOLS)
    dynamo.__dict__["disable"] = lambda function, *args, **kwargs: function
    symbols.__dict__.update({name: _numbers(name) for name in _OF_NUMBERS})
    return [dynamo, symbols]


def _import(name: str, *args: Any) -> Any:
    """``import`` but for sympy, where nobody has imported it."""
    return _Nothing if name == "sympy" and name not in sys.modules else builtins.__import__(name, *args)


def _with_import(function: types.FunctionType) -> types.FunctionType:
    """``function`` with :func:`_import` for its import statements."""
    own = {**function.__globals__, "__builtins__": {**vars(builtins), "__import__": _import}}
    made = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_types = torch._prims_common.elementwise_dtypes  # imports sympy, to ask whether an argument is an expression
_types_of_numbers = _with_import(_types) if isinstance(_types, types.FunctionType) else _types


def _real(name: str) -> Any:
    """The real module, all stand-ins gone: it may need any of those they stand for."""
    for module in [m for m in list(sys.modules.values()) if isinstance(m, _StandIn)]:
        _withdraw(module)
    return importlib.import_module(name)


def _withdraw(stand_in: _StandIn) -> None:
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
    if torch.__dict__.get("_dynamo") is stand_in:
        del torch.__dict__["_dynamo"]


@contextmanager
def no_dynamo() -> Iterator[None]:
    """Within, shape functions run without ``torch._dynamo`` and sympy; what is loaded already stays as it is."""
    made = [m for m in _made() if m.__name__ not in sys.modules]
    for stand_in in made:
        sys.modules[stand_in.__name__] = stand_in
        if stand_in.__name__ == _DYNAMO:
            torch.__dict__["_dynamo"] = stand_in
    torch._prims_common.elementwise_dtypes = _types_of_numbers
    try:
        yield
    finally:
        torch._prims_common.elementwise_dtypes = _types
        for stand_in in made:
            _withdraw(stand_in)
