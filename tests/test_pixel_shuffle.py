"""pixel_shuffle against PyTorch's own, bit by bit, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import same_bits

from fusegen.kernels import op as registry
from fusegen.kernels.draw import LAYOUTS, laid_out

registry.ops()
shuffle = torch.ops.fusegen.pixel_shuffle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6])
def test_it_moves_what_pytorch_moves(factor: int, layout: str, dtype: torch.dtype) -> None:
    x = laid_out(torch.randn(2, 2 * factor**2, 5, 7).to(dtype), layout)
    up = shuffle(x, factor)
    assert same_bits(up, F.pixel_shuffle(x, factor))
    y = laid_out(F.pixel_shuffle(x, factor), layout)
    assert same_bits(shuffle(y, factor, True), x)


def test_nan_payloads_and_negative_zero_survive() -> None:
    bits = torch.tensor([0x7FC12345, 0x7F800001, -0x80000000, 1], dtype=torch.int32)
    x = bits.view(torch.float32).view(1, 4, 1, 1)
    assert torch.equal(shuffle(x, 2).view(torch.int32).flatten(), bits)


def test_more_than_a_batch_in_front() -> None:
    x = torch.randn(2, 3, 8, 5, 7)
    assert same_bits(shuffle(x, 2), F.pixel_shuffle(x, 2))
    assert same_bits(shuffle(x[0, 0], 2), F.pixel_shuffle(x[0, 0], 2))


@pytest.mark.parametrize(
    ("shape", "factor", "down", "message"),
    [
        ((4, 4), 2, False, r"it takes \(\*, C, H, W\) and a factor from 1 on, not \(4, 4\), 2"),
        ((1, 4, 2, 2), 0, False, r"not \(1, 4, 2, 2\), 0"),
        ((1, 6, 2, 2), 2, False, "6 channels do not divide by the square of the factor 2"),
        ((1, 6, 3, 2), 2, True, "3 x 2 pixels do not divide by the factor 2"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(shape: tuple[int, ...], factor: int, down: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        shuffle(torch.zeros(shape), factor, down)
    assert "\n" not in str(caught.value)
