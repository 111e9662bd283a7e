"""packed_linear_int8 and packed_gated_linear_int8: the bits of linear_int8; a row's bits whatever the others are; what
a plan makes of int8 layers of many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, same_bits
from networks import plainly, relative
from test_packed_linear import Block, image
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.linear_int8 import ACTIVATIONS, codes_of, quantize_int8
from fusegen.runtime import api, many_rows_int8
from fusegen.runtime.backends import cpu

GATED = registry.get("packed_gated_linear_int8")
LEVELS = library.levels() if library.available() else ()
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")
panels = torch.ops.fusegen.linear_panels


def data(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """x (M, K), codes and scales of two weights (N, K), two biases (N,), residual (M, N)."""
    g = torch.Generator().manual_seed(0)
    x, first, second, bias, other, residual = (
        torch.randn(s, generator=g) for s in ((m, k), (n, k), (n, k), (n,), (n,), (m, n))
    )
    pairs = (*quantize_int8(first / k**0.5), *quantize_int8(second / k**0.5))
    return (x.to(dtype), *pairs, bias.to(dtype), other.to(dtype), residual.to(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(9, 37, 301), (131, 64, 128), (300, 70, 17)])
def test_they_are_the_layers(level: str, dtype: torch.dtype, activation: str, m: int, n: int, k: int) -> None:
    x, weight, scale, gate, gate_scale, bias, gate_bias, residual = data(m, n, k, dtype)
    with library.forced(level):
        got = torch.ops.fusegen.packed_linear_int8(x, panels(weight), scale, n, bias, residual, activation)
        want = torch.ops.fusegen.linear_int8(x, weight, scale, bias, residual, activation)
        gated = torch.ops.fusegen.packed_gated_linear_int8(
            x, panels(weight, gate), scale, gate_scale, n, bias, gate_bias, activation
        )
    assert torch.equal(got, want)
    codes, by = (t.double() for t in codes_of(x))
    factors = ((gate, gate_scale, gate_bias), (weight, scale, bias))
    opened, product = (codes @ w.double().t() * by * s.double() + b.double() for w, s, b in factors)
    assert_close("gated", gated, ACTIVATIONS[activation](opened) * product, GATED.tolerance[dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n", "k"), [(3, 40), (21, 2701), (160, 256)])
def test_a_rows_bits_are_its_own(level: str, n: int, k: int) -> None:
    x, weight, scale, gate, gate_scale, *_ = data(1183, n, k)
    packed, both = panels(weight), panels(weight, gate)
    with library.forced(level):
        plain = torch.ops.fusegen.packed_linear_int8(x, packed, scale, n)
        gated = torch.ops.fusegen.packed_gated_linear_int8(x, both, scale, gate_scale, n)
        for rows in (slice(0, 1), slice(1, 8), slice(3, 136), slice(130, 1183)):
            assert same_bits(torch.ops.fusegen.packed_linear_int8(x[rows], packed, scale, n), plain[rows])
            got = torch.ops.fusegen.packed_gated_linear_int8(x[rows], both, scale, gate_scale, n)
            assert same_bits(got, gated[rows])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", [1, 16, 65])
def test_what_lies_behind_a_row_or_in_another_is_not_read_into_it(level: str, k: int) -> None:
    x, weight, scale, gate, gate_scale, *_ = data(40, 40, k)
    wide = torch.full((40, k + 1), float("nan"), dtype=x.dtype)
    wide[:, :k] = x
    wide[7, :k] = float("inf")
    with library.forced(level):
        for op, args in (
            ("packed_linear_int8", (panels(weight), scale)),
            ("packed_gated_linear_int8", (panels(weight, gate), scale, gate_scale)),
        ):
            call = getattr(torch.ops.fusegen, op)
            got, want = call(wide[:, :k], *args, 40), call(x, *args, 40)
            others = [r for r in range(40) if r != 7]
            assert same_bits(got[others], want[others]) and not got[7].isfinite().any()


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("packed_linear_int8", {"panels": torch.zeros(2, 16, 32, 4)}, "panels are torch.float32"),
        ("packed_linear_int8", {"outputs": 65}, "panels have shape (2, 16, 32, 4)"),
        ("packed_linear_int8", {"x": torch.zeros(3, 65)}, "it is (2, 32, 32, 4)"),
        ("packed_linear_int8", {"scale": torch.ones(5)}, "scale has shape (5,)"),
        ("packed_linear_int8", {"bias": torch.ones(5)}, "bias has shape (5,)"),
        ("packed_linear_int8", {"residual": torch.ones(2, 40)}, "the output has (3, 40)"),
        ("packed_linear_int8", {"activation": "swish"}, "none, relu, gelu, gelu_tanh, silu"),
        ("packed_gated_linear_int8", {"outputs": 40}, "it is (3, 16, 32, 4)"),
        ("packed_gated_linear_int8", {"gate_scale": torch.ones(21)}, "gate_scale has shape (21,)"),
        ("packed_gated_linear_int8", {"gate_bias": torch.ones(21)}, "gate_bias has shape (21,)"),
        ("linear_panels", {"weight": torch.zeros(3, 4, dtype=torch.int8), "dtype": torch.bfloat16}, "codes stay"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(op: str, change: dict[str, Any], message: str) -> None:
    outputs = 20 if "gated" in op else 40
    given: dict[str, Any] = {"x": torch.zeros(3, 8), "panels": torch.zeros(2, 16, 32, 4, dtype=torch.int8)}
    given |= {"outputs": outputs, "scale": torch.ones(outputs)}
    given |= {"gate_scale": torch.ones(outputs)} if "gated" in op else {}
    with pytest.raises(ValueError) as caught:
        registry.get(op).allocate(**({} if op == "linear_panels" else given) | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def session(kind: str = "", dtype: str = "bfloat16", deterministic: bool = False) -> Any:
    torch.manual_seed(1)
    dynamic = {"x": {0: ("batch", 1, 64), 2: ("side", 3, 64), 3: "side"}}
    program = api.capture(Block(kind).eval(), (image(2),), dynamic=dynamic)
    return api.compile(program, dtype=dtype, deterministic=deterministic, quantize="int8")


def ops(plan: Any) -> tuple[int, ...]:
    """How many nodes of a plan are each of the packed ops, and linear_int8."""
    found = [s.node.op.split(".")[1] for s in plan.steps]
    return tuple(found.count(op) for op in ("packed_linear_int8", "packed_gated_linear_int8", "linear_int8"))


@pytest.fixture
def at_any_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan takes the ops at this machine's level, where others may be faster, also for 1x1 convolutions, which are
    plain where the library has no products of int8."""
    monkeypatch.setattr(cpu.Cpu, "no_int8_convolutions", lambda self: None)
    monkeypatch.setattr(cpu.Cpu, "unpacked_int8", lambda self: None)


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_session_has_them_for_many_rows(at_any_level: None, dtype: str) -> None:
    made = session(dtype=dtype)
    torch.manual_seed(1)
    module = Block().eval()
    for side in (9, 12):
        for _ in range(2):  # the second run replays what the first one bound
            assert relative(made(image(2, side)), plainly(module, image(2, side))) <= 2e-2
        assert ops(made.plan) == (3, 1, 0)
        assert {a.rule: (a.count, a.left) for a in made.plan.applied}[many_rows_int8.RULE] == (4, ())
    steps = [s for s in made.plan.steps if s.node.op == "fusegen.linear_panels.default"]
    assert len(steps) == 4 and all(s.phase == "constant" and s.outputs[0].dtype == torch.int8 for s in steps)
    assert sum("linear_panels" in request for request in made.weights.made) == 4  # for both captures


