"""Noise: Philox's published vectors, the normal law, and the same bits from numpy and from C++."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from fusegen.kernels import noise_normal as op
from fusegen.kernels.cpu import library

LAW = NormalDist()
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (np.array([c], np.uint32) for c in counter)
    assert tuple(int(w[0]) for w in op.philox((c0, c1, c2, c3), key)) == want


def _fit(octave: int) -> npt.NDArray[np.float32]:
    """Row ``octave`` of the table: a Chebyshev fit of the inverse distribution function, in powers of t.

    Below octave 8 a word has more bits than t: t stands for the middle of what it was cut from.
    """
    t = 0.5 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    cut = 2.0**-24 if octave < 8 else 0.0
    z = [-LAW.inv_cdf(p) for p in (1.5 + t + cut) * 2.0 ** (-2 - octave)]
    fit = np.polynomial.Chebyshev.fit(t, z, op.DEGREE, domain=[-0.5, 0.5])
    powers = fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    return powers.coef.astype(np.float32)


def test_the_table_is_what_its_fit_gives() -> None:
    for octave in range(op.OCTAVES):
        np.testing.assert_array_max_ulp(op.TABLE[octave], _fit(octave), maxulp=1)


def test_words_to_normal_inverts_the_law_within_its_stated_error() -> None:
    low = np.unique((2.0 ** np.linspace(0, 31, 20_000)).astype(np.uint64) - 1)
    words = np.concatenate([low, [2**31 - 1]]).astype(np.uint32)
    want = np.array([-LAW.inv_cdf((2 * int(m) + 1) / 2**33) for m in words])
    got = op.words_to_normal(words)
    assert np.abs(got - want).max() < 5.2e-7
    assert np.array_equal(op.words_to_normal(words | np.uint32(2**31)), -got)
    assert got.max() < 6.4 and got.min() > -1e-7


def test_the_law_is_normal() -> None:
    z = op.normal_numpy(range(8), (1 << 18,), step=3).ravel().astype(np.float64)
    n = z.size
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(stats.skew(z)) < 4 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(z)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(z, "norm").pvalue > 1e-3
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * n * stats.norm.sf(bound)
        assert abs((np.abs(z) > bound).sum() - expected) < 5 * expected**0.5 + 1


def test_neighbours_are_not_correlated() -> None:
    n = 1 << 18
    base = op.normal_numpy([5], (n,), step=0)[0].astype(np.float64)
    others = [
        np.roll(base, 1),
        np.roll(base, 4),
        op.normal_numpy([5], (n,), step=1)[0],
        op.normal_numpy([5], (n,), step=0, sample=1)[0],
        op.normal_numpy([6], (n,), step=0)[0],
        op.normal_numpy([5 + 2**32], (n,), step=0)[0],
    ]
    for other in others:
        assert abs((base * other).mean()) < 4.5 / n**0.5


@needs_library
@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (4096,), (4097,), (3, 67, 41), (9000,)])
def test_cpp_gives_numpys_bits_at_every_level(shape: tuple[int, ...]) -> None:
    seeds = [0, -1, 2**63 - 1, -(2**63), 12345678901]
    for step, sample in ((0, 0), (999, 3), (2**32 - 1, 2**32 - 1)):
        want = op.normal_numpy(seeds, shape, step, sample).view(np.uint32)
        for level in library.levels():
            with library.forced(level):
                got = torch.ops.fusegen.noise_normal(torch.tensor(seeds), list(shape), step, sample)
            assert np.array_equal(got.numpy().view(np.uint32), want), f"{shape} at {level}"


def test_a_seeds_noise_does_not_depend_on_its_slot_or_on_the_length() -> None:
    def draw(seeds: torch.Tensor, shape: list[int]) -> torch.Tensor:
        return torch.ops.fusegen.noise_normal(seeds, shape, 4)

    alone = draw(torch.tensor([77]), [3, 100])[0]
    batch = draw(torch.tensor([1, 77, 5, 77]), [3, 100])
    assert torch.equal(batch[1], alone) and torch.equal(batch[3], alone)
    assert torch.equal(draw(torch.tensor([77]), [1000])[0, :300], alone.flatten())
    every_other = torch.tensor([77, 0, 5, 0])[::2]  # strided
    assert torch.equal(draw(every_other, [3, 100])[0], alone)


def test_what_cannot_be_a_seed_is_refused() -> None:
    for seeds in (torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="seeds is"):
            torch.ops.fusegen.noise_normal(seeds, [4], 0)
