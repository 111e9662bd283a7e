"""Rotary embedding: transformers' and diffusers' own functions, its geometry, positions, and what is declined."""

from __future__ import annotations

import math

import peers
import pytest
import torch
from compare import assert_close
from torch import Tensor

from fusegen.kernels import rope as op
from fusegen.kernels.cpu.rope import decline
from fusegen.runtime.rotary import frequencies, tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def angles(length: int, dim: int) -> tuple[Tensor, Tensor]:
    return tables(torch.arange(length), frequencies(dim)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_llamas(dtype: torch.dtype) -> None:
    peers.transformers()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 7, 4, 16).transpose(1, 2).to(dtype), torch.randn(2, 2, 7, 16).to(dtype)
    cos, sin = angles(7, 16)
    full = [torch.cat((t, t), -1).double()[None] for t in (cos, sin)]
    for got, want in zip((q, k), apply_rotary_pos_emb(q.double(), k.double(), *full), strict=True):
        assert_close("llama", torch.ops.fusegen.rope(got, cos, sin), want, op.OP.tolerance[dtype])


def test_gpt_js() -> None:
    peers.transformers()
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x, (cos, sin) = torch.randn(2, 5, 3, 20), angles(5, 8)
    want = apply_rotary_pos_emb(x[..., :8].double(), sin[None].double(), cos[None].double())
    got = torch.ops.fusegen.rope(x, cos[:, None], sin[:, None], None, True, 8)
    assert_close("gpt-j", got, torch.cat((want, x[..., 8:].double()), -1), op.OP.tolerance[torch.float32])
    assert torch.equal(got[..., 8:], x[..., 8:])


@pytest.mark.parametrize("interleaved", [True, False])
def test_diffusers(interleaved: bool) -> None:
    peers.diffusers()
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    x = torch.randn(2, 3, 9, 24)
    full = get_1d_rotary_pos_embed(24, 9, use_real=True, repeat_interleave_real=interleaved, freqs_dtype=torch.float64)
    want = apply_rotary_emb(x.double(), full, use_real_unbind_dim=-1 if interleaved else -2)
    for cos, sin in (full, angles(9, 24)):
        got = torch.ops.fusegen.rope(x, cos, sin, None, interleaved)
        assert_close("diffusers", got, want, op.OP.tolerance[torch.float32])


@pytest.mark.parametrize("interleaved", [True, False])
def test_turning_keeps_lengths_and_depends_on_distance_alone(interleaved: bool) -> None:
    """Su et al. 2021, equation 11: the product of a query and a key depends on the difference of their positions."""
    q, k = torch.randn(1, 1, 1, 32).expand(1, 1, 40, 32), torch.randn(1, 1, 1, 32).expand(1, 1, 40, 32)
    cos, sin = angles(40, 32)
    q, k = (torch.ops.fusegen.rope(x, cos, sin, None, interleaved)[0, 0] for x in (q, k))
    assert torch.allclose(q.norm(dim=1), q[0].norm().expand(40), rtol=1e-6)
    products = q @ k.T
    for distance in (0, 1, 7, 30):
        along = products.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), rtol=1e-4, atol=1e-4)


def test_pairs_are_what_the_layout_says() -> None:
    """A quarter turn of pair 0 alone."""
    x = torch.arange(1.0, 7.0).view(1, 6)
    cos, sin = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.ops.fusegen.rope(x, cos, sin).tolist() == [[-4, 2, 3, 1, 5, 6]]
    assert torch.ops.fusegen.rope(x, cos, sin, None, True).tolist() == [[-2, 1, 3, 4, 5, 6]]


def test_positions_pick_rows() -> None:
    x, (cos, sin) = torch.randn(3, 2, 5, 16), angles(50, 16)
    at = torch.randint(0, 50, (3, 1, 5))
    got = torch.ops.fusegen.rope(x, cos, sin, at)
    assert torch.equal(got, torch.ops.fusegen.rope(x, cos[at], sin[at]))
    assert torch.equal(got, torch.ops.fusegen.rope(x, cos, sin, at.int()))


def test_a_position_outside_the_table_is_nan_and_reads_nothing() -> None:
    x, (cos, sin) = torch.randn(1, 2, 4, 12), angles(6, 8)
    at = torch.tensor([5, 6, -1, 2**62])
    got = torch.ops.fusegen.rope(x, cos, sin, at, False, 8)
    assert got[..., :8].isnan().all(-1)[0].tolist() == [[False, True, True, True]] * 2
    assert torch.equal(got[..., 8:], x[..., 8:])


def test_the_output_lies_as_x_does() -> None:
    qkv = torch.randn(2, 7, 3, 4, 16)
    out = torch.ops.fusegen.rope(qkv[:, :, 0].transpose(1, 2), *angles(7, 16))
    assert out.shape == (2, 4, 7, 16) and out.transpose(1, 2).is_contiguous()


def test_a_nan_stays_in_its_pair() -> None:
    x = torch.zeros(4, 16)
    x[2, 3] = math.nan
    got = torch.ops.fusegen.rope(x, *angles(4, 16)).isnan()
    assert got.nonzero().tolist() == [[2, 3], [2, 11]]


def test_it_declines_with_the_reason() -> None:
    x, cos = torch.empty(2, 3, 5, 16), torch.empty(5, 8)
    assert decline(x, cos, cos, None, False, None) is None
    across = torch.empty(2, 3, 16, 5).transpose(2, 3)
    assert "strided" in str(decline(across, cos, cos, None, False, None))
    assert "sin (1, 5)" in str(decline(x, cos, torch.empty(8, 5).t(), None, False, None))
    assert "the tables are torch.float64" in str(decline(x, cos.double(), cos.double(), None, False, None))
    apart, every = torch.empty(2, 4, 6, 16)[:, :3, :5], torch.empty(2, 3, 5, 8)
    assert "two loops" in str(decline(apart, every, every, None, False, None))


@pytest.mark.parametrize(
    ("x", "table", "more", "message"),
    [
        ((4,), (2,), (), "1 dimensions"),
        ((2, 3, 8), (3, 5), (), "end neither in rotary_dim 8 nor in its half"),
        ((2, 3, 8), (4, 4), (), r"tables of \(4,\) rows do not broadcast"),
        ((2, 3, 8), (3, 4), (None, False, 7), "rotary_dim is 7"),
        ((2, 3, 8), (3, 4), (None, False, 10), "rotary_dim is 10"),
        ((2, 3, 8), (1, 3, 4), (torch.zeros(3, dtype=torch.long),), r"the tables are \(N, R\)"),
        ((2, 3, 8), (3, 4), (torch.zeros(3),), "positions are torch.float32"),
        ((2, 3, 8), (3, 4), (torch.zeros(2, dtype=torch.long),), r"positions of \(2,\) rows"),
    ],
)
def test_what_does_not_fit_is_refused(x, table, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.fusegen.rope(torch.empty(x), torch.empty(table), torch.empty(table), *more)