@needs_library
@pytest.mark.parametrize("gate_first", [False, True])
def test_the_gate_is_the_half_that_it_was(at_any_level: None, gate_first: bool) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(72, 200)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.up(x).chunk(2, -1)
            return two * F.silu(one) if gate_first else one * F.silu(two)

    torch.manual_seed(1)
    module, x = Gated().eval(), torch.randn(2, 70, 72)
    made = api.compile(api.capture(module, (x,)), dtype="float32", quantize="int8")
    assert relative(made(x), plainly(module, x)) <= 2e-2 and ops(made.plan) == (0, 1, 0)


@needs_library
def test_it_is_what_the_plan_had_before(at_any_level: None) -> None:
    """To the bit but for the gated layer, which rounds once less."""
    made = session("gate used")
    got = made(image(2))
    assert ops(made.plan) == (2, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many_rows_int8, "folded", lambda program, *_: program)
        other = session("gate used")
        assert torch.equal(other(image(2)), got) and ops(other.plan) == (0, 0, 2)


@needs_library
def test_few_rows_stay(at_any_level: None) -> None:
    made = session()
    made(image(1, 8))
    assert ops(made.plan) == (0, 0, 4)
    made(image(2, 6))
    assert ops(made.plan) == (3, 1, 0)


@needs_library
def test_a_deterministic_plan_gates_by_the_sample(at_any_level: None) -> None:
    made = session(deterministic=True)
    whole = made(image(5))
    assert ops(made.plan) == (3, 1, 0)
    assert torch.equal(made(image(5)[:1])[0], whole[0]) and torch.equal(made(image(5)[2:4]), whole[2:4])
    many = made(image(5, 7))
    assert ops(made.plan) == (4, 0, 0)
    assert torch.equal(made(image(5, 7)[:1])[0], many[0]) and ops(made.plan) == (0, 0, 4)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_only_amx_has_them(level: str) -> None:
    with library.forced(level):
        made = session()
        made(image(2))
        (applied,) = [a for a in made.plan.applied if a.rule == many_rows_int8.RULE]
    assert ops(made.plan)[:2] == ((3, 1) if level == "amx" else (0, 0))
    assert level == "amx" or f"level {level}" in applied.left[0]
