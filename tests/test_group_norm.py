"""Group normalization: PyTorch's own, hard statistics, layouts, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import group_norm as op
from fusegen.kernels.cpu import library
from fusegen.kernels.cpu.group_norm import decline
from fusegen.kernels.group_norm_cases import moments_of
from fusegen.kernels.op import pick

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _close(name: str, got: Tensor, x: Tensor, groups: int, silu: bool, *parameters: Tensor) -> None:
    want = F.group_norm(x.double(), groups, *(p.double() for p in parameters))
    assert_close(name, got, F.silu(want) if silu else want, op.OP.tolerance[got.dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_pytorchs_group_norm_and_silu(dtype: torch.dtype, layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 40, 19, 21, generator=g).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(40, generator=g).to(dtype) for _ in range(2))
    got = torch.ops.fusegen.group_norm(x, 8, weight, bias, 1e-5, "silu")
    assert got.is_contiguous(memory_format=layout)
    _close("group_norm", got, x, 8, True, weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["far", "head", "channel", "outlier", "tiny"])
def test_hard_statistics(kind: str, layout: torch.memory_format) -> None:
    """Means far from zero, a first part or channel unlike the rest, one large element, deviations near eps."""
    x = torch.randn(2, 24, 33, 37, generator=torch.Generator().manual_seed(9))
    if kind == "far":
        x = x + 64
    elif kind == "head":
        x[:, :, :2] += 300
    elif kind == "channel":
        x[:, ::6] += 300
    elif kind == "outlier":
        x[:, :, 0, 0] = 1e4
    else:
        x = x * 1e-3
    x = x.contiguous(memory_format=layout)
    for moments in (None, moments_of(x)):
        _close(kind, torch.ops.fusegen.group_norm(x, 4, moments=moments), x, 4, False)


@pytest.mark.skipif(not library.available(), reason=library.missing() or "")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_beyond_a_core_s_cache_by_whatever_sweeps(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """A group of 1.2 MiB: a thread's own, one after another, where two for each thread fit the last cache, or swept by
    all threads; written past the caches or not.  The bits are the same."""
    x = torch.randn(3, 4, 401, 799 if dtype == torch.bfloat16 else 399, generator=torch.Generator().manual_seed(5))
    x = x.to(dtype).contiguous(memory_format=layout)
    other = x.flip(0).contiguous(memory_format=layout)
    threads, group = torch.get_num_threads(), x[0, :2].nbytes
    want = torch.ops.fusegen.group_norm(x, 2, activation="silu")
    _close("group_norm", want, x, 2, True)
    joined = torch.ops.fusegen.join_group_norm(x, other, 2)
    for cache in (1, 2 * group, 4 * threads * group):
        with library.cached(cache):
            assert torch.equal(torch.ops.fusegen.group_norm(x, 2, activation="silu"), want), cache
            assert all(map(torch.equal, torch.ops.fusegen.join_group_norm(x, other, 2), joined)), cache


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_stays_in_its_group(layout: torch.memory_format) -> None:
    x = torch.randn(2, 12, 8, 8).contiguous(memory_format=layout)
    x[1, 5, 3, 3] = math.nan
    bad = torch.ops.fusegen.group_norm(x, 4, activation="silu").isnan().flatten(2).any(2)
    assert bad.nonzero().tolist() == [[1, 3], [1, 4], [1, 5]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_far_from_zero(layout: torch.memory_format) -> None:
    """Where e^-y would overflow, the result is -0 to within what float32 can show, and no NaN."""
    x = torch.randn(1, 16, 16, 16).contiguous(memory_format=layout)
    bias = torch.linspace(-3e4, 3e4, 16)
    got = torch.ops.fusegen.group_norm(x, 4, None, bias, 1e-5, "silu")
    _close("silu", got, x, 4, True, torch.ones(16), bias)
    assert bool(got.isfinite().all())


def test_samples_that_lie_apart_are_served() -> None:
    x = torch.randn(3, 24, 5, 5)[:, :12]
    assert (
        not x.is_contiguous()
        and pick(op.OP, "cpu", (x, 4, None, None, 1e-5, "none", None, None, None, None)).kernel is not None
    )
    _close("apart", torch.ops.fusegen.group_norm(x, 4), x, 4, False)


def test_it_declines_with_the_reason() -> None:
    x, rest = torch.empty(2, 8, 4, 4), (1e-5, "none", None, None, None, None)
    assert decline(x, 2, None, None, *rest) is None
    assert "neither contiguous nor channels-last" in str(decline(x.transpose(2, 3), 2, None, None, *rest))
    assert "weight is torch.float16" in str(decline(x, 2, torch.empty(8).half(), None, *rest))
    assert "bias is strided" in str(decline(x, 2, None, torch.empty(16)[::2], *rest))
    assert "add is strided" in str(decline(x, 2, None, None, *rest[:2], torch.empty(8, 2).t(), None, None, None))
    strided = torch.empty(2, 8, 2, dtype=torch.float64).transpose(1, 2)
    assert "moments are strided" in str(decline(x, 2, None, None, *rest[:5], strided))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.empty(2, 8, 4, 4)
    with pytest.raises(ValueError, match="3 groups"):
        torch.ops.fusegen.group_norm(x, 3)
    with pytest.raises(ValueError, match="no activation is called 'gelu'"):
        torch.ops.fusegen.group_norm(x, 2, activation="gelu")
    with pytest.raises(ValueError, match="weight has shape"):
        torch.ops.fusegen.group_norm(x, 2, torch.empty(7))
    with pytest.raises(ValueError, match=r"moments are torch\.float32"):
        torch.ops.fusegen.group_norm(x, 2, moments=torch.empty(2, 2, 8))
