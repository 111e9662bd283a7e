"""Attention over a key-value cache: against transformers' own eager forms, and what must not change a bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.op import Tolerance

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = library.levels() if library.available() else ("",)
needs_library = pytest.mark.skipif(not library.available(), reason=str(library.missing()))
registry.ops()
decode = torch.ops.fusegen.attention_decode


def cache(batch: int, kv_heads: int, most: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch * most + dim)
    return [torch.randn(batch, kv_heads, most, dim, generator=g).to(dtype) for _ in range(2)]


def queries(batch: int, heads: int, n: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, n, heads, dim, generator=torch.Generator().manual_seed(7)).to(dtype).transpose(1, 2)


def paged(x: Tensor, block: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A contiguous cache as blocks in random order, and their table."""
    batch, heads, most, dim = x.shape
    count = most // block
    table = torch.randperm(batch * count, generator=torch.Generator().manual_seed(seed)).view(batch, count)
    blocks = torch.empty(batch * count, block, heads, dim, dtype=x.dtype)
    blocks[table.flatten()] = x.view(batch, heads, count, block, dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return blocks, table.to(torch.int32)


def open_keys(length: int, n: int, window: int = 0) -> Tensor:
    """The mask (n, length) that is added: -inf where a key is closed."""
    at, key = torch.arange(n)[:, None] + length - n, torch.arange(length)
    closed = (key > at) | ((key <= at - window) if window else False)
    return torch.zeros(n, length, dtype=torch.float64).masked_fill(closed, -torch.inf)


@pytest.mark.parametrize("window", [0, 100])
def test_sinks_as_gpt_oss_has_them(window: int) -> None:
    peers.transformers()
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager

    q, (k, v), sinks = queries(2, 8, 3, 64), cache(2, 2, 300, 64), torch.linspace(-2, 3, 8)
    got = decode(q, k, v, torch.tensor([300, 120]), None, sinks, 0.2, window)
    for b, length in enumerate((300, 120)):
        module = SimpleNamespace(sinks=sinks.double(), num_key_value_groups=4, training=False)
        own = (x[b : b + 1, :, :length].double() for x in (k, v))
        want, _ = eager(module, q[b : b + 1].double(), *own, open_keys(length, 3, window), 0.2)
        assert_close("sinks", got[b].transpose(0, 1), want[0], Tolerance(8e-6, 3e-5))


def test_soft_cap_as_gemma_2_has_it() -> None:
    peers.transformers()
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager

    q, (k, v) = 20 * queries(1, 4, 2, 64), cache(1, 2, 200, 64)
    got = decode(q, k, v, torch.tensor([200]), softcap=50.0, window=64, scale=0.3)
    module = SimpleNamespace(num_key_value_groups=2, head_dim=64, training=False)
    want, _ = eager(module, q.double(), k.double(), v.double(), open_keys(200, 2, 64), scaling=0.3, softcap=50.0)
    assert_close("soft cap", got[0].transpose(0, 1), want[0], Tolerance(8e-6, 3e-5))


@needs_library
@pytest.mark.parametrize(("heads", "dim"), [(8, 72), (18, 72), (16, 64), (18, 96)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_bits_do_not_depend_on_where_or_beside_whom_a_sequence_lies(
    level: str, dtype: torch.dtype, heads: int, dim: int
) -> None:
    """Batch, slot, capacity, blocks, and the order of their dimensions."""
    q, (k, v), lengths = queries(3, heads, 2, dim, dtype), cache(3, 2, 1120, dim, dtype), torch.tensor([1120, 600, 33])
    rest: tuple[Any, ...] = (torch.linspace(-1, 1, heads), None, 520, 10.0)
    with library.forced(level):
        whole = decode(q, k, v, lengths, None, *rest)
        for b, length in enumerate(lengths.tolist()):
            one = slice(b, b + 1)
            assert torch.equal(
                decode(q[one], k[one, :, :length], v[one, :, :length], lengths[one], None, *rest), whole[one]
            )
        for block in (7, 16, 560):
            (blocks, table), values = paged(k, block), paged(v, block)[0]
            assert torch.equal(decode(q, blocks, values, lengths, table, *rest), whole)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
        assert torch.equal(decode(q, *turned, lengths, None, *rest), whole)


@needs_library
@pytest.mark.parametrize("window", [0, 600])
@pytest.mark.parametrize("heads", [2, 4, 16, 18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_have_the_bits_of_single_steps(dtype: torch.dtype, heads: int, window: int) -> None:
    """Speculative decoding verifies several tokens at once: each must come out as it would alone."""
    q, (k, v) = queries(2, heads, 5, 64, dtype), cache(2, 2, 1300, 64, dtype)
    lengths = torch.tensor([1300, 700])
    whole = decode(q, k, v, lengths, window=window)
    for i in range(5):
        assert torch.equal(decode(q[:, :, i : i + 1], k, v, lengths - 4 + i, window=window), whole[:, :, i : i + 1])


@pytest.mark.parametrize("block", [0, 8])
def test_steps_give_what_one_pass_gives(block: int) -> None:
    """A prompt of seven, then a token at a time, each written and then attended; two sequences three tokens apart."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 40, 32, generator=g) for h in (4, 2, 2))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    shape, table = (
        ((2, 2, 40, 32), None) if not block else ((11, block, 2, 32), torch.randperm(10).to(torch.int32).view(2, 5))
    )
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    at = torch.zeros(2, dtype=torch.int32)
    for n in (7, *[1] * 33):
        rows = at.long()[:, None] + torch.arange(n)
        new = [torch.stack([x[b][:, rows[b]] for b in range(2)]) for x in (q, k, v)]
        torch.ops.fusegen.kv_append(new[1], new[2], k_cache, v_cache, at, table)
        at += n
        got = decode(new[0], k_cache, v_cache, at, table)
        for b in range(2):
            torch.testing.assert_close(got[b], want[b][:, rows[b]], rtol=1e-4, atol=1e-5)


@needs_library
def test_a_block_that_is_not_there_is_refused() -> None:
    k = torch.zeros(4, 8, 1, 16)
    for bad in (-1, 4):
        with pytest.raises(library.KernelFailed, match="does not serve"):
            decode(torch.zeros(1, 1, 1, 16), k, k, torch.tensor([9]), torch.tensor([[0, bad]], dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": torch.zeros(2, 3, 1, 8)}, "multiple"),
        ({"q": torch.zeros(2, 4, 1, 9)}, "dimension 9"),
        ({"q": torch.zeros(3, 4, 1, 8)}, "batch of 3"),
        ({"v": torch.zeros(2, 2, 5, 8)}, "not both"),
        ({"lengths": torch.zeros(2)}, "lengths"),
        ({"block_table": torch.zeros(2, 3)}, "block_table"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"window": -1}, "window"),
        ({"softcap": float("nan")}, "softcap"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], word: str) -> None:
    good = dict(
        q=torch.zeros(2, 4, 1, 8), k=torch.zeros(2, 2, 6, 8), v=torch.zeros(2, 2, 6, 8), lengths=torch.tensor([6, 2])
    )
    with pytest.raises(ValueError, match=word):
        decode(**(good | change))


@needs_library
def test_what_it_declines_it_says() -> None:
    op = registry.get("attention_decode")
    args = (queries(1, 1, 1, 300), *cache(1, 1, 4, 300), torch.tensor([4]))
    assert "over 256" in registry.pick(op, "cpu", registry.complete(op, args)).declined[0].reason
