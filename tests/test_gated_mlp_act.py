"""The gate of a feed-forward layer: PyTorch's and the libraries' own modules, extremes, and what is declined."""

from __future__ import annotations

import math
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor

from fusegen.kernels import gated_mlp_act as op
from fusegen.kernels.cpu import library
from fusegen.kernels.cpu.gated_mlp_act import decline

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")


def call(*args: Any) -> Tensor:
    return torch.ops.fusegen.gated_mlp_act(*args)


class Kept(torch.nn.Module):
    """Gives back what it was given, in the place of a projection."""

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "activation"), [("GEGLU", "gelu"), ("SwiGLU", "silu")])
def test_diffusers_gates(name: str, activation: str, dtype: torch.dtype) -> None:
    peers.diffusers()
    from diffusers.models import activations

    x = (2 * torch.randn(3, 5, 74)).to(dtype)
    gate = getattr(activations, name)(74, 37)
    gate.proj = Kept()
    assert_close(name, call(x, None, activation, False), gate(x.double()), op.OP.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_phis_fused_gate(dtype: torch.dtype) -> None:
    hf = peers.transformers()
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    mlp = Phi3MLP(hf.Phi3Config(hidden_size=90, intermediate_size=45, pad_token_id=0))
    mlp.gate_up_proj, mlp.down_proj = Kept(), Kept()
    x = (2 * torch.randn(4, 90)).to(dtype)
    assert_close("Phi3MLP", call(x), mlp(x.double()), op.OP.tolerance[dtype])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("gelu_tanh", "gelu_new"), ("quick_gelu", "quick_gelu"), ("silu", "silu"), ("relu", "relu"), ("gelu", "gelu")],
)
def test_transformers_activations(name: str, theirs: str) -> None:
    peers.transformers()
    from transformers.activations import ACT2FN

    gate, up = 3 * torch.randn(6, 50), torch.randn(6, 50)
    want = ACT2FN[theirs](gate.double()) * up.double()
    assert_close(name, call(gate, up, name), want, op.OP.tolerance[torch.float32])


def test_glu() -> None:
    x = torch.randn(4, 66)
    assert_close("glu", call(x, None, "sigmoid", False), F.glu(x.double()), op.OP.tolerance[torch.float32])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", op.ACTIVATIONS)
def test_every_gate_on_the_line(name: str, dtype: torch.dtype) -> None:
    """Element by element, whatever its neighbours' magnitude: the dtype's own rounding, or a floor by the dtype."""
    gate = torch.linspace(-30, 30, 6001).to(dtype)[None]
    want = op.ACTIVATIONS[name](gate.double())
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    floor = 6e-5 if dtype is torch.bfloat16 else 4e-6 if dtype is torch.float16 else 4e-7
    for level in library.levels():
        with library.forced(level):
            got = call(gate, torch.ones_like(gate), name).double()
        assert bool(((got - want).abs() <= bound * want.abs() + floor).all()), level


@pytest.mark.parametrize("name", op.ACTIVATIONS)
def test_infinities_and_nan(name: str) -> None:
    gate = torch.tensor([[math.inf, math.nan, 1.0, 1e30] * 9])
    got = call(gate, torch.ones_like(gate), name)
    assert got[0, 0] == (1.0 if name == "sigmoid" else math.inf)
    assert got.isnan().tolist() == gate.isnan().tolist()


def test_a_pair_in_one_order_of_memory_is_one_run() -> None:
    """Channels-last pictures keep their order: one loop over all of it."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    found = op.loops(x, x, True)
    assert found is not None and found[0] == (1, 1, 1, 120)
    out = call(x, x, "relu")
    assert out.stride() == x.stride() and torch.equal(out, x.relu() * x)


def test_it_declines_with_the_reason() -> None:
    x = torch.empty(4, 6)
    assert decline(x, None, "silu", True) is None
    assert "neighbours" in str(decline(x.t().contiguous().t(), None, "silu", True))
    assert "float64" in str(decline(x.double(), None, "silu", True))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no activation is called 'mish'; there are silu, gelu"):
        call(torch.empty(2, 4), None, "mish")
    with pytest.raises(ValueError, match="is 5, which has no halves"):
        call(torch.empty(2, 5))
    with pytest.raises(ValueError, match="gate and up differ"):
        call(torch.empty(2, 4), torch.empty(2, 5))
