"""Attention on CPUs, beyond the cases of the registry: what must not change a bit, and what must not be read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_all_close, assert_close, truth
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library

pytestmark = pytest.mark.skipif(not library.available(), reason=str(library.missing()))
LEVELS = library.levels() if library.available() else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend(*args: object) -> Tensor:
    """The C++ kernel's output; fails where it declines."""
    op = registry.get("attention")
    full = registry.complete(op, args)
    picked = registry.pick(op, "cpu", full)
    assert picked.kernel is not None, picked.declined
    (out,) = op.allocate(*full)
    out.fill_(torch.nan)
    picked.kernel.bind((out,), full).run()
    return out


def tensors(*shape: int, keys: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k and v, laid out (B, L, H, D)."""
    g = torch.Generator().manual_seed(seed)
    b, h, l, d = shape
    return [torch.randn(b, n, h, d, generator=g).to(dtype).transpose(1, 2) for n in (l, keys or l, keys or l)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_bits_do_not_depend_on_threads(level: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 3, 700, 40, keys=300, dtype=dtype)
    before, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            with library.forced(level):
                outs.append(attend(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("level", LEVELS)
def test_every_head_dimension(level: str) -> None:
    """Outputs are summed some dimensions at a time, as few parts as there can be of each size."""
    op = registry.get("attention")
    for dim in (*range(1, 34), 72, 97):
        q, k, v = tensors(1, 2, 37, dim, keys=131)
        with library.forced(level):
            out = attend(q, k, v)
        assert_close(
            str(dim), out, F.scaled_dot_product_attention(q.double(), k.double(), v.double()), op.tolerance[q.dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_the_batch_or_the_slot(level: str, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = tensors(5, 2, 130, 40, keys=270, dtype=dtype)
    with library.forced(level):
        whole = attend(q, k, v, None, None, causal)
        for slot in (0, 3, 4):
            one = slice(slot, slot + 1)
            assert torch.equal(attend(q[one], k[one], v[one], None, None, causal), whole[one])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_row_does_not_depend_on_the_other_queries(level: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 1, 600, 40, keys=300, dtype=dtype)
    with library.forced(level):
        whole = attend(q, k, v)
        for rows in (slice(0, 96), slice(500, 600)):
            assert torch.equal(attend(q[:, :, rows], k, v), whole[:, :, rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_bits_do_not_depend_on_layout_or_alignment(level: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 3, 37, 72, keys=77, dtype=dtype)
    with library.forced(level):
        want = attend(q, k, v)
        assert torch.equal(attend(*(x.contiguous() for x in (q, k, v))), want)
        shifted = [torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
        assert torch.equal(attend(*shifted), want)
        joined = torch.cat([x.transpose(1, 2).contiguous() for x in (k, v)], dim=-2)
        assert torch.equal(attend(q, joined[:, :, :3].transpose(1, 2), joined[:, :, 3:].transpose(1, 2)), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_keys_past_the_length_are_not_read(level: str, dtype: torch.dtype, integer: torch.dtype) -> None:
    lengths = torch.tensor([0, 1, 33, 150], dtype=integer)
    q, k, v = tensors(4, 2, 50, 40, keys=150, dtype=dtype)
    for i, n in enumerate(lengths.tolist()):
        k[i, :, n:] = v[i, :, n:] = torch.nan
    with library.forced(level):
        out = attend(q, k, v, None, lengths)
        assert out.isfinite().all() and not out[0].any()
        for i in (1, 2, 3):
            n = int(lengths[i])
            one = slice(i, i + 1)
            assert torch.equal(out[one], attend(q[one], k[one, :, :n], v[one, :, :n]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_few_queries_over_shared_keys(level: str, dtype: torch.dtype) -> None:
    """Decoding takes queries together and splits the keys: no bit may show which, nor what lies past the lengths."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, 72, generator=g).to(dtype) for h, n in ((22, 3), (2, 1100), (2, 1100)))
    lengths = torch.tensor([1100, 530])
    k[1, :, 530:] = v[1, :, 530:] = torch.nan
    mask = torch.rand(2, 22, 3, 1100, generator=g) > 0.3
    mask[0, 4, 1] = mask[0, 5, 2, :600] = False
    before, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            with library.forced(level):
                outs.append(attend(q, k, v, mask, lengths))
    finally:
        torch.set_num_threads(before)
    whole = outs[0]
    assert torch.equal(whole, outs[1]) and torch.equal(whole, outs[2])
    assert whole.isfinite().all() and not whole[0, 4, 1].any()
    op = registry.get("attention")
    want = truth(op, registry.complete(op, (q, k, v, mask, lengths)))
    assert_all_close(op, "few queries", {"output 0": whole}, want)
    with library.forced(level):
        for b, head, row in ((0, 0, 0), (0, 10, 2), (1, 11, 1), (1, 21, 2)):
            n, kv = int(lengths[b]), slice(head // 11, head // 11 + 1)
            at = (slice(b, b + 1), slice(head, head + 1), slice(row, row + 1))
            alone = attend(q[at], k[b : b + 1, kv, :n], v[b : b + 1, kv, :n], mask[at][..., :n])
            assert torch.equal(alone, whole[at])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dim", [40, 80, 160])
def test_keys_that_tower_over_all_before(level: str, dtype: torch.dtype, dim: int) -> None:
    """What the first keys' maximum served is rescaled for some rows of a tile: the others' bits do not show it."""
    q, k, v = tensors(1, 2, 70, dim, keys=400, dtype=dtype)
    k[:, :, 250:260] *= 40
    k[:, :, 390:] *= 90
    q[:, :, ::3] *= 0.01
    with library.forced(level):
        whole = attend(q, k, v)
        for rows in (slice(0, 70, 3), slice(1, 70, 3), slice(64, 70)):
            assert torch.equal(attend(q[:, :, rows], k, v), whole[:, :, rows])
    op = registry.get("attention")
    assert_all_close(op, "towering keys", {"output 0": whole}, truth(op, registry.complete(op, (q, k, v))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_rows_with_nothing_to_attend_are_zeros(level: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 2, 40, 64, keys=200, dtype=dtype)
    mask = torch.ones(40, 200, dtype=torch.bool)
    mask[3] = mask[39] = False
    mask[5, :130] = False  # its first block of keys is closed, the next is open
    added = torch.zeros(40, 200, dtype=dtype).masked_fill(~mask, -torch.inf)
    with library.forced(level):
        for form in (mask, added):
            out = attend(q, k, v, form)
            assert not out[:, :, [3, 39]].any() and out.isfinite().all()
            late = attend(q[:, :, 5:6], k[:, :, 130:], v[:, :, 130:])
            torch.testing.assert_close(out[:, :, 5:6], late, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("below", [-300.0, -1e4, -2e4, -3e4, -6e4])
def test_keys_far_below_the_others_have_no_weight(level: str, dtype: torch.dtype, below: float) -> None:
    """However far: what rounds a score to counts must not come around to large ones."""
    q, k, v = tensors(1, 2, 40, 40, keys=200, dtype=dtype)
    shut = torch.zeros(40, 200, dtype=torch.bool)
    shut[::3, 20:150] = True
    added = torch.zeros(40, 200).masked_fill(shut, below).to(dtype)
    v[:, :, 20:150] *= 1000
    op = registry.get("attention")
    with library.forced(level):
        out = attend(q, k, v, added)
    assert_all_close(op, "far below", {"output 0": out}, truth(op, registry.complete(op, (q, k, v, added))))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])  # the last's products are of both signs
def test_not_a_number_reaches_only_its_own_queries(level: str, dtype: torch.dtype, bad: float) -> None:
    q, k, v = tensors(1, 2, 40, 40, keys=90, dtype=dtype)
    q[0, 1, 7, 3] = bad
    k[0, 1, :2, 3] = torch.tensor([1.0, -1.0])
    k[0, 1, 2, 3] = 0.0  # an infinity by nothing is no number
    with library.forced(level):
        spoilt = attend(q, k, v).isnan()
    assert spoilt[0, 1, 7].all() and int(spoilt.sum()) == 40


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_score_spoils_its_own_query_alone(level: str, dtype: torch.dtype) -> None:
    """Where it comes in a late block of keys, the shift of its row alone moves."""
    q, k, v = tensors(1, 1, 40, 40, keys=300, dtype=dtype)
    added = torch.zeros(40, 300).to(dtype)
    with library.forced(level):
        want = attend(q, k, v, added)
        added[7, 250] = torch.inf
        got = attend(q, k, v, added)
    others = [i for i in range(40) if i != 7]
    assert got[0, 0, 7].isnan().all() and torch.equal(got[:, :, others], want[:, :, others])


@pytest.mark.parametrize("level", LEVELS)
def test_the_output_joins_its_heads_for_free(level: str) -> None:
    q, k, v = tensors(2, 3, 17, 40)
    with library.forced(level):
        out = attend(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_a_moved_tensor_is_read_where_it_is_now() -> None:
    op = registry.get("attention")
    args = registry.complete(op, tuple(tensors(1, 2, 20, 40)))
    (out,) = op.allocate(*args)
    launch = op.kernels[0].bind((out,), args)
    other = tensors(1, 2, 20, 40, seed=1)
    for index, tensor in enumerate(other):
        launch.move(index, tensor)
    launch.run()
    assert torch.equal(out, attend(*other))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: [x.double() for x in tensors(1, 1, 4, 8)], "float64"),
        (lambda: tensors(1, 1, 4, 1025), "over 1024"),
        (lambda: [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors(1, 1, 4, 8)], "stride"),
    ],
)
def test_what_it_declines_it_says(make, reason: str) -> None:
    op = registry.get("attention")
    picked = registry.pick(op, "cpu", registry.complete(op, tuple(make())))
    assert picked.kernel is None and reason in picked.declined[0].reason


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ((torch.zeros(2, 3, 4, 8), torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8)), "multiple"),
        ((torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 9), torch.zeros(2, 3, 4, 9)), "head dimension"),
        ((torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 4, 8)), "not all"),
        ((torch.zeros(1, 1, 4, 8),) * 3 + (torch.zeros(3, 4),), "broadcast"),
        ((torch.zeros(1, 1, 4, 8),) * 3 + (None, torch.zeros(1)), "key_lengths"),
    ],
)
def test_arguments_that_do_not_fit_are_named(args: tuple, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        torch.ops.fusegen.attention(*args)
