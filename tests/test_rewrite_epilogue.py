"""fuse_epilogues() and merge_linears(): what joins a product, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from interpret import interpret
from torch import Tensor, nn

from fusegen.kernels.op import Tolerance
from fusegen.models.unet import FeedForward, UNet, UNetConfig
from fusegen.runtime.api import capture
from fusegen.runtime.program import Node, Program, check
from fusegen.runtime.rewrite import rewrite
from fusegen.runtime.rewrite.epilogue import ACTIVATIONS, EAGER, fuse_epilogues, merge_linears

CLOSE = Tolerance(rms=2e-6, peak=1e-5)
X, IMAGE = torch.randn(2, 5, 8), torch.randn(2, 8, 6, 6)


class Net(nn.Module):
    """Layers ``a`` and ``b``, linear or convolutional, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], conv: bool = False, bias: bool = True):
        super().__init__()
        make = (lambda: nn.Conv2d(8, 8, 3, padding=1, bias=bias)) if conv else (lambda: nn.Linear(8, 8, bias=bias))
        self.a, self.b, self.function = make(), make(), function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.a, self.b, *inputs)


def fused(module: nn.Module, *inputs: Tensor, step: Callable[[Program], Program] = fuse_epilogues) -> Program:
    """The module's program after ``step``, once it is seen to mean the same and to be left alone by a second one."""
    before = rewrite(capture(module, inputs))
    after = check(step(before))
    for got, want in zip(interpret(after, *inputs), interpret(before, *inputs), strict=True):
        assert_close("output", got, want.double(), CLOSE)
    assert step(after).nodes == after.nodes
    return after


def only(program: Program) -> Node:
    (node,) = program.nodes
    return node


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv2d"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", [a for a in ACTIVATIONS if a != "none"])
def test_activation_joins(name: str, conv: bool, bias: bool) -> None:
    inputs = (IMAGE,) if conv else (X,)
    plain = only(fused(Net(lambda a, b, x: ACTIVATIONS[name](a(x)), conv, bias), *inputs))
    assert plain.op == ("runtime.conv2d" if conv else "runtime.linear")
    assert (plain.args["activation"], plain.args["residual"], plain.args["multiplier"]) == (name, None, None)
    both = only(fused(Net(lambda a, b, x: ACTIVATIONS[name](x + a(x)), conv, bias), *inputs))
    assert (both.args["activation"], both.args["residual"].name) == (name, both.args["input"].name)


def test_the_later_of_two_products_takes_the_other() -> None:
    after = fused(Net(lambda a, b, x: b(x) + a(torch.sin(x)), conv=True), IMAGE)
    assert [n.op for n in after.nodes] == ["aten.conv2d.default", "aten.sin.default", "runtime.conv2d"]
    assert after.nodes[2].args["residual"].name == after.nodes[0].outputs[0]
    assert after.nodes[2].args["padding"] == (1, 1)


def test_gate_joins() -> None:
    gate, value = fused(Net(lambda a, b, x: a(x) * F.silu(b(x))), X).nodes
    assert (gate.args["activation"], gate.args["multiplier"]) == ("silu", None)
    assert (value.args["activation"], value.args["multiplier"].name) == ("none", gate.outputs[0])


def test_gated_feed_forward_reads_no_half_back() -> None:
    module = FeedForward(8, 12)
    after = fused(module, X)
    assert [n.op for n in after.nodes] == ["runtime.linear", "runtime.linear", "aten.linear.default"]
    gate, value, _ = after.nodes
    assert (gate.args["activation"], value.args["multiplier"].name) == ("gelu", gate.outputs[0])
    half = after.weights[gate.args["weight"].name]
    assert half.data_ptr() == module.up.weight[12:].data_ptr()  # a view: no weight was copied


SEPARATE: dict[str, Callable[..., Any]] = {
    "used twice": lambda a, b, x: (lambda y: F.silu(y) + torch.sin(y))(a(x)),
    "an output itself": lambda a, b, x: (lambda y: (F.silu(y), y))(a(x)),
    "added to itself": lambda a, b, x: (lambda y: y + y)(a(x)),
    "broadcast": lambda a, b, x: a(x[:, :1]) + x,
    "scaled addition": lambda a, b, x: torch.add(x, a(x), alpha=2),
    "a number": lambda a, b, x: a(x) + 2.0,
    "another dtype": lambda a, b, x: a(x) + x.double(),
    "of integers": lambda a, b, x: a(x) + (x > 0).long(),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_what_stays_separate(name: str) -> None:
    after = fused(Net(SEPARATE[name]), X)
    assert not any(n.op.startswith("runtime.") for n in after.nodes)


def test_order_of_activation_and_residual() -> None:
    """silu(a(x)) + x is not silu(a(x) + x)."""
    after = fused(Net(lambda a, b, x: F.silu(a(x)) + x), X)
    assert [n.op for n in after.nodes] == ["runtime.linear", "aten.add.Tensor"]
    assert after.nodes[0].args["residual"] is None
    twice = fused(Net(lambda a, b, x: F.relu(F.silu(a(x)))), X)
    assert [n.op for n in twice.nodes] == ["runtime.linear", "aten.relu.default"]


def test_meanings_on_meta_tensors() -> None:
    x, w = torch.empty(2, 8, 6, 6, device="meta"), torch.empty(4, 8, 3, 3, device="meta")
    assert EAGER["runtime.conv2d"](x, w, stride=(2, 2), padding=(1, 1), activation="relu").shape == (2, 4, 3, 3)
    assert EAGER["runtime.linear"](x, torch.empty(5, 6, device="meta")).shape == (2, 8, 6, 5)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_linears_of_one_input_are_merged(bias: bool) -> None:
    after = fused(Net(lambda a, b, x: torch.sin(a(x)) + torch.cos(b(x)), bias=bias), X, step=merge_linears)
    assert after.counts()["aten.linear.default"] == 1
    assert sorted(w.shape[0] for w in after.weights.values()) == ([16, 16] if bias else [16])
    apart = fused(Net(lambda a, b, x: torch.sin(a(x)) + torch.cos(b(x + 1))), X, step=merge_linears)
    assert apart.counts()["aten.linear.default"] == 2
    returned = fused(Net(lambda a, b, x: (a(x), b(x))), X, step=merge_linears)
    assert returned.counts()["aten.linear.default"] == 2


def test_a_whole_network() -> None:
    sizes = UNetConfig(widths=(32, 64), attention=(False, True), head_dim=32, context_width=32, time_width=64, groups=8)
    unet = UNet(sizes)
    for p in unet.parameters():
        nn.init.normal_(p, std=0.05)
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2) * 999, torch.randn(2, 4, 32)
    after = fused(unet, *inputs, step=lambda p: fuse_epilogues(merge_linears(p)))
    left = [n for n in after.nodes if n.op == "aten.add.Tensor"]
    made = {o: n for n in after.nodes for o in n.outputs}
    views = {"aten.unsqueeze.default", "aten.permute.default"}  # of the time embedding, and back to an image
    assert left and all(made[n.args["other"].name].op in views for n in left)
    assert not any(n.op in ("aten.gelu.default", "aten.silu.default", "aten.mul.Tensor") for n in after.nodes[8:])
