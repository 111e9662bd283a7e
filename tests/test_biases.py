"""Biases of convolutions go to the norm, the linear layer or the convolution that adds them for nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import relative
from torch import Tensor, nn

from fusegen.runtime import api, backends
from fusegen.runtime.engine import Session
from fusegen.runtime.rewrite import biases, rewrite


class Block(nn.Module):
    """A residual block: a norm behind a convolution, one that adds an embedding, and a sum of two convolutions."""

    def __init__(self, short: int = 1, again: bool = False):
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.short = nn.Conv2d(8, 8, short, padding=short // 2)
        self.norms, self.embed = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(2)), nn.Linear(4, 8)
        self.again = again

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.first(x)
        h = self.middle(F.silu(self.norms[0](y)))
        h = self.last(F.silu(self.norms[1](h + self.embed(t)[:, :, None, None])))
        out = self.short(x) + h
        return torch.tanh(out + y if self.again else out)


def biased(program: object) -> list[str]:
    return [n.args["weight"].name for n in program.nodes if n.op == "aten.conv2d.default" and n.args["bias"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "left"),
    [({}, ["short.weight"]), ({"short": 3}, ["short.weight"]), ({"again": True}, ["first.weight", "short.weight"])],
    ids=["single pixels keep theirs", "two alike", "a result read twice"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_go_where_they_cost_nothing(options: dict[str, object], left: list[str], dtype: str) -> None:
    torch.manual_seed(0)
    module, inputs = Block(**options).eval(), (torch.randn(2, 8, 6, 5), torch.randn(2, 4))  # type: ignore[arg-type]
    program = rewrite(api.capture(module, inputs), None if dtype == "float32" else torch.bfloat16)
    changed = biases.moved(program)
    assert sorted(n.split("weight")[0] + "weight" for n in biased(changed)) == left
    assert changed.applied[-1].rule == biases.RULE and changed.applied[-1].count == 4 - len(left)
    with torch.no_grad():
        want = module(*inputs)
    bound = 1e-6 if dtype == "float32" else 2e-2
    assert relative(Session(changed, backends.get("eager"))(*inputs).float(), want) <= bound


def test_a_program_without_such_readers_is_left_as_it_is() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3))
    program = rewrite(api.capture(module.eval(), (torch.randn(1, 3, 9, 9),)), None)
    assert biases.moved(program) is program
