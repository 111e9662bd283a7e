"""Attention of packed sequences: against PyTorch's, sequence by sequence, and what must not change a bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = library.levels() if library.available() else ("",)
needs_library = pytest.mark.skipif(not library.available(), reason=str(library.missing()))
registry.ops()
varlen = torch.ops.fusegen.attention_varlen
QUERIES, KEYS = (70, 3, 0, 130), (200, 3, 9, 150)


def packed(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v, cu_q, cu_k of the sequences above."""
    g = torch.Generator().manual_seed(0)
    rows = ((sum(QUERIES), 4), (sum(KEYS), 2), (sum(KEYS), 2))
    tensors = (torch.randn(n, h, 40, generator=g).to(dtype) for n, h in rows)
    return (*tensors, *(torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (QUERIES, KEYS)))


def test_each_sequence_is_what_pytorch_makes_of_it() -> None:
    q, k, v, cu_q, cu_k = packed()
    got = varlen(q, k, v, cu_q, cu_k)
    for s in (0, 1, 3):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        own = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        own[1:] = (x.repeat_interleave(2, 1) for x in own[1:])
        want = F.scaled_dot_product_attention(*own, attn_mask=causal_lower_right(QUERIES[s], KEYS[s]))
        torch.testing.assert_close(got[rows], want[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_is_symmetric_where_nothing_is_causal(causal: bool) -> None:
    q, k, v, cu_q, cu_k = packed()
    got = varlen(q, k, v, cu_q, cu_k, None, causal, None, 50)
    rows, keys = slice(cu_q[3], cu_q[4]), slice(cu_k[3], cu_k[4])
    apart = torch.arange(130)[:, None] + 20 - torch.arange(150)
    keep = (apart >= 0 if causal else apart > -50) & (apart < 50)
    own = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
    want = F.scaled_dot_product_attention(*own, attn_mask=keep, enable_gqa=True)
    torch.testing.assert_close(got[rows], want[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 60), (False, 0)])
def test_a_sequence_has_the_same_bits_alone(level: str, dtype: torch.dtype, causal: bool, window: int) -> None:
    q, k, v, cu_q, cu_k = packed(dtype)
    sinks = torch.tensor([0.5, -1.0, 3.0, 90.0])
    with library.forced(level):
        whole = varlen(q, k, v, cu_q, cu_k, sinks, causal, None, window)
        for s in (0, 1, 3):
            rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
            ends = [torch.tensor([0, n[s]], dtype=torch.int32) for n in (QUERIES, KEYS)]
            alone = varlen(q[rows], k[keys], v[keys], *ends, sinks, causal, None, window)
            assert torch.equal(alone, whole[rows])


@needs_library
def test_what_lies_outside_the_sequences_is_zeros_and_not_read() -> None:
    q, k, v, cu_q, cu_k = packed()
    more = [torch.cat([x, torch.full_like(x[:9], torch.nan)]) for x in (q, k, v)]
    got = varlen(*more, cu_q, cu_k)
    assert torch.equal(got[:-9], varlen(q, k, v, cu_q, cu_k)) and not got[-9:].any()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda q, k, v, a, b: (q[:, :3], k, v, a, b), "multiple"),
        (lambda q, k, v, a, b: (q, k[None], v[None], a, b), "not all"),
        (lambda q, k, v, a, b: (q, k.half(), v, a, b), "dtypes"),
        (lambda q, k, v, a, b: (q, k, v, a), "cu_k of their own"),
        (lambda q, k, v, a, b: (q, k, v, a.long(), b), "cu_q"),
        (lambda q, k, v, a, b: (q, k, v, a, b[:2]), "cu_k"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        varlen(*make(*packed()))
