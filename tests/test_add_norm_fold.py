"""A residual addition, gated or not, and the norm of its sum become one op where a kernel takes them."""

from __future__ import annotations

import peers
import pytest
import torch
import torch.nn.functional as F
from networks import relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.runtime import api
from fusegen.runtime.add_norm import RULE

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
FUSED = "kernel add_norm C++"


class Block(nn.Module):
    """x + gate * branch, its norm, and the sum used again; options say how."""

    def __init__(self, kind: str = "layer", gate: str = "rows", late: bool = False, **more: bool):
        super().__init__()
        self.kind, self.gate, self.late, self.more = kind, gate, late, more
        self.branch, self.after = nn.Linear(24, 24), nn.Linear(24, 24)
        self.table = nn.Linear(24, 72)

    def forward(self, x: Tensor) -> Tensor:
        gate, scale, shift = self.table(F.silu(x[:, 0])).chunk(3, 1)
        gate = {"rows": gate[:, None], "whole": torch.sin(x), "samples": gate[:, None, :1]}[self.gate]
        scaled = gate * torch.tanh(self.branch(x))
        total = torch.add(x, scaled, alpha=2) if self.more.get("twice") else scaled + x
        early = torch.cos(total) if self.late else None
        if self.kind == "layer":
            y = F.layer_norm(total, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        else:
            y = F.rms_norm(total, (24,), self.after.bias, 1e-6)
        y = self.after(y) if early is None else self.after(y) + early
        return torch.tanh(y + scaled if self.more.get("again") else y) * total


def planned(module: nn.Module, *inputs: Tensor, bound: float = 1e-5, **more: str) -> tuple[dict[str, int], list[str]]:
    """The plan's bindings and why the rule left a match, once the session gives what the module gives."""
    session = api.compile(api.capture(module.eval(), inputs), **more)
    with torch.no_grad():
        want = module(*inputs)
    for _ in range(2):  # the second run replays what the first one bound
        assert relative(session(*inputs), want) <= bound
    left = [line for a in session.plan.applied if a.rule == RULE for line in a.left]
    return session.plan.counts(), left


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("gate", ["rows", "whole"])
def test_they_become_one(kind: str, gate: str, dtype: str, bound: float) -> None:
    torch.manual_seed(0)
    counts, left = planned(Block(kind, gate), torch.randn(2, 7, 24), bound=bound, dtype=dtype)
    assert counts[FUSED] == 1 and left == []
    assert f"kernel {kind}_norm C++" not in counts and "aten aten.add.Tensor" not in counts


def test_without_a_gate_of_its_own_the_addition_is_still_taken() -> None:
    torch.manual_seed(0)
    counts, left = planned(Block(again=True), torch.randn(2, 7, 24))  # the product is read again, so it stays
    assert counts[FUSED] == 1 and left == [] and "kernel layer_norm C++" not in counts
    assert "aten aten.mul.Tensor" in counts


@pytest.mark.parametrize("options", [{"late": True}, {"twice": True}], ids=["read before", "alpha"])
def test_what_stays_separate(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    counts, left = planned(Block(**options), torch.randn(2, 7, 24))
    assert FUSED not in counts and left == []


def test_a_gate_that_does_not_modulate_is_left_with_its_reason() -> None:
    torch.manual_seed(0)
    counts, left = planned(Block(gate="samples"), torch.randn(2, 7, 24))
    assert FUSED not in counts and len(left) == 1 and "gate of shape (2, 1, 1)" in left[0]


def test_where_no_kernel_takes_it_the_plan_says_why() -> None:
    op = registry.get("add_norm")
    kernels, op.kernels[:] = list(op.kernels), []
    try:
        counts, left = planned(Block(), torch.randn(2, 7, 24))
    finally:
        op.kernels[:] = kernels
    assert FUSED not in counts and len(left) == 1 and left[0].endswith("no kernel")


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_a_published_transformer(dtype: str, bound: float) -> None:
    """diffusers' DiT: each block has two, but the first sum of the network comes without a gate."""
    library_of = peers.diffusers()
    torch.manual_seed(0)
    net = library_of.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return self.net(x, timestep=t, class_labels=label, return_dict=False)[0]

    inputs = torch.randn(2, 4, 8, 8), torch.full((2,), 500), torch.tensor([3, 10])
    counts, left = planned(Call().requires_grad_(False), *inputs, bound=bound, dtype=dtype)
    assert counts[FUSED] == 6 and counts["kernel layer_norm C++"] == 1 and left == []
