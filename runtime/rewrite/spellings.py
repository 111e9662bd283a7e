"""Eager forms of activations that ATen has an operator of: one node, and one that fuses into products.

The op they become -> its spellings, as an op of :mod:`fusegen.kernels` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.op import Spelling

_C = math.sqrt(2.0 / math.pi)


def _gelu_cubed(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_C * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_times(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_C * (x + 0.044715 * x * x * x)))


def _gelu_factored(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_divided(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_halved(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _spelling(name: str, eager: Callable[..., Tensor], **more: Any) -> Spelling:
    def call(x: Any) -> Mapping[str, Any]:
        return {"self": x, **more}

    return Spelling(name, eager, lambda: (torch.zeros(4, 6),), call)


ATEN: Mapping[str, Sequence[Spelling]] = {
    "aten.gelu.default": (
        _spelling("tanh and a cube", _gelu_cubed, approximate="tanh"),
        _spelling("tanh and x*x*x", _gelu_times, approximate="tanh"),
        _spelling("tanh and x factored out", _gelu_factored, approximate="tanh"),
        _spelling("erf of x / sqrt(2)", _gelu_divided),
        _spelling("erf of x * sqrt(1/2)", _gelu_halved),
    ),
    "aten.silu.default": (_spelling("x*sigmoid(x)", _silu),),
}
