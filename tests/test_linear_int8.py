"""linear_int8: against integer arithmetic by numpy and PyTorch's own quantized product; what quantizing keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.linear_int8 import ACTIVATIONS, LONGEST, codes_of, quantize_int8, reference

OP = registry.get("linear_int8")


def run(*args: Any) -> Tensor:
    """The op as it is served here."""
    return torch.ops.fusegen.linear_int8(*args)


def data(m: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=g), *quantize_int8(torch.randn(n, k, generator=g))


def test_agrees_with_integer_arithmetic_in_numpy() -> None:
    x, weight, scale = data(5, 7, 300)
    rows = x.numpy()
    absmax = np.abs(rows).max(1, keepdims=True)
    codes = np.rint(rows * (np.float32(127) / absmax)).astype(np.int64)
    sums = codes @ weight.numpy().astype(np.int64).T
    want = sums * (absmax.astype(np.float64) / 127) * scale.numpy()
    assert_close("numpy", run(x, weight, scale), torch.from_numpy(want), OP.tolerance[torch.float32])


def test_agrees_with_pytorchs_quantized_product() -> None:
    x, weight, scale = data(33, 48, 512)
    weight, (codes, by) = weight // 2, codes_of(x)  # of seven bits: without VNNI sums of more saturate
    packed = torch.ops.onednn.qlinear_prepack(weight, [33, 512])
    zero = torch.zeros(48, dtype=torch.int64)
    unsigned = codes.view(torch.uint8) ^ 128
    y = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    assert_close("oneDNN", run(x, weight, scale), (y.double() * by.double()), OP.tolerance[torch.float32])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_fused_tail_is_the_one_behind_a_plain_product(activation: str) -> None:
    x, weight, scale = data(9, 40, 64)
    bias, residual = torch.randn(40), torch.randn(9, 40)
    plain = run(x, weight, scale).double()
    want = ACTIVATIONS[activation](plain + bias) + residual
    assert_close(activation, run(x, weight, scale, bias, residual, activation), want, OP.tolerance[torch.float32])


def test_quantizing_is_within_half_a_step_and_near_the_float_product() -> None:
    w = torch.randn(30, 257) * torch.logspace(-3, 3, 30)[:, None]
    w[4] = 0.0
    codes, scale = quantize_int8(w)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == 127 and bool((codes[4] == 0).all())
    assert bool(((codes * scale[:, None] - w).abs() <= 0.5001 * scale[:, None]).all())
    x = torch.randn(64, 257)
    error = run(x, codes, scale) - F.linear(x, w)
    assert float((error.norm(dim=0) / F.linear(x, w).norm(dim=0).clamp(min=1e-9)).max()) < 0.02


@pytest.mark.parametrize("level", library.levels() if library.available() else [None])
@pytest.mark.parametrize("m", [1, 20, 70])
def test_a_row_that_is_not_finite_gives_nan_and_harms_no_other(level: str, m: int) -> None:
    x, weight, scale = data(m + 2, 40, 200)
    want = reference(x, weight, scale)
    x[0, 199], x[m, 7] = float("nan"), float("-inf")
    want[0] = want[m] = float("nan")
    with library.forced(level):
        for activation in ("none", "relu"):
            got = run(x, weight, scale, None, None, activation)
            clean = ACTIVATIONS[activation](want)
            torch.testing.assert_close(got, clean, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 8)}, "not int8"),
        ({"weight": torch.zeros(4, 9, dtype=torch.int8)}, "9 columns"),
        ({"scale": torch.ones(5)}, "scale has shape (5,)"),
        ({"bias": torch.ones(5)}, "bias has shape (5,)"),
        ({"residual": torch.ones(2, 4)}, "the output has (3, 4)"),
        ({"activation": "swish"}, "none, relu, gelu, gelu_tanh, silu, quick_gelu"),
        ({"x": torch.tensor(1.0)}, "no dimension"),
        ({"x": torch.zeros(1, LONGEST + 1)}, "longer than"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8, dtype=torch.int8)}
    args |= {"scale": torch.ones(4)} | change
    with pytest.raises(ValueError) as caught:
        OP.allocate(**args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [torch.full((2, 3), float("nan")), torch.full((2, 3), float("inf")), torch.ones(3)])
def test_weights_that_cannot_be_quantized_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="quantize_int8"):
        quantize_int8(bad)
