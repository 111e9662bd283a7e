"""Rows reached by two strides, and which modulation goes with which tensor."""

from __future__ import annotations

import pytest
import torch

from fusegen.kernels.rows import Rows, alone, check_modulation, modulates, rows_of, spread


def test_rows_reached_by_two_strides() -> None:
    assert rows_of([torch.empty(4, 5, 8)]) == Rows(1, 20, ((0, 8),))
    assert rows_of([torch.empty(5, 4, 8).transpose(0, 1)]) == Rows(4, 5, ((8, 32),))
    assert rows_of([torch.empty(3, 5, 4, 9)[..., :8].transpose(1, 2)]) is None
    assert rows_of([torch.empty(8)]) == Rows(1, 1, ((0, 0),))


def test_broadcast_dimensions_stay_apart() -> None:
    x, scale = torch.empty(2, 3, 4, 8), torch.empty(2, 6 * 8).chunk(6, 1)[1]
    assert rows_of([x, spread(scale, x)]) == Rows(2, 12, ((96, 8), (48, 0)))
    assert rows_of([x, spread(scale[:, None, None], x)]) == Rows(2, 12, ((96, 8), (48, 0)))
    assert rows_of([x, x.clone()]) == Rows(1, 24, ((0, 8), (0, 8)))


def test_every_row_is_where_it_says() -> None:
    x = torch.arange(2 * 7 * 5 * 3).view(2, 7, 5, 3)[:, 1:6]
    flat, rows = x.reshape(-1, 3), rows_of([x])
    if rows is None:
        pytest.fail("two strides serve")
    ((far, near),) = rows.strides
    base = torch.arange(2 * 7 * 5 * 3)[x.storage_offset() :]
    got = [base[o * far + i * near] for o in range(rows.outer) for i in range(rows.inner)]
    assert torch.equal(torch.stack(got), flat[:, 0])


@pytest.mark.parametrize(
    ("shape", "x", "fits"),
    [
        ((2, 8), (2, 5, 8), True),
        ((1, 8), (2, 5, 8), True),
        ((2, 1, 8), (2, 5, 8), True),
        ((2, 5, 8), (2, 5, 8), True),
        ((5, 8), (2, 5, 8), False),
        ((2, 1, 1), (2, 5, 8), False),
        ((8,), (2, 5, 8), False),
        ((8,), (8,), True),
        (("b", 8), ("b", "n", 8), True),
    ],
)
def test_what_goes_with_x(shape: tuple[int, ...], x: tuple[int, ...], fits: bool) -> None:
    assert modulates(shape, x) is fits


def test_what_does_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm: gate of shape \(5, 8\) does not go with x of \(2, 5, 8\)"):
        check_modulation("norm", torch.empty(2, 5, 8), scale=None, gate=torch.empty(5, 8))


def test_one_sample_takes_its_own_modulation() -> None:
    x, own, shared = torch.randn(3, 4, 8), torch.randn(3, 8), torch.randn(1, 8)
    got = alone((x, torch.randn(8), 1e-5, own, shared), 2)
    assert torch.equal(got[0], x[2:]) and torch.equal(got[3], own[2:]) and got[4] is shared
