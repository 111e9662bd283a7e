"""RMS norm and rotary embedding in one: transformers' and diffusers' own, and the two ops one after the other."""

from __future__ import annotations

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import qk_norm_rope as op
from fusegen.kernels.cpu.qk_norm_rope import decline
from fusegen.runtime.rotary import frequencies, tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def angles(length: int, dim: int) -> tuple[Tensor, Tensor]:
    return tables(torch.arange(length), frequencies(dim)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_qwens(dtype: torch.dtype) -> None:
    peers.transformers()
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    x, weight = (3 * torch.randn(2, 7, 4, 16)).to(dtype), (1 + 0.2 * torch.randn(16)).to(dtype)
    cos, sin = angles(7, 16)
    full = [torch.cat((t, t), -1).double()[None] for t in (cos, sin)]
    normed = F.rms_norm(x.double(), (16,), weight.double(), 1e-6).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(normed, normed, *full)
    got = torch.ops.fusegen.qk_norm_rope(x, weight, cos, sin, transpose=True)
    assert_close("qwen3", got, want, op.OP.tolerance[dtype])
    assert got.transpose(1, 2).is_contiguous()


def test_fluxs() -> None:
    peers.diffusers()
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    x, weight = torch.randn(2, 9, 3, 24), torch.randn(24)
    full = get_1d_rotary_pos_embed(24, 9, use_real=True, freqs_dtype=torch.float64)
    normed = F.rms_norm(x.double(), (24,), weight.double(), 1e-6)
    want = apply_rotary_emb(normed, full, sequence_dim=1)
    cos, sin = (t[:, None] for t in full)
    got = torch.ops.fusegen.qk_norm_rope(x, weight, cos, sin, interleaved=True)
    assert_close("flux", got, want, op.OP.tolerance[torch.float32])


@pytest.mark.parametrize("rotary", [0, 6, 20])
@pytest.mark.parametrize("interleaved", [True, False])
def test_it_is_a_norm_then_rope(interleaved: bool, rotary: int) -> None:
    x, weight, at = torch.randn(2, 3, 5, 23), torch.randn(23), torch.randint(-1, 8, (2, 1, 5))
    cos, sin = angles(8, rotary) if rotary else (torch.empty(8, 0), torch.empty(8, 0))
    got = torch.ops.fusegen.qk_norm_rope(x, weight, cos, sin, at, 1e-5, interleaved, rotary)
    normed = F.rms_norm(x.double(), (23,), weight.double(), 1e-5)
    want = torch.ops.fusegen.rope(normed, cos.double(), sin.double(), at, interleaved, rotary)
    assert_close("norm, rope", got, want, op.OP.tolerance[torch.float32])


def test_one_large_feature_and_rows_of_zeros() -> None:
    x = torch.randn(1, 2, 3, 64)
    x[..., 5] = 1e4
    x[0, 0, 1] = 0
    cos, sin = angles(3, 64)
    want = op.reference(x.double(), None, cos.double(), sin.double())
    got = torch.ops.fusegen.qk_norm_rope(x, None, cos, sin)
    assert_close("outlier", got, want, op.OP.tolerance[torch.float32])
    assert torch.equal(got[0, 0, 1], torch.zeros(64))


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(1, 4, 3, 8)
    x[0, 2, 1, 7] = math.nan
    bad = torch.ops.fusegen.qk_norm_rope(x, None, *angles(3, 8)).isnan().any(-1)[0]
    assert bad.nonzero().tolist() == [[2, 1]]


def test_it_declines_with_the_reason() -> None:
    x, cos = torch.empty(2, 5, 3, 16), torch.empty(5, 8)
    assert decline(x, torch.empty(16), cos, cos, None, 1e-6, False, None, True) is None
    assert "stride 2" in str(decline(x, torch.empty(32)[::2], cos, cos, None, 1e-6, False, None, True))
    assert "torch.float64" in str(decline(x, torch.empty(16).double(), cos, cos, None, 1e-6, False, None, True))


def test_what_does_not_fit_is_refused() -> None:
    cos = torch.empty(3, 4)
    with pytest.raises(ValueError, match=r"weight is \(4,\), x's last dimension is 8"):
        torch.ops.fusegen.qk_norm_rope(torch.empty(2, 3, 8), torch.empty(4), cos, cos)
    with pytest.raises(ValueError, match="only four can be transposed"):
        torch.ops.fusegen.qk_norm_rope(torch.empty(2, 3, 8), None, cos, cos, transpose=True)
    with pytest.raises(ValueError, match="qk_norm_rope: tables of"):
        torch.ops.fusegen.qk_norm_rope(torch.empty(2, 5, 8), None, cos, cos)
