"""Pictures decoded tile by tile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.runtime.errors import Cancelled, RequestError
from fusegen.runtime.loop.tiles import ramps, starts, tiled


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "expected"),
    [(8, 8, 2, [0]), (9, 8, 4, [0, 1]), (16, 8, 0, [0, 8]), (128, 64, 16, [0, 32, 64]), (20, 8, 4, [0, 4, 8, 12])],
)
def test_tiles_cover_with_enough_in_common(size: int, tile: int, overlap: int, expected: list[int]) -> None:
    found = starts(size, tile, overlap)
    assert found == expected
    assert found[0] == 0 and found[-1] + tile == size
    assert all(b - a <= tile - overlap for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("scale", [1, 3])
def test_weights_sum_to_one(scale: int) -> None:
    for size, tile, overlap in ((20, 8, 3), (37, 11, 5), (9, 8, 4), (16, 8, 0), (40, 11, 10)):
        begins = starts(size, tile, overlap)
        total = torch.zeros(size * scale, dtype=torch.float64)
        for begin, weight in zip(begins, ramps(begins, tile, scale), strict=True):
            total[begin * scale : (begin + tile) * scale] += weight
        assert torch.allclose(total, torch.ones_like(total), atol=1e-12), (size, tile, overlap)


def test_a_network_of_pixels_gives_the_picture_of_one_pass() -> None:
    x = torch.randn(2, 3, 21, 34, dtype=torch.float64)
    decode = lambda t: F.interpolate(t, scale_factor=4, mode="nearest").tanh()  # noqa: E731
    assert torch.allclose(tiled(decode, x, (8, 12), 3), decode(x), atol=1e-12)


def test_a_local_network_differs_only_where_tiles_end() -> None:
    """Of convolutions that see 2 pixels around, only a band of that width about each tile's own border is different."""
    weight = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    decode = lambda t: F.conv2d(t, weight, padding=2)  # noqa: E731
    x = torch.randn(1, 3, 16, 28, dtype=torch.float64)
    got, want = tiled(decode, x, (16, 16), 4), decode(x)  # tiles at columns 0 and 12
    assert torch.allclose(got[..., :12], want[..., :12], atol=1e-12)
    assert torch.allclose(got[..., 16:], want[..., 16:], atol=1e-12)
    assert not torch.allclose(got[..., 12:16], want[..., 12:16], atol=1e-3)


def test_progress_cancel_and_one_shape() -> None:
    shapes, seen = set[tuple[int, ...]](), list[tuple[int, int]]()

    def decode(t: Tensor) -> Tensor:
        shapes.add(tuple(t.shape))
        return t

    x = torch.randn(1, 2, 20, 20)
    assert torch.allclose(tiled(decode, x, (8, 8), 4, lambda *p: seen.append(p)), x, atol=1e-6)
    assert shapes == {(1, 2, 8, 8)} and seen == [(i + 1, 16) for i in range(16)]
    with pytest.raises(Cancelled, match="after 3 of 16 tiles"):
        calls = iter(range(100))
        tiled(decode, x, (8, 8), 4, cancel=lambda: next(calls) == 3)


@pytest.mark.parametrize(("tile", "overlap"), [((24, 8), 2), ((0, 8), 0), ((8, 8), 8), ((8, 8), -1)])
def test_tiles_that_do_not_cover_are_refused(tile: tuple[int, int], overlap: int) -> None:
    with pytest.raises(RequestError, match="larger than what two"):
        tiled(lambda t: t, torch.zeros(1, 1, 20, 20), tile, overlap)
