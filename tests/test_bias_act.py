"""bias_act against the activations' formulas in NumPy, its defaults, and its bad arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compare import assert_close

from fusegen.kernels import op as registry

OP = registry.get("bias_act")
# The published table: (formula, default slope, default gain).
FORMULAS = {
    "linear": (lambda x: x, 1.0),
    "relu": (lambda x: np.where(x > 0, x, 0), math.sqrt(2)),
    "lrelu": (lambda x: np.where(x > 0, x, 0.2 * x), math.sqrt(2)),
    "tanh": (np.tanh, 1.0),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 1.0),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(x)), 1.0),
    "selu": (lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)), 1.0),
    "softplus": (lambda x: np.logaddexp(0, x), 1.0),
    "swish": (lambda x: x / (1 + np.exp(-x)), math.sqrt(2)),
    "quick_gelu": (lambda x: x / (1 + np.exp(-1.702 * x)), 1.0),
}


@pytest.mark.parametrize("act", FORMULAS)
def test_activations_are_their_formulas(act: str) -> None:
    g = torch.Generator().manual_seed(1)
    x, b = 4 * torch.randn(3, 7, 5, 11, generator=g), torch.randn(7, generator=g)
    formula, gain = FORMULAS[act]
    want = gain * formula(x.double().numpy() + b.double().numpy()[:, None, None])
    got = torch.ops.fusegen.bias_act(x, b, 1, act)
    assert_close(act, got, torch.from_numpy(want), OP.tolerance[torch.float32])


@pytest.mark.parametrize("act", sorted(FORMULAS.keys() - {"swish", "quick_gelu"}))  # where -inf has no one value
def test_nan_and_infinity_go_through(act: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.5]])
    want = OP.reference(x.double(), None, 1, act)
    got = torch.ops.fusegen.bias_act(x, None, 1, act)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    clamped = torch.ops.fusegen.bias_act(x, None, 1, act, None, None, 0.25)
    assert bool(clamped[0, 0].isnan()) and bool((clamped[0, 1:].abs() <= 0.25).all())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3), None, 1, "mish"), "no activation is called 'mish'"),
        ((torch.ones(2, 3), None, 1, "relu", None, None, -1.0), "negative"),
        ((torch.ones(2, 3), torch.ones(2), 1), "bias has shape"),
        ((torch.ones(2, 3), torch.ones(2), 2), "no dimension 2"),
    ],
)
def test_bad_arguments_are_one_line(args, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OP.allocate(*args)
    assert "\n" not in str(caught.value)
