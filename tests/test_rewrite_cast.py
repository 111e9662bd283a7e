"""rewrite(dtype=...): what is rounded, and what stays in float32."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from interpret import interpret
from torch import Tensor, nn

from fusegen.models.unet import UNet, UNetConfig, timestep_embedding
from fusegen.runtime.api import capture
from fusegen.runtime.program import Node, Program, check
from fusegen.runtime.rewrite import rewrite

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def dtype_of(program: Program, name: str) -> torch.dtype:
    for known in (program.specs, program.inputs, program.weights):
        if name in known:
            return known[name].dtype
    raise KeyError(name)


def casts(program: Program) -> list[Node]:
    return [n for n in program.nodes if n.op == "aten.to.dtype"]


def run(program: Program, *inputs: Tensor) -> Tensor:
    """The one output, once every value is seen to have the dtype that its spec says."""
    watched = Program(program.name, program.nodes, program.inputs, tuple(program.specs), program.weights)
    for name, value in zip(watched.outputs, interpret(watched, *inputs), strict=True):
        assert value.dtype == program.specs[name].dtype, name
    (out,) = interpret(check(program), *inputs)
    return out


def only(program: Program, op: str) -> Node:
    (node,) = (n for n in program.nodes if n.op == op)
    return node


def test_only_the_edges_of_a_network_are_cast() -> None:
    sizes = UNetConfig(widths=(32, 64), attention=(False, True), head_dim=32, context_width=32, time_width=64, groups=8)
    unet, inputs = UNet(sizes).eval(), (torch.randn(2, 3, 16, 16), torch.rand(2) * 999, torch.randn(2, 4, 32))
    before = capture(unet, inputs)
    after = rewrite(before, BF16)
    run(after, *inputs)
    into = [n for n in casts(after) if n.args["dtype"] == BF16]
    assert len(into) == 3  # x, context, the time embedding
    assert [n.outputs[0] for n in casts(after) if n.args["dtype"] == F32] == list(after.outputs)
    big = [w for w in after.weights.values() if w.dim() > 1 and w.shape[0] > 1]
    assert {w.dtype for w in big} == {BF16}
    for node in after.nodes:
        if node.op.startswith("fusegen.") and "norm" in node.op:
            assert dtype_of(after, node.args["weight"].name) == F32
        if node.op.startswith(("aten.linear", "aten.conv2d")):
            assert dtype_of(after, node.args["input"].name) == BF16
    assert dtype_of(after, only(after, "aten.sin.default").outputs[0]) == F32


def test_weights_are_shared_where_they_keep_their_dtype() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    before = capture(module, (torch.randn(2, 8),))
    same = rewrite(before, F32)
    assert {id(w) for w in same.weights.values()} == {id(w) for w in before.weights.values()}
    low = rewrite(before, BF16)
    there = [w for w in low.weights.values() if isinstance(w, Tensor)]
    kept = {w.data_ptr() for w in before.weights.values()} & {w.data_ptr() for w in there}
    assert len(kept) == 2  # the norm's
    assert len(low.weights) == 4  # the others were replaced, not added to


class Times(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.proj = nn.Linear(width, 4)
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        return self.proj(timestep_embedding(t, self.width).to(self.proj.weight.dtype))


def test_time_steps_are_embedded_in_float32() -> None:
    t = torch.tensor([1.0, 514.3, 998.7])
    module = Times()
    out = run(rewrite(capture(module, (t,)), BF16), t)
    with torch.no_grad():
        exact = copy.deepcopy(module).to(BF16).float()(t)
        rounded = module.to(BF16)(t.bfloat16()).float()
    assert (out - exact).norm() < 0.01 * exact.norm()
    assert (rounded - exact).norm() > 0.1 * exact.norm()  # what it would be otherwise: the test can fail


class Rotary(nn.Module):
    """Positions times frequencies, as in transformers' Llama, whose product must not be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        freqs = self.inv_freq[None, :, None].float() @ positions[:, None, :].float()
        angles = torch.cat((freqs, freqs), dim=1).transpose(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q = self.q(x)
        return q * cos + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin


def test_rotary_angles_are_computed_in_float32() -> None:
    x, positions = torch.randn(1, 5, 8), torch.tensor([[3, 700, 1027, 4099, 16001]])
    module = Rotary()
    after = rewrite(capture(module, (x, positions)), BF16)
    with torch.no_grad():
        exact = module(x, positions)
    assert (run(after, x, positions) - exact).norm() < 0.015 * exact.norm()
    assert dtype_of(after, only(after, "aten.cos.default").outputs[0]) == F32
    assert dtype_of(after, only(after, "fusegen.rope.default").outputs[0]) == BF16


class Upcasts(nn.Module):
    """A norm of fourth powers, which is no fused op, and a softmax with casts for precision, then casts back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        h = x.float()
        h = h * torch.rsqrt(h.pow(4).mean(-1, keepdim=True) + 1e-6)
        y = self.down(self.weight * h.to(x.dtype)) + x
        return torch.softmax(y.float() * 3, -1).to(x.dtype).neg()


def test_casts_for_precision_stay_and_casts_to_the_model_go() -> None:
    x = torch.randn(3, 5, 16)
    module = Upcasts()
    after = rewrite(capture(module, (x,)), BF16)
    out = run(after, x)
    assert dtype_of(after, only(after, "aten.pow.Tensor_Scalar").outputs[0]) == F32
    assert dtype_of(after, only(after, "aten.softmax.int").outputs[0]) == F32
    assert dtype_of(after, only(after, "aten.neg.default").outputs[0]) == BF16
    adds = [dtype_of(after, n.outputs[0]) for n in after.nodes if n.op == "aten.add.Tensor"]
    assert adds == [F32, BF16]  # epsilon's, the residual one
    low = copy.deepcopy(module).to(BF16)
    with torch.no_grad():
        assert (out - low(x.bfloat16()).float()).abs().max() < 0.02


def test_plain_casts_to_the_model_leave_no_float32_islands() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w).to(torch.float32).reshape(2, -1).to(torch.float32)
        return F.silu(y.reshape(2, 3, 4).to(torch.float32)) @ w

    x, w = torch.randn(2, 3, 4), torch.randn(4, 4)
    after = rewrite(capture(_Function(forward, w), (x,)), BF16)
    run(after, x)
    assert len(casts(after)) == 2  # in and out


class _Function(nn.Module):
    def __init__(self, function, w: Tensor):
        super().__init__()
        self.function, self.w = function, nn.Parameter(w)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, self.w)


class Halved(nn.Module):
    """A model whose weights, and own casts, are float16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 16)
        self.half()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.up(self.norm(x.half()))
        scores = (h @ h.transpose(-1, -2)).float() + (1 - mask[:, None].to(torch.float16)) * -1e4
        y = torch.softmax(scores, -1).to(torch.float16) @ h + torch.ones(16, dtype=torch.float16)
        return y.float()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, None], ids=str)
