"""A concatenation or addition and the group norm of it become one op where a kernel takes them."""

from __future__ import annotations

import pytest
import torch
from networks import relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.runtime import api
from fusegen.runtime.join import RULE

pytestmark = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
FUSED = "kernel join_group_norm C++"


class Skip(nn.Module):
    """Two convolutions of one picture, joined, normed, and the joined tensor used again; options say how."""

    def __init__(self, kind: str = "concat", silu: bool = True, again: bool = True, dim: int = 1, third: bool = False):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.kind, self.silu, self.again, self.dim, self.third = kind, silu, again, dim, third
        channels = 12 if kind != "concat" or dim != 1 else 36 if third else 24
        self.norm = nn.GroupNorm(6, channels)
        self.shift = nn.Parameter(torch.randn(1, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.one(x)), torch.sin(self.two(x))
        if self.kind == "concat":
            joined = torch.cat([a, b, a] if self.third else [a, b], dim=self.dim)
        else:
            joined = torch.add(a, b, alpha=2) if self.kind == "twice" else a + (self.shift if self.kind == "row" else b)
        y = self.norm(joined)
        y = nn.functional.silu(y) if self.silu else y
        return torch.cos(y) + torch.tanh(joined) if self.again else torch.cos(y)


def planned(module: nn.Module, x: Tensor, bound: float = 1e-5, **more: str) -> tuple[dict[str, int], list[str]]:
    """The plan's bindings and why the rule left a match, once the session gives what the module gives."""
    session = api.compile(api.capture(module.eval(), (x,)), **more)
    with torch.no_grad():
        want = module(x)
    for _ in range(2):  # the second run replays what the first one bound
        assert relative(session(x), want) <= bound
    left = [line for a in session.plan.applied if a.rule == RULE for line in a.left]
    return session.plan.counts(), left


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kind", ["concat", "add"])
@pytest.mark.parametrize(("silu", "again"), [(True, True), (False, True), (True, False)])
def test_the_two_become_one(dtype: str, bound: float, kind: str, silu: bool, again: bool) -> None:
    torch.manual_seed(0)
    counts, left = planned(Skip(kind, silu, again), torch.randn(2, 3, 9, 7), bound, dtype=dtype)
    assert counts[FUSED] == 1 and left == []
    assert not [name for name in counts if "aten.cat" in name or ("group_norm" in name and name != FUSED)]


@pytest.mark.parametrize("kind", ["twice", "row"])
def test_other_additions_stay(kind: str) -> None:
    torch.manual_seed(0)
    counts, _ = planned(Skip(kind), torch.randn(2, 3, 9, 7))
    assert FUSED not in counts


@pytest.mark.parametrize("options", [{"dim": 2}, {"third": True}], ids=["rows", "three parts"])
def test_other_concatenations_stay(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    counts, _ = planned(Skip(**options), torch.randn(2, 3, 9, 7))
    assert FUSED not in counts


def test_where_no_kernel_takes_it_the_plan_says_why() -> None:
    op = registry.get("join_group_norm")
    kernels, op.kernels[:] = list(op.kernels), []
    try:
        counts, left = planned(Skip(), torch.randn(2, 3, 9, 7))
    finally:
        op.kernels[:] = kernels
    assert FUSED not in counts and len(left) == 1 and left[0].endswith("no kernel")


def test_a_norm_that_is_added_to_keeps_its_own_kernel() -> None:
    class Timed(Skip):
        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([self.one(x), self.two(x)], dim=1)
            return nn.functional.silu(self.norm(joined + x.mean((1, 2, 3))[:, None, None, None].expand(-1, 24, 1, 1)))

    torch.manual_seed(0)
    counts, _ = planned(Timed(), torch.randn(2, 3, 9, 7))
    assert FUSED not in counts
