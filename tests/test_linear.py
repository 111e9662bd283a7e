"""linear: against PyTorch's; a row's bits whatever the other rows are; and where a plan has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from networks import plainly, relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.linear import ACTIVATIONS
from fusegen.runtime import api
from fusegen.runtime.backends import cpu
from fusegen.runtime.few_rows import RULE

OP = registry.get("linear")
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x (M, K), weight (N, K), bias (N,), residual and multiplier (M, N)."""
    (m, n, k), g = shape, torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in ((m, k), (n, k), (n,), (m, n), (m, n))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_pytorch(activation: str) -> None:
    x, weight, bias, residual, multiplier = data(5, 37, 300)
    got = torch.ops.fusegen.linear(x, weight, bias, residual, activation, multiplier)
    plain = F.linear(x.double(), weight.double(), bias.double()) + residual.double()
    assert_close(activation, got, ACTIVATIONS[activation](plain) * multiplier.double(), OP.tolerance[torch.float32])


@needs_library
@pytest.mark.parametrize("level", library.levels() if library.available() else [None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(3, 40), (21, 1100), (64, 257)])
def test_a_rows_bits_are_its_own(level: str, dtype: torch.dtype, n: int, k: int) -> None:
    x, weight, *_ = data(23, n, k, dtype=dtype)
    with library.forced(level):
        whole = torch.ops.fusegen.linear(x, weight)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 13), slice(13, 23)):
            assert torch.equal(torch.ops.fusegen.linear(x[rows], weight), whole[rows])


class Layers(nn.Module):
    """A gated feed-forward network with a residual addition: every form that a product is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(48, 80, bias=False), nn.Linear(48, 80, bias=False), nn.Linear(80, 48)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def session(x: Tensor, dtype: str = "float32", deterministic: bool = False) -> Any:
    torch.manual_seed(1)
    program = api.capture(Layers().eval(), (x,), dynamic={"x": {0: ("batch", 1, 64), 1: ("n", 1, 64)}})
    return api.compile(program, dtype=dtype, deterministic=deterministic)


def layers(plan: Any) -> int:
    """How many nodes of a plan are the op."""
    return sum(s.node.op == "fusegen.linear.default" for s in plan.steps)


@needs_library
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_plan_has_it_for_few_rows(dtype: str, bound: float) -> None:
    x = torch.randn(3, 2, 48)
    made = session(x, dtype)
    torch.manual_seed(1)
    assert relative(made(x), plainly(Layers().eval(), x)) <= bound
    assert layers(made.plan) == 3 and {a.rule: a.count for a in made.plan.applied}[RULE] == 3
    many = torch.randn(2, cpu.BACKEND.few_rows.rows // 2 + 1, 48)
    made(many)
    assert layers(made.planned({"x": many})) == 0


@needs_library
def test_a_deterministic_plan_chooses_by_the_sample() -> None:
    x = torch.randn(40, 2, 48)
    made = session(x, deterministic=True)
    whole = made(x)
    assert layers(made.plan) == 3 and not any(s.binding.by_sample for s in made.plan.steps)
    assert torch.equal(made(x[:1])[0], whole[0]) and torch.equal(made(x[7:12]), whole[7:12])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 8, dtype=torch.float64)}, "of one dtype"),
        ({"weight": torch.zeros(4, 9)}, "not (*, K) and (N, K)"),
        ({"bias": torch.ones(5)}, "bias has shape (5,)"),
        ({"residual": torch.ones(2, 4)}, "the output has (3, 4)"),
        ({"multiplier": torch.ones(3, 5)}, "the output has (3, 4)"),
        ({"activation": "swish"}, "none, relu, gelu, gelu_tanh, silu, quick_gelu"),
        ({"x": torch.tensor(1.0)}, "not (*, K)"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        OP.allocate(**{"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8)} | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
