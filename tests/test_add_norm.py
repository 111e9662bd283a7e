"""Residual addition and norm: the equations, the sum's own rounding, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import add_norm as op
from fusegen.kernels.op import pick

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in (shape, shape, shape[-1:], shape[-1:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_pytorchs_to_the_bit_and_the_norm_is_that_of_the_sum(dtype: torch.dtype) -> None:
    x, branch, weight, bias = _inputs(dtype, 3, 11, 323)
    y, total = torch.ops.fusegen.add_norm(x, branch, None, weight, bias)
    assert torch.equal(total, x + branch)
    assert torch.equal(y, torch.ops.fusegen.layer_norm(total, weight, bias))
    y, total = torch.ops.fusegen.add_norm(x, branch, None, weight, None, None, None, 1e-6, "rms")
    assert torch.equal(total, x + branch)
    assert torch.equal(y, torch.ops.fusegen.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_modulated_block_is_the_papers(dtype: torch.dtype) -> None:
    """Peebles & Xie 2023, figure 3: x + gate * branch, then LN(x) (1 + scale) + shift, six vectors from one product."""
    x, branch, _, _ = _inputs(dtype, 2, 37, 96)
    six = (0.5 * torch.randn(2, 6 * 96, generator=torch.Generator().manual_seed(1))).to(dtype)
    gate, scale, shift = six.chunk(6, 1)[2:5]
    wide = [t.double()[:, None] for t in (gate, scale, shift)]
    want_total = x.double() + wide[0] * branch.double()
    want = F.layer_norm(want_total, (96,), eps=1e-6) * (1 + wide[1]) + wide[2]
    for form in ((gate, scale, shift), tuple(t[:, None] for t in (gate, scale, shift))):
        y, total = torch.ops.fusegen.add_norm(x, branch, form[0], None, None, form[1], form[2], 1e-6)
        assert_close("sum", total, want_total, op.OP.tolerance[dtype])
        assert_close("norm", y, want, op.OP.tolerance[dtype])


def test_a_mean_far_above_the_deviation() -> None:
    x = torch.randn(6, 257) + 64
    y, _ = torch.ops.fusegen.add_norm(x, torch.ones(6, 257))
    assert_close("far", y, F.layer_norm((x + 1).double(), (257,)), op.OP.tolerance[torch.float32])


def test_tensors_of_different_strides_are_served() -> None:
    x, branch = torch.randn(4, 5, 32).transpose(0, 1), torch.randn(5, 4, 40)[..., :32]
    args = (x, branch, torch.randn(5, 1, 32), None, None, None, None, 1e-5, "layer", 0.0)
    assert pick(op.OP, "cpu", args).kernel is not None
    y, total = torch.ops.fusegen.add_norm(*args)
    assert_close("sum", total, (x + args[2] * branch).double(), op.OP.tolerance[torch.float32])
    assert_close("norm", y, F.layer_norm(total.double(), (32,)), op.OP.tolerance[torch.float32])


def test_what_does_not_fit_is_refused() -> None:
    x = torch.empty(2, 3, 4)
    for match, args in (
        ("no kind is called 'batch'; there are layer, rms", (x, x, None, None, None, None, None, 1e-5, "batch")),
        ("'rms' takes no bias", (x, x, None, None, torch.empty(4), None, None, 1e-5, "rms")),
        ("'layer' takes no offset", (x, x, None, None, None, None, None, 1e-5, "layer", 1.0)),
        ("branch is torch.float32", (x, x[:1])),
        ("gate of shape", (x, x, torch.empty(3, 4))),
    ):
        with pytest.raises(ValueError, match=match):
            torch.ops.fusegen.add_norm(*args)
