"""linear_int4: the layout bit by bit, its arithmetic against numpy and dequantized products, what quantizing keeps."""

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
from fusegen.kernels.linear_int4 import GROUPS, INPUTS, Packed, dense, pack, quantize_int4, reference, unpack

OP = registry.get("linear_int4")
LEVELS = library.levels() if library.available() else ()


def run(x: Tensor, p: Packed, *rest: Any) -> Tensor:
    """The op as it is served here."""
    return torch.ops.fusegen.linear_int4(x, p.weight, p.scales, p.out_features, p.zeros, *rest)


def packed(n: int, k: int, group: int, symmetric: bool, seed: int = 0) -> tuple[Tensor, Packed]:
    """A random weight, and it quantized."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return w, pack(*quantize_int4(w, group, symmetric), group)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 128), (17, 129), (40, 300), (5, 0), (0, 32)])
def test_unpack_undoes_pack(n: int, k: int, group: int) -> None:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales, zeros = torch.rand(n, -(-k // group)), torch.randint(0, 16, (n, -(-k // group)), dtype=torch.uint8)
    again = unpack(pack(codes, scales, zeros, group))
    assert all(torch.equal(a, b) for a, b in zip(again, (codes, scales, zeros), strict=True))


def test_each_code_lies_where_the_layout_says() -> None:
    codes = torch.randint(0, 16, (37, 70), dtype=torch.uint8)
    p = pack(codes, torch.arange(37 * 3.0).view(37, 3), None, 32)
    assert p.weight.shape == (3, 12, 16) and p.scales.shape == (3, 3, 16)
    for n, k in ((0, 0), (1, 3), (17, 4), (36, 69), (20, 63), (9, 31), (35, 8)):
        word, column = int(p.weight[n // 16, k // 8, n % 16]), k % 8
        assert word >> (8 * (column % 4) + 4 * (column // 4)) & 15 == int(codes[n, k])
        assert float(p.scales[n // 16, k // 32, n % 16]) == 3 * n + k // 32
    assert int(p.weight[2, :, 5:].abs().max()) == 0 and float(p.scales[2, :, 5:].max()) == 0.0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_agrees_with_integer_arithmetic_in_numpy(group: int, symmetric: bool) -> None:
    _, p = packed(21, 2 * group + 9, group, symmetric)
    x = torch.randn(6, 2 * group + 9)
    codes, scales, zeros = (None if t is None else t.numpy().astype(np.float64) for t in unpack(p))
    want = np.zeros((6, 21))
    for g in range(3):
        part = slice(g * group, min((g + 1) * group, x.shape[1]))
        rows = x.numpy()[:, part]
        absmax = np.abs(rows).max(1, keepdims=True)
        q = np.rint(rows * (np.float32(127) / absmax)).astype(np.float64)
        offset = 8.0 if zeros is None else zeros[:, g : g + 1]
        want += q @ (codes[:, part] - offset).T * (absmax.astype(np.float64) / 127) * scales[:, g]
    assert_close("numpy", run(x, p), torch.from_numpy(want), OP.tolerance[torch.float32])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_row_has_its_bits_among_any_number_of_others(level: str, inputs: str) -> None:
    """One to four rows go other ways than many, and 400 are several strips."""
    _, p = packed(83, 300, 128, symmetric=False)
    x = torch.randn(400, 300)
    with library.forced(level):
        whole = run(x, p, None, None, "none", inputs)
        for rows in (1, 2, 3, 4, 5, 13, 193):
            assert torch.equal(run(x[-rows:], p, None, None, "none", inputs), whole[-rows:]), rows
    want = F.linear(x.double(), dense(p.weight, p.scales, 83, p.zeros, 300, torch.float64))
    assert float((whole - want).norm() / want.norm()) < (0.01 if inputs == "int8" else OP.tolerance[torch.float32].rms)


@pytest.mark.parametrize("symmetric", [True, False])
def test_float_inputs_are_the_product_with_the_dequantized_weight(symmetric: bool) -> None:
    _, p = packed(40, 200, 64, symmetric)
    x = torch.randn(5, 200)
    codes, scales, zeros = unpack(p)
    offset = 8 if zeros is None else zeros.double().repeat_interleave(64, 1)[:, :200]
    w = (codes.double() - offset) * scales.double().repeat_interleave(64, 1)[:, :200]
    assert torch.equal(dense(p.weight, p.scales, 40, p.zeros, 200, torch.float64), w)
    got = run(x, p, None, None, "none", "float")
    assert_close("dequantized", got, F.linear(x.double(), w), OP.tolerance[torch.float32])
    assert float((run(x, p) - got).norm() / got.norm()) < 0.01  # what quantizing x costs


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantizing_is_within_a_step_of_the_weight(group: int, symmetric: bool) -> None:
    w, p = packed(33, 500, group, symmetric)
    w[3] = 0.0
    w[4] = w[4].abs() + 1.0
    p = pack(*quantize_int4(w, group, symmetric, torch.float32), group)
    back = dense(p.weight, p.scales, 33, p.zeros, 500, torch.float32)
    step = unpack(p)[1].abs().repeat_interleave(group, 1)[:, :500]
    # Symmetric codes end at 7 where the largest magnitude's other sign would want 8: a whole step off.
    assert bool(((back - w).abs() <= (1.001 if symmetric else 0.501) * step + 1e-6).all())
    assert bool((back[3] == 0).all())
    assert float((back - w).norm() / w.norm()) < 0.12


def test_the_largest_magnitude_of_a_symmetric_group_is_kept() -> None:
    w = torch.tensor([[1.0, -3.0, 2.0] + [0.0] * 29])
    codes, scales, zeros = quantize_int4(w, 32, dtype=torch.float32)
    assert zeros is None and float((codes[0, 1].float() - 8) * scales[0, 0]) == -3.0


@pytest.mark.parametrize("level", library.levels() if library.available() else [None])
@pytest.mark.parametrize(("m", "k"), [(1, 96), (40, 96), (1, 1000), (70, 1000)])
def test_a_group_that_is_not_finite_gives_a_row_of_nan_and_harms_no_other(level: str, m: int, k: int) -> None:
    _, p = packed(20, k, 32, True)
    x = torch.randn(m + 2, k)
    want = reference(x, p.weight, p.scales, 20)
    x[0, k - 1], x[m, 7] = float("nan"), float("inf")
    want[0] = want[m] = float("nan")
    with library.forced(level):
        torch.testing.assert_close(run(x, p), want, equal_nan=True, rtol=1e-4, atol=1e-4)


def change(**fields: Any) -> dict[str, Any]:
    args: dict[str, Any] = {"x": torch.zeros(3, 64), "weight": torch.zeros(2, 8, 16, dtype=torch.int32)}
    return args | {"scales": torch.ones(2, 2, 16), "out_features": 20} | fields


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (change(weight=torch.zeros(2, 8, 16)), "not int32 (2, K/8, 16)"),
        (change(out_features=33), "not int32 (3, K/8, 16)"),
        (change(scales=torch.ones(2, 2)), "scales has shape (2, 2)"),
        (change(scales=torch.ones(2, 3, 16)), "a group is one of (32, 64, 128)"),
        (change(zeros=torch.ones(2, 2, 16)), "not uint8 (2, 2, 16)"),
        (change(inputs="int4"), "one of int8, float"),
        (change(activation="tanh"), "gelu_tanh"),
        (change(x=torch.zeros(3, 32)), "64 columns, x has rows of 32"),
        (change(x=torch.zeros(3, 65)), "64 columns, x has rows of 65"),
        (change(bias=torch.zeros(21)), "bias has shape (21,)"),
        (change(residual=torch.zeros(20)), "the output has (3, 20)"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        OP.allocate(**args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_packed_or_quantized_is_refused() -> None:
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2)
    for bad in (
        (codes + 16, scales, None, 32),
        (codes, scales, torch.full((4, 2), 16), 32),
        (codes, scales.double(), None, 32),
        (codes, scales, None, 64),
        (codes, scales, None, 48),
    ):
        with pytest.raises(ValueError, match="pack"):
            pack(*bad)  # type: ignore[arg-type]
    for w in (torch.full((2, 32), float("nan")), torch.ones(32)):
        with pytest.raises(ValueError, match="quantize_int4"):
            quantize_int4(w)
