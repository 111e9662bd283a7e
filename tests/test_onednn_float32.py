"""Layers in bfloat16 on a CPU whose oneDNN has no products of it: the same calls in float32, rounded once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from networks import plainly, relative
from test_backends import Convolutions, Epilogues, QuickGELU
from torch import Tensor, nn

from fusegen.runtime import api
from fusegen.runtime.backends import onednn

OURS = ("linear", "packed_linear", "packed_conv2d", "winograd_conv2d")  # what may take a layer before oneDNN does
SAID = " in float32"
BF16 = torch.bfloat16


class Every(Epilogues):
    """And a layer that another one multiplies."""

    def forward(self, x, image):
        h, picture = super().forward(x, image)
        return self.b(h) * self.activation(self.b(torch.sin(h))), picture


@pytest.fixture(autouse=True)
def a_cpu_without(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def session_of(module, *inputs, **more):
    return api.compile(api.capture(module.eval(), inputs, **more.pop("how", {})), dtype=BF16, without=OURS, **more)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(approximate="tanh"), QuickGELU()], ids=repr)
def test_every_epilogue_is_done_in_it_and_the_plan_says_so(activation):
    torch.manual_seed(0)
    module, inputs = Every(activation), (torch.randn(5, 17, 24), torch.randn(2, 4, 9, 11))
    session = session_of(module, *inputs)
    want = plainly(module, *inputs)
    for _ in range(2):
        assert all(relative(g, w) <= 2e-2 for g, w in zip(session(*inputs), want, strict=True))
    named = [s.binding.name for s in session.plan.steps if s.binding.how == "library"]
    assert all(name.startswith("onednn ") and name.endswith(SAID) for name in named)
    epilogues = "linear + residual + activation", "linear + multiplier", "conv2d + residual + activation"
    assert all(any(e in name for name in named) for e in epilogues)
    assert "declined onednn in bfloat16: as PyTorch ships it, it has no such products on this CPU" in str(session.plan)


def test_convolutions_of_every_kind():
    torch.manual_seed(0)
    module, x = Convolutions(3), torch.randn(2, 4, 9, 11)
    session = session_of(module, x)
    session(torch.full_like(x, torch.nan))  # what lay there before must not be read
    assert all(relative(g, w) <= 2e-2 for g, w in zip(session(x), plainly(module, x), strict=True))
    count = Counter(s.binding.name for s in session.plan.steps if s.node.op in onednn.CONV)
    assert count == {f"onednn conv2d{SAID}": 3, f"onednn conv2d + residual{SAID}": 2}


@pytest.mark.parametrize("layer, shape", [(nn.Linear(64, 96), (3, 50, 64)), (nn.Conv2d(16, 24, 3), (2, 16, 9, 7))])
def test_the_weight_is_read_as_it_is_stored_and_the_result_rounded_once(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16().float()
    layer.bias.data = layer.bias.data.bfloat16().float()
    session = session_of(nn.Sequential(layer), x)
    same = session(x) == layer(x).to(BF16)
    assert same.float().mean() >= 0.99  # the order of sums may tip one
    assert any(s.binding.name.endswith(SAID) for s in session.plan.steps)


def test_a_sample_s_bits_are_its_own():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 40, 3), nn.SiLU(), nn.Flatten(2), nn.Linear(70, 24))
    x = torch.randn(3, 4, 9, 12)
    session = session_of(module, x, how={"dynamic": {"input": {0: ("batch", 1, 9)}}}, deterministic=True)
    whole = session(x)
    assert {s.node.op for s in session.plan.steps if s.binding.by_sample} >= {"runtime.conv2d", "aten.linear.default"}
    assert relative(whole, plainly(module, x)) <= 2e-2
    assert all(torch.equal(session(x[i : i + 1])[0], whole[i]) for i in range(3))


def test_no_second_copy_of_a_weight_is_held():
    module = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(2), nn.Linear(70, 512), nn.ReLU())
    x = torch.randn(2, 64, 9, 12)
    session = session_of(module, x)
    session(x)
    (capture,) = session._captures.values()
    held = [t for t in [*capture.registers, *session.weights._placed.values()] if isinstance(t, Tensor)]
    assert Counter(t.dtype for t in held if t.is_mkldnn) == {torch.float32: 2}
    weights = {tuple(p.shape) for p in module.parameters() if p.ndim > 1}
    assert not [t for t in held if not t.is_mkldnn and tuple(t.shape) in weights]
