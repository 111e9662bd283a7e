"""What is joined and its group norm; group norms with something added, or modulated: PyTorch's own, in both layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import join_group_norm as op
from fusegen.kernels.cpu.join_group_norm import decline

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _images(dtype: torch.dtype, layout: torch.memory_format, *channels: int, size: int = 19) -> list[Tensor]:
    g = torch.Generator().manual_seed(11)
    return [torch.randn(2, c, size, 21, generator=g).to(dtype).contiguous(memory_format=layout) for c in channels]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", op.KINDS)
def test_joined_is_pytorchs_to_the_bit_and_the_norm_is_that_of_it(
    kind: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, other = _images(dtype, layout, 24, 40 if kind == "concat" else 24)
    want = x + other if kind == "add" else torch.cat([x, other], 1)
    weight, bias = (torch.randn(want.shape[1]).to(dtype) for _ in range(2))
    y, joined = torch.ops.fusegen.join_group_norm(x, other, 8, weight, bias, 1e-5, "silu", kind)
    assert joined.is_contiguous(memory_format=layout) and y.is_contiguous(memory_format=layout)
    assert torch.equal(joined, want)
    exact = F.silu(F.group_norm(want.double(), 8, weight.double(), bias.double()))
    assert_close(kind, y, exact, op.OP.tolerance[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("far", [0.0, 64.0])
def test_a_time_embedding_is_added_first(layout: torch.memory_format, far: float) -> None:
    """Also one so large that a channel's mean is far above its deviation: in its group the channels then differ."""
    (x,) = _images(torch.float32, layout, 24, size=40)
    time = torch.randn(2, 24) * 4 + far
    got = torch.ops.fusegen.group_norm(x, 4, None, None, 1e-5, "silu", time)
    exact = F.silu(F.group_norm(x.double() + time.double()[:, :, None, None], 4))
    assert_close("added", got, exact, op.OP.tolerance[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adaptive_group_norm_is_the_papers(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Dhariwal & Nichol 2021, section 3: GroupNorm(h) times a vector of the time embedding plus another, then SiLU."""
    (x,) = _images(dtype, layout, 24)
    weight, bias, both = torch.randn(24).to(dtype), torch.randn(24).to(dtype), torch.randn(2, 48, 1, 1).to(dtype)
    scale, shift = both.chunk(2, 1)
    got = torch.ops.fusegen.group_norm(x, 8, weight, bias, 1e-5, "silu", None, scale, shift)
    y = F.group_norm(x.double(), 8, weight.double(), bias.double())
    exact = F.silu(y * (1 + scale.double()) + shift.double())
    assert_close("adaptive", got, exact, op.OP.tolerance[dtype])


def test_it_declines_with_the_reason() -> None:
    x = torch.empty(2, 8, 4, 4)
    rest = (2, None, None, 1e-5, "none", "add", None)
    assert decline(x, x, *rest) is None
    assert decline(x, x.contiguous(memory_format=torch.channels_last), *rest) == "other is not laid out as x is"


@pytest.mark.parametrize("channels", [(3, 0), (0, 3)])
def test_a_concatenation_with_nothing(channels: tuple[int, int]) -> None:
    """Memory without elements has no address, which is how the kernel is told that there is nothing to join."""
    x, other = (torch.randn(2, n, 2, 3) for n in channels)
    y, joined = torch.ops.fusegen.join_group_norm(x, other, 1, kind="concat")
    assert torch.equal(joined, torch.cat([x, other], 1))
    assert_close("y", y, F.group_norm(joined.double(), 1), op.OP.tolerance[torch.float32])


def test_what_does_not_fit_is_refused() -> None:
    x = torch.empty(2, 8, 4, 4)
    join = torch.ops.fusegen.join_group_norm
    with pytest.raises(ValueError, match="no kind is called 'mul'; there are add, concat"):
        join(x, x, 2, None, None, 1e-5, "none", "mul")
    with pytest.raises(ValueError, match="they must agree"):
        join(x, x[:, :4], 2)
    with pytest.raises(ValueError, match="agree but for their channels"):
        join(x, x[:, :, :2], 2, None, None, 1e-5, "none", "concat")
    with pytest.raises(ValueError, match="12 channels do not divide into 8 groups"):
        join(x, x[:, :4], 8, None, None, 1e-5, "none", "concat")
    with pytest.raises(ValueError, match="moments are given, which only a concatenation has"):
        join(x, x, 2, None, None, 1e-5, "none", "add", torch.zeros(2, 2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"join_group_norm: moments are torch\.float64 \(2, 2, 8\)"):
        join(x, x, 2, None, None, 1e-5, "none", "concat", torch.zeros(2, 2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="add of shape"):
        torch.ops.fusegen.group_norm(x, 2, None, None, 1e-5, "none", torch.empty(2, 8, 4, 1))
