"""Layer normalization: PyTorch's own, hard statistics, and the rows that the C++ kernel reaches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import layer_norm as op
from fusegen.kernels.cpu.layer_norm import decline


def _close(name: str, got: Tensor, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    wide = [None if t is None else t.double() for t in (weight, bias)]
    want = F.layer_norm(x.double(), x.shape[-1:], *wide, eps=1e-5)
    assert_close(name, got, want, op.OP.tolerance[got.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_pytorchs_layer_norm(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 7, 321, generator=g).to(dtype)
    weight, bias = (torch.randn(321, generator=g).to(dtype) for _ in range(2))
    _close("layer_norm", torch.ops.fusegen.layer_norm(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("width", [17, 320, 4099])
@pytest.mark.parametrize("kind", ["far", "head", "outlier", "tiny"])
def test_hard_statistics(kind: str, width: int) -> None:
    """Means far from zero, a first part unlike the rest, one large element, deviations near eps."""
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    if kind == "far":
        x = x + 64
    elif kind == "head":
        x[:, : max(1, width // 16)] += 300
    elif kind == "outlier":
        x[:, 0] = 1e4
    else:
        x = x * 1e-3
    _close(f"{kind} {width}", torch.ops.fusegen.layer_norm(x), x)


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 50)
    x[2, 7] = math.nan
    bad = torch.ops.fusegen.layer_norm(x).isnan().any(1)
    assert bad.tolist() == [False, False, True, False]


def test_it_declines_with_the_reason() -> None:
    x, nothing = torch.empty(4, 6), (None, None, 1e-5, None, None)
    assert decline(x, *nothing) is None
    assert "strided" in str(decline(x.t(), *nothing))
    assert "weight is torch.float64" in str(decline(x, torch.empty(6).double(), None, 1e-5, None, None))
    assert "float64" in str(decline(x.double(), *nothing))
    scale, shift = torch.empty(4, 6), torch.empty(4, 6, dtype=torch.bfloat16)
    assert "differ in dtype" in str(decline(x.bfloat16(), None, None, 1e-5, scale, shift))
    assert "two strides" in str(decline(torch.empty(3, 5, 4, 9)[..., :8].transpose(1, 2), *nothing))


def test_parameters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="bias has shape"):
        torch.ops.fusegen.layer_norm(torch.empty(3, 4), None, torch.empty(3))
