"""upsample2x_conv against the upsampling and convolution it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from fusegen.kernels import op as registry
from fusegen.kernels import upsample2x_filters
from fusegen.kernels.op import Tolerance

registry.ops()
EXACT = Tolerance(rms=1e-14, peak=1e-14)


def _both(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Our phases, and the two operators."""
    got = torch.ops.fusegen.upsample2x_conv(x, torch.ops.fusegen.upsample2x_filters(weight), bias)
    return got, F.conv2d(F.interpolate(x.double(), scale_factor=2.0, mode="nearest"), weight.double(),
                         None if bias is None else bias.double(), padding=1)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 4), (2, 3, 5, 1), (1, 4, 6, 7)])
def test_phases_are_the_upsampled_convolution(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(5, shape[1], 3, 3, dtype=torch.float64)
    for bias in (None, torch.randn(5, dtype=torch.float64)):
        got, want = _both(x, weight, bias)
        assert_close("float64", got, want, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_the_filters_costs_less_than_twice_the_outputs_rounding(dtype: torch.dtype) -> None:
    """The op's tolerance is for given filters; against the unfolded weight their own rounding comes on top."""
    x, weight, bias = torch.randn(2, 64, 9, 11), torch.randn(48, 64, 3, 3), torch.randn(48)
    got, want = _both(x.to(dtype), weight.to(dtype), bias.to(dtype))
    bound = registry.get("upsample2x_conv").tolerance[dtype]
    assert_close(str(dtype), got, want, Tolerance(2 * bound.rms, 2 * bound.peak))


def test_it_is_diffusers_upsample2d() -> None:
    from diffusers.models.upsampling import Upsample2D

    torch.manual_seed(0)
    block = Upsample2D(12, use_conv=True, out_channels=20)
    x = torch.randn(2, 12, 5, 6)
    with torch.no_grad():
        filters = torch.ops.fusegen.upsample2x_filters(block.conv.weight)
        got = torch.ops.fusegen.upsample2x_conv(x, filters, block.conv.bias)
        assert_close("Upsample2D", got, block(x).double(), registry.get("upsample2x_conv").tolerance[torch.float32])


def test_the_sixteen_filters_hold_each_weight_as_often_as_it_is_used() -> None:
    """One phase sees the sum of all nine weights, whatever the phase."""
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    filters = upsample2x_filters.reference(weight)
    for p in range(2):
        for q in range(2):
            torch.testing.assert_close(filters[p, q].sum((0, 1)).T, weight.sum((2, 3)))


@pytest.mark.parametrize(
    ("x", "filters", "bias", "message"),
    [
        ((2, 3, 4, 4), (2, 2, 2, 2, 5, 6), None, r"are not \(B, I, H, W\) and \(2, 2, 2, 2, I, O\)"),
        ((3, 4, 4), (2, 2, 2, 2, 3, 6), None, r"x \(3, 4, 4\) and filters"),
        ((2, 3, 4, 4), (2, 2, 2, 2, 3, 6), (5,), r"bias has shape \(5,\), not \(6,\)"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    x: tuple[int, ...], filters: tuple[int, ...], bias: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        torch.ops.fusegen.upsample2x_conv(
            torch.zeros(x), torch.zeros(filters), None if bias is None else torch.zeros(bias)
        )
    assert "\n" not in str(caught.value)


def test_other_dtypes_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float32 and filters are torch.bfloat16"):
        torch.ops.fusegen.upsample2x_conv(torch.zeros(1, 1, 1, 1), torch.zeros(2, 2, 2, 2, 1, 1).bfloat16())
    with pytest.raises(ValueError, match=r"weight has shape \(3, 3, 1, 1\), not \(O, I, 3, 3\)"):
        torch.ops.fusegen.upsample2x_filters(torch.zeros(3, 3, 1, 1))
