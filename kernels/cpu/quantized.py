"""What the launchers of the quantized linear layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES
from fusegen.kernels.op import FLOATS
from fusegen.kernels.rows import rows_of

# As in quantized.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "quick_gelu": 5}


def unserved(x: Tensor, bias: Any, residual: Any, **dense: Any) -> str | None:
    """Why x or what is fused cannot be served; ``dense``: tensors by name that must be contiguous."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return "x's last dimension is strided"
    if rows_of([x]) is None:
        return "x's rows are not reached by two strides"
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        return f"bias is {bias.dtype}, neither float32 nor x's {x.dtype}"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype}, not x's {x.dtype}"
    for name, tensor in ({"bias": bias, "residual": residual} | dense).items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is strided"
    return None


def fields(x: Tensor, out: Tensor, bias: Tensor | None, activation: str) -> dict[str, int]:
    """The fields of the structs that say where x lies, where the output goes, and what is fused."""
    found = rows_of([x])
    assert found is not None
    x_outer, x_inner = found.strides[0]
    return {
        "out": out.data_ptr(), "dtype": DTYPES[x.dtype], "bias_dtype": 0 if bias is None else DTYPES[bias.dtype],
        "outer": found.outer, "inner": found.inner, "x_outer": x_outer, "x_inner": x_inner, "width": x.shape[-1],
        "activation": ACTIVATIONS[activation],
    }  # fmt: skip
