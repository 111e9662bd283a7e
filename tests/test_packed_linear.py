"""packed_linear and packed_gated_linear: against PyTorch's; a row's bits whatever the others are; what a plan makes of
layers of many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, same_bits
from networks import plainly, relative
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library
from fusegen.kernels.linear import ACTIVATIONS
from fusegen.runtime import api, many_rows, stored
from fusegen.runtime.backends import cpu

PLAIN, GATED = registry.get("packed_linear"), registry.get("packed_gated_linear")
LEVELS = library.levels() if library.available() else ()
needs_library = pytest.mark.skipif(not library.available(), reason=library.missing() or "")


def panels(weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """For products of the weight's dtype."""
    made: Tensor = torch.ops.fusegen.linear_panels(weight, gate, weight.dtype)
    return made


def data(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x (M, K), weight and gate (N, K), bias and gate's bias (N,), residual (M, N)."""
    (m, n, k), g = shape, torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(dtype) for s in ((m, k), (n, k), (n, k), (n,), (n,), (m, n))]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", many_rows.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(9, 37, 301), (131, 64, 96), (300, 70, 17)])
def test_they_are_the_layers(level: str, dtype: torch.dtype, activation: str, m: int, n: int, k: int) -> None:
    x, weight, gate, bias, gate_bias, residual = data(m, n, k, dtype=dtype)
    with library.forced(level):
        plain = torch.ops.fusegen.packed_linear(x, panels(weight), n, bias, residual, activation)
        gated = torch.ops.fusegen.packed_gated_linear(x, panels(weight, gate), n, bias, gate_bias, activation)
    product = F.linear(x.double(), weight.double(), bias.double())
    assert_close("y", plain, ACTIVATIONS[activation](product + residual.double()), PLAIN.tolerance[x.dtype])
    opened = ACTIVATIONS[activation](F.linear(x.double(), gate.double(), gate_bias.double()))
    assert_close("gated", gated, opened * product, GATED.tolerance[x.dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", many_rows.DTYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 40), (21, 1101), (160, 256)])
def test_a_rows_bits_are_its_own(level: str, dtype: torch.dtype, n: int, k: int) -> None:
    x, weight, gate, *_ = data(283, n, k, dtype=dtype)
    packed, both = panels(weight), panels(weight, gate)
    with library.forced(level):
        plain = torch.ops.fusegen.packed_linear(x, packed, n)
        gated = torch.ops.fusegen.packed_gated_linear(x, both, n)
        for rows in (slice(0, 1), slice(1, 8), slice(3, 136), slice(130, 283)):
            assert same_bits(torch.ops.fusegen.packed_linear(x[rows], packed, n), plain[rows])
            assert same_bits(torch.ops.fusegen.packed_gated_linear(x[rows], both, n), gated[rows])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", many_rows.DTYPES)
@pytest.mark.parametrize("k", [1, 16, 33])
def test_what_lies_behind_a_row_or_in_another_is_not_read_into_it(level: str, dtype: torch.dtype, k: int) -> None:
    x, weight, gate, *_ = data(20, 40, k, dtype=dtype)
    wide = torch.full((20, k + 1), float("nan"), dtype=x.dtype)
    wide[:, :k] = x
    wide[7, :k] = float("inf")
    with library.forced(level):
        for op, packed in (("packed_linear", panels(weight)), ("packed_gated_linear", panels(weight, gate))):
            call = getattr(torch.ops.fusegen, op)
            got, want = call(wide[:, :k], packed, 40), call(x, packed, 40)
            others = [r for r in range(20) if r != 7]
            assert same_bits(got[others], want[others]) and not got[7].isfinite().any()


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("packed_linear", {"panels": torch.zeros(2, 4, 32, 2).double()}, "panels are torch.float64"),
        ("packed_linear", {"outputs": 65}, "panels have shape (2, 4, 32, 2)"),
        ("packed_linear", {"x": torch.zeros(3, 9).bfloat16()}, "it is (2, 5, 32, 2)"),
        ("packed_linear", {"x": torch.zeros(3, 8), "panels": torch.zeros(3, 7, 16, 1)}, "or (3, 8, 16, 1)"),
        ("packed_linear", {"bias": torch.ones(5)}, "bias has shape (5,)"),
        ("packed_linear", {"residual": torch.ones(2, 40)}, "the output has (3, 40)"),
        ("packed_linear", {"activation": "swish"}, "none, relu, gelu, gelu_tanh, silu"),
        ("packed_gated_linear", {"outputs": 40}, "it is (3, 4, 32, 2)"),
        ("packed_gated_linear", {"outputs": 20, "gate_bias": torch.ones(21)}, "gate_bias has shape (21,)"),
        ("linear_panels", {"weight": torch.zeros(3, 4, 3, 3)}, "not (N, K) or (N, K, 1, 1)"),
        ("linear_panels", {"weight": torch.zeros(3, 4), "gate": torch.zeros(3, 5)}, "gate is torch.float32 (3, 5)"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(op: str, change: dict[str, Any], message: str) -> None:
    half = {"dtype": torch.bfloat16}
    x, held = torch.zeros(3, 8, **half), torch.zeros(2, 4, 32, 2, **half)
    given = {} if op == "linear_panels" else {"x": x, "panels": held, "outputs": 40}
    with pytest.raises(ValueError) as caught:
        registry.get(op).allocate(**given | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Block(nn.Module):
    """A spatial transformer's products: a 1x1 convolution, a gated feed-forward layer with a residual, and another
    1x1 convolution that the image is added to.  ``kind`` changes one thing."""

    def __init__(self, kind: str = ""):
        super().__init__()
        self.kind, self.enter = kind, nn.Conv2d(3, 64, 3, padding=1)
        self.first, self.last = nn.Conv2d(64, 72, 1), nn.Conv2d(72, 64, 1, stride=2 if kind == "stride" else 1)
        self.up, self.down = nn.Linear(72, 200), nn.Linear(100, 72)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)  # channels-last from here on
        y = self.first(x)
        rows = y.permute(0, 2, 3, 1).flatten(1, 2)
        value, gate = self.up(rows).chunk(2, -1)
        if self.kind == "gate used":
            return value * F.gelu(gate) + gate
        rows = rows + self.down(value * F.gelu(gate))
        z = self.last(rows.transpose(1, 2).reshape(y.shape))
        return z if self.kind == "stride" else z + x


def image(batch: int, side: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, side, side, generator=g)


def session(kind: str = "", dtype: str = "bfloat16", deterministic: bool = False) -> Any:
    torch.manual_seed(1)
    dynamic = {"x": {0: ("batch", 1, 64), 2: ("side", 3, 64), 3: "side"}}
    program = api.capture(Block(kind).eval(), (image(2),), dynamic=dynamic)
    return api.compile(program, dtype=dtype, deterministic=deterministic)


def packed(plan: Any) -> dict[str, int]:
    """How many nodes of a plan are each of the ops."""
    found = [s.node.op.split(".")[1] for s in plan.steps]
    return {op: found.count(op) for op in ("packed_linear", "packed_gated_linear")}


@pytest.fixture
def at_any_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan takes the ops at this machine's level, where its library may be faster."""
    monkeypatch.setattr(cpu.Cpu, "unpacked", lambda self, dtype: None)


@needs_library
def test_a_session_has_them_for_many_rows(at_any_level: None) -> None:
    made = session()
    torch.manual_seed(1)
    module = Block().eval()
    for side in (9, 12):
        for _ in range(2):  # the second run replays what the first one bound
            assert relative(made(image(2, side)), plainly(module, image(2, side))) <= 2e-2
        assert packed(made.plan) == {"packed_linear": 3, "packed_gated_linear": 1}
        assert {a.rule: (a.count, a.left) for a in made.plan.applied}[many_rows.RULE] == (4, ())
    assert sum("linear_panels" in request for request in made.weights.made) == 4  # for both captures


@needs_library
def test_panels_are_made_of_what_is_stored(at_any_level: None) -> None:
    """To the bit what a copy in bfloat16 gives, without one."""
    made = session()
    got = made(image(2))
    steps = [s for s in made.plan.steps if s.node.op == "fusegen.linear_panels.default"]
    assert len(steps) == 4 and all(s.binding.name == "linear_panels C++" for s in steps)
    for step in steps:
        assert step.node.args["dtype"] is torch.bfloat16
        assert {made.plan.program.weights[name].dtype for name in step.node.inputs()} == {torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "folded", lambda program: program)
        other = session()
        assert torch.equal(other(image(2)), got)
    assert all(s.node.args["dtype"] is None for s in other.plan.steps if s.node.op == "fusegen.linear_panels.default")


@needs_library
def test_few_rows_stay(at_any_level: None) -> None:
    made = session()
    made(image(1, 3))
    assert packed(made.plan) == {"packed_linear": 0, "packed_gated_linear": 0}


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_float32_has_them_where_the_library_is_slower(level: str) -> None:
    torch.manual_seed(1)
    module = Block().eval()
    with library.forced(level):
        made = session(dtype="float32")
        got = made(image(2))
        assert relative(got, plainly(module, image(2))) <= 1e-6
        assert torch.equal(made(image(2)), got)
        (left,) = [a.left for a in made.plan.applied if a.rule == many_rows.RULE]
    counts = (3, 1) if level == "avx2" else (0, 0)
    assert packed(made.plan) == dict(zip(("packed_linear", "packed_gated_linear"), counts, strict=True))
    assert not left if level == "avx2" else left == (f"5 layers: at level {level} they are oneDNN's",)


@needs_library
@pytest.mark.parametrize(("name", "value"), [("LARGE", 72 * 64 - 1), ("FEW", 82), ("NARROW", 73)])
def test_the_rule_goes_by_rows_and_sizes(
    at_any_level: None, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(many_rows, name, value)
    made = session()
    made(image(1))
    assert packed(made.plan)["packed_linear"] == 0
    made(image(2))  # of 162 rows
    assert packed(made.plan)["packed_linear"] == (0 if name == "NARROW" else 3)


@needs_library
@pytest.mark.parametrize(("kind", "plain", "gated"), [("stride", 2, 1), ("gate used", 2, 0)])
def test_what_does_not_fit_stays(at_any_level: None, kind: str, plain: int, gated: int) -> None:
    made = session(kind)
    torch.manual_seed(1)
    assert relative(made(image(2)), plainly(Block(kind).eval(), image(2))) <= 2e-2
    assert packed(made.plan)["packed_gated_linear"] == gated and packed(made.plan)["packed_linear"] == plain


@needs_library
def test_a_deterministic_plan_chooses_by_the_sample(at_any_level: None) -> None:
    made = session(deterministic=True)
    whole = made(image(5))
    cut = [s.node.op for s in made.plan.steps if s.binding.by_sample]
    assert packed(made.plan) == {"packed_linear": 3, "packed_gated_linear": 1} and cut == ["runtime.conv2d"]
    assert torch.equal(made(image(5)[:1])[0], whole[0]) and torch.equal(made(image(5)[2:4]), whole[2:4])
    made(image(5, 3))
    assert packed(made.plan) == {"packed_linear": 0, "packed_gated_linear": 0}


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="no level that has products of bfloat16 runs here")
@pytest.mark.parametrize("level", [level for level in LEVELS if level in ("avx512_bf16", "amx")])
def test_a_cpu_with_products_of_bfloat16_has_them(level: str) -> None:
    with library.forced(level):
        made = session()
        made(image(2))
    assert packed(made.plan) == {"packed_linear": 3, "packed_gated_linear": 1}


@needs_library
def test_where_the_library_is_faster_the_plan_says_so() -> None:
    with library.forced("scalar"):
        made = session()
        made(image(2))
        (left,) = [a.left for a in made.plan.applied if a.rule == many_rows.RULE]
    assert packed(made.plan) == {"packed_linear": 0, "packed_gated_linear": 0} and "level scalar" in left[0]
