"""rewrite() on random graphs, and with sizes that vary: the meaning stays."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from interpret import interpret
from torch import Tensor, nn

from fusegen.kernels.op import Tolerance
from fusegen.models.unet import UNet, UNetConfig
from fusegen.runtime.api import capture
from fusegen.runtime.program import check
from fusegen.runtime.rewrite import rewrite
from fusegen.runtime.rewrite.epilogue import fuse_epilogues, merge_linears

WIDTH = 8
CLOSE = Tolerance(rms=1e-5, peak=5e-5)


class Random(nn.Module):
    """A program drawn at random: each step applies an operation to one or two of the values made so far."""

    def __init__(self, steps: list[tuple[str, int, int]], outputs: int):
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.linear, self.conv = nn.Linear(WIDTH, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for name, i, j in self.steps:
            values.append(STEPS[name](self, values[i % len(values)], values[j % len(values)]))
        return tuple(values[-self.outputs :])


def _attention(net: Random, a: Tensor, b: Tensor) -> Tensor:
    q, k = (y.flatten(2).transpose(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for y in (a, b))
    y = F.scaled_dot_product_attention(q, k, k)
    return y.transpose(1, 2).flatten(2).transpose(1, 2).view(2, WIDTH, 4, WIDTH)


def _scores(net: Random, a: Tensor, b: Tensor) -> Tensor:
    return torch.softmax(a @ b.transpose(-1, -2) * 0.3, -1) @ b


def _gate(net: Random, a: Tensor, b: Tensor) -> Tensor:
    value, gate = torch.cat([a, b], 1).chunk(2, 1)
    return value * torch.sigmoid(gate)


STEPS: dict[str, Callable[[Random, Tensor, Tensor], Tensor]] = {
    "norm": lambda net, a, b: F.group_norm(a, 4, net.scale, net.shift),
    "plain norm": lambda net, a, b: F.group_norm(a, 2),
    "layer norm": lambda net, a, b: F.layer_norm(a, (WIDTH,), net.scale, net.shift),
    "silu": lambda net, a, b: F.silu(a),
    "swish": lambda net, a, b: a * torch.sigmoid(a),
    "gelu": lambda net, a, b: F.gelu(a),
    "relu": lambda net, a, b: F.relu(a),
    "tanh": lambda net, a, b: torch.tanh(a),
    "linear": lambda net, a, b: net.linear(a),
    "conv": lambda net, a, b: net.conv(a),
    "add": lambda net, a, b: a + b,
    "mul": lambda net, a, b: torch.tanh(a) * torch.tanh(b),
    "copy": lambda net, a, b: a.clone().contiguous() * 1.0,
    "cast": lambda net, a, b: a.to(b.dtype),
    "view": lambda net, a, b: (
        a.permute(0, 2, 3, 1).contiguous().view(2, 4, -1).view(2, 4, WIDTH, WIDTH).permute(0, 3, 1, 2)
    ),
    "attention": _attention,
    "scores": _scores,
    "gate": _gate,
}


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_mean_the_same(seed: int) -> None:
    draw = random.Random(seed)
    steps = [(draw.choice(sorted(STEPS)), draw.randrange(64), draw.randrange(64)) for _ in range(4 + 4 * seed)]
    outputs = draw.randint(1, 3)
    torch.manual_seed(seed)
    net, x = Random(steps, outputs).eval(), torch.randn(2, WIDTH, 4, WIDTH)
    before = capture(net, (x,))
    want = net.double()(x.double())
    once = check(rewrite(before))
    for after in (once, fuse_epilogues(once), fuse_epilogues(merge_linears(once))):
        for i, (got, exact) in enumerate(zip(interpret(check(after), x), want, strict=True)):
            assert_close(f"output {i}", got, exact.detach(), CLOSE)
    again = rewrite(once)
    assert (again.nodes, again.outputs) == (once.nodes, once.outputs)
    low = rewrite(before, torch.bfloat16)
    assert [o.dtype for o in interpret(check(low), x)] == [torch.float32] * len(want)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as exported", "bfloat16"])
def test_sizes_that_vary(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(widths=(32, 64), attention=(False, True), head_dim=32, context_width=32, time_width=64, groups=8)
    )
    for p in unet.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)

    def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(batch, 3, 16, 16), torch.rand(batch) * 999, torch.randn(batch, tokens, 32)

    dynamic = {"x": {0: "batch"}, "t": {0: "batch"}, "context": {0: "batch", 1: "tokens"}}
    before = capture(unet, inputs(2, 5), dynamic=dynamic)
    after = check(rewrite(before, dtype))
    assert after.counts()["fusegen.attention.default"] == 8
    assert after.inputs == before.inputs and after.symbols == before.symbols
    for batch, tokens in ((1, 5), (3, 9)):
        given = inputs(batch, tokens)
        (got,), (want,) = interpret(after, *given), interpret(before, *given)
        assert_close("x", got, want.double(), CLOSE if dtype is None else Tolerance(rms=0.03, peak=0.04))