def test_a_float16_model_runs_in_other_dtypes(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    module = Halved()
    before = capture(module, (x, mask))
    after = rewrite(before, dtype)
    out = run(after, x, mask)
    (want,) = interpret(before, x, mask)
    assert out.dtype == want.dtype == F32
    assert (out - want).norm() < {F32: 2e-3, BF16: 2e-2}.get(dtype, 2e-3) * want.norm()
    if dtype in (F32, BF16):
        made = {dtype_of(after, o) for n in after.nodes for o in n.outputs}
        assert F16 not in made and F16 not in {w.dtype for w in after.weights.values()}


def test_outputs_and_inputs_keep_their_dtypes() -> None:
    module = nn.Linear(8, 8).half()
    before = capture(module, (torch.randn(2, 8).half(),))
    after = rewrite(before, BF16)
    assert after.inputs == before.inputs
    assert run(after, torch.randn(2, 8).half()).dtype == F16


def test_a_weight_in_two_roles_has_a_copy_for_each() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.layer_norm(x, (4,), w, w) + w

    x, w = torch.randn(3, 4), torch.randn(4)
    after = rewrite(capture(_Function(forward, w), (x,)), BF16)
    run(after, x)
    assert sorted(str(v.dtype) for v in after.weights.values()) == ["torch.bfloat16", "torch.float32"]


def test_integers_and_booleans_are_left_alone() -> None:
    def forward(tokens: Tensor, w: Tensor) -> Tensor:
        h = F.embedding(tokens, w)
        return torch.where((tokens != 0)[..., None], h, 0.0) * (tokens * 2)[..., None]

    tokens, w = torch.randint(0, 5, (2, 6)), torch.randn(5, 4)
    after = rewrite(capture(_Function(forward, w), (tokens,)), BF16)
    assert run(after, tokens).dtype == F32
    assert dtype_of(after, only(after, "aten.embedding.default").outputs[0]) == BF16
    assert len(casts(after)) == 1
