"""upfirdn2d against SciPy's upfirdn, on random arguments, and its bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_all_close, assert_close, cloned, truth, tuples
from hypothesis import given, note
from hypothesis import strategies as st

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library

OP = registry.get("upfirdn2d")


def along(x: np.ndarray, f: np.ndarray, up: int, down: int, before: int, after: int) -> np.ndarray:
    """One axis (the last) by SciPy: the full response, whose first taps - 1 outputs meet the filter in part only."""
    signal = pytest.importorskip("scipy.signal")
    size, taps = x.shape[-1], f.shape[0]
    full = signal.upfirdn(f, x, up=up, axis=-1)
    full = np.concatenate([full, np.zeros((*full.shape[:-1], size * up + taps - 1 - full.shape[-1]))], -1)
    around = [(0, 0)] * (x.ndim - 1) + [(max(before, 0), max(after, 0))]
    full = np.pad(full, around)[..., max(-before, 0) : full.shape[-1] + max(before, 0) + max(after, 0) - max(-after, 0)]
    return full[..., taps - 1 : full.shape[-1] - (taps - 1)][..., ::down]


@pytest.mark.parametrize(
    ("up", "down", "padding", "taps"),
    [((2, 2), (1, 1), (6, 5, 6, 5), 12), ((1, 1), (2, 2), (5, 4, 3, 6), 12), ((3, 2), (2, 5), (7, 1, 9, 0), 7)],
)
def test_a_separable_filter_is_scipys(up, down, padding, taps) -> None:
    g = torch.Generator().manual_seed(3)
    x, f = torch.randn(2, 3, 31, 29, generator=g), torch.randn(taps, generator=g)
    want = along(x.double().numpy(), f.double().numpy(), up[0], down[0], *padding[:2])
    want = along(want.swapaxes(2, 3), f.double().numpy(), up[1], down[1], *padding[2:]).swapaxes(2, 3) * 1.5
    got = torch.ops.fusegen.upfirdn2d(x, f, up, down, padding, False, 1.5)
    assert_close("scipy", got, torch.from_numpy(want.copy()), OP.tolerance[torch.float32])
    outer = torch.ops.fusegen.upfirdn2d(x, f.outer(f), up, down, padding, False, 1.5)
    assert_close("outer product", outer, torch.from_numpy(want.copy()), OP.tolerance[torch.float32])


def test_a_constant_stays_what_it_is_inside() -> None:
    """The published filter, with gain 4, keeps the mean of an upsampled picture."""
    f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    y = torch.ops.fusegen.upfirdn2d(torch.ones(1, 2, 8, 8), f.outer(f), 2, 1, (2, 1, 2, 1), False, 4.0)
    assert y.shape == (1, 2, 16, 16)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones(1, 2, 12, 12))


@st.composite
def arguments(draw: st.DrawFn):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    small = st.integers(1, 4)
    up, down = ([draw(small), draw(small)] for _ in range(2))
    taps = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    f = torch.randn(taps if draw(st.booleans()) else taps[:1], generator=g)
    x = torch.randn(
        draw(small), draw(st.integers(1, 19)), draw(st.integers(1, 23)), draw(st.integers(1, 70)), generator=g
    )
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    padding = [draw(st.integers(-3, 12)) for _ in range(4)]
    for i, (size, n) in enumerate(((x.shape[3] * up[0], f.shape[-1]), (x.shape[2] * up[1], f.shape[0]))):
        padding[2 * i + 1] += max(0, n - size - padding[2 * i] - padding[2 * i + 1])  # room for the filter
    return (x, f, up, down, padding, draw(st.booleans()), draw(st.sampled_from([1.0, 4.0])))


@pytest.mark.skipif(not library.available(), reason=str(library.missing()))
@given(arguments(), st.sampled_from(library.levels() if library.available() else ("",)))
def test_random_arguments(args, level: str) -> None:
    note(f"{tuple(args[0].shape)} {args[0].dtype} {tuple(args[1].shape)} {args[2:]} at {level}")
    with library.forced(level):
        got = {f"output {i}": out for i, out in enumerate(tuples(registry.run(OP, cloned(args))))}
    assert_all_close(OP, f"random at {level}", got, truth(OP, args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": (0, 1)}, "at least 1"),
        ({"padding": (-3, -3, 0, 0)}, "does not fit"),
        ({"filter": torch.ones(2, 2, 2)}, "filter has shape"),
        ({"x": torch.ones(3, 4)}, "batch, channels"),
    ],
)
def test_bad_arguments_are_one_line(change, message: str) -> None:
    given_args = {"x": torch.ones(1, 1, 5, 5), "filter": torch.ones(3, 3), "up": (1, 1), "down": (1, 1)}
    with pytest.raises(ValueError, match=message) as caught:
        OP.allocate(*(given_args | {"padding": (0, 0, 0, 0)} | change).values())
    assert "\n" not in str(caught.value)
