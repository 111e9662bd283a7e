"""RMS normalization: PyTorch's and transformers' own, hard rows, modulation, and the forms found in exported graphs."""

from __future__ import annotations

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

from fusegen.kernels import rms_norm as op
from fusegen.kernels.cpu.rms_norm import decline
from fusegen.runtime.api import capture
from fusegen.runtime.rewrite import rewrite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _close(name: str, got: Tensor, want: Tensor) -> None:
    assert_close(name, got, want.double(), op.OP.tolerance[got.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_pytorchs_rms_norm(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 7, 321, generator=g).to(dtype), torch.randn(321, generator=g).to(dtype)
    got = torch.ops.fusegen.rms_norm(x, weight, 1e-6)
    _close("rms_norm", got, F.rms_norm(x.double(), (321,), weight.double(), 1e-6))


def test_it_is_transformers_own() -> None:
    """Llama's weight, and Gemma's, which is trained as its distance from 1."""
    transformers = peers.transformers()
    x, weight = torch.randn(2, 9, 48), torch.randn(48)
    for owner, name, offset in (
        ("llama", "LlamaRMSNorm", 0.0),
        ("t5", "T5LayerNorm", 0.0),
        ("gemma", "GemmaRMSNorm", 1.0),
    ):
        module = getattr(getattr(transformers.models, owner), f"modeling_{owner}")
        norm = getattr(module, name)(48, eps=1e-5)
        norm.weight.data.copy_(weight)
        got = torch.ops.fusegen.rms_norm(x, weight, 1e-5, None, None, offset)
        _close(name, got, norm(x).detach())


@pytest.mark.parametrize("width", [17, 320, 4099])
@pytest.mark.parametrize("kind", ["far", "outlier", "tiny", "huge"])
def test_hard_rows(kind: str, width: int) -> None:
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    if kind == "far":
        x = x + 64
    elif kind == "outlier":
        x[:, 0] = 1e4
    else:
        x = x * (1e-3 if kind == "tiny" else 1e15)
    _close(f"{kind} {width}", torch.ops.fusegen.rms_norm(x, None, 1e-6), F.rms_norm(x.double(), (width,), None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 40])  # few rows a sample, and many: the modulation is folded there
def test_modulation_is_the_equation(dtype: torch.dtype, tokens: int) -> None:
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(3, tokens, 70, generator=g).to(dtype), torch.randn(70, generator=g).to(dtype)
    scale, shift = torch.randn(3, 140, generator=g).to(dtype).chunk(2, 1)
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    want = y * (1 + scale.double()[:, None]) + shift.double()[:, None]
    _close("two", torch.ops.fusegen.rms_norm(x, weight, 1e-6, scale, shift), want)
    each = (t[:, None].expand(3, tokens, 70) for t in (scale, shift))
    _close("a token", torch.ops.fusegen.rms_norm(x, weight, 1e-6, *(t.contiguous() for t in each)), want)


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 50)
    x[2, 7] = math.nan
    assert torch.ops.fusegen.rms_norm(x).isnan().any(1).tolist() == [False, False, True, False]


def test_it_declines_with_the_reason() -> None:
    x, rest = torch.empty(4, 6), (1e-6, None, None, 0.0)
    assert decline(x, None, *rest) is None
    assert "weight is torch.float64" in str(decline(x, torch.empty(6).double(), *rest))
    assert "scale's last dimension is strided" in str(decline(x, None, 1e-6, torch.empty(6, 4).t(), None, 0.0))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.empty(2, 3, 4)
    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        torch.ops.fusegen.rms_norm(x, torch.empty(3))
    with pytest.raises(ValueError, match=r"rms_norm: scale of shape \(3, 4\) does not go with x"):
        torch.ops.fusegen.rms_norm(x, None, 1e-6, torch.empty(3, 4))


def test_one_plus_a_weight_is_told_from_one_plus_a_modulation() -> None:
    """The same operators: only the shapes differ."""

    def modulated(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + scale)

    after = rewrite(capture(_Module(modulated), (torch.randn(2, 4, 6), torch.randn(2, 1, 6))))
    (node,) = after.nodes
    assert node.args["offset"] == 0.0 and node.args["weight"] is None and node.args["scale"] is not None
    after = rewrite(capture(_Module(modulated), (torch.randn(2, 4, 6), torch.randn(6))))
    (node,) = after.nodes
    assert node.args["offset"] == 1.0 and node.args["weight"] is not None and node.args["scale"] is None


class _Module(nn.Module):
    def __init__(self, function: object):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)  # type: ignore[operator, no-any-return]
