"""rewrite(): every spelling is found in exported form, and nothing else is touched."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from interpret import interpret
from torch import Tensor, nn

from fusegen.kernels import op as registry
from fusegen.kernels.op import Spelling, Tolerance
from fusegen.runtime.api import capture
from fusegen.runtime.errors import RequestError
from fusegen.runtime.program import Program, check
from fusegen.runtime.rewrite import bound, patterns, rewrite, trace

SPELLINGS = [(op, s) for op, given in patterns.spellings().items() for s in given]
IDS = [f"{op.split('.')[1]}: {s.name}" for op, s in SPELLINGS]
SMALL = Tolerance(rms=2e-6, peak=4e-6)


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **dict(self.named_parameters()))


def program(function: Callable[..., Any], *inputs: Tensor, **parameters: Tensor) -> Program:
    return capture(Module(function, **parameters), inputs)


def rewritten(function: Callable[..., Any], *inputs: Tensor, **parameters: Tensor) -> Program:
    """The function captured and rewritten, once it is seen to mean the same."""
    before = program(function, *inputs, **parameters)
    after = check(rewrite(before))
    for i, (got, want) in enumerate(zip(interpret(after, *inputs), interpret(before, *inputs), strict=True)):
        assert got.dtype == want.dtype
        assert_close(f"output {i}", got, want.double(), SMALL)
    again = rewrite(after)
    assert (again.nodes, again.outputs, again.weights.keys()) == (after.nodes, after.outputs, after.weights.keys())
    assert again.applied == after.applied
    return after


def _inputs(spelling: Spelling, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for t in spelling.inputs():
        if t.dtype == torch.bool:
            made.append(torch.rand(t.shape, generator=generator) < 0.7)
        else:
            made.append(torch.randn(t.shape, generator=generator).to(dtype if t.is_floating_point() else t.dtype))
    return tuple(made)


def _other_literals(spelling: Spelling) -> dict[str, Any]:
    """Values that the pattern was not traced with, for the literals that may take any."""
    parameters = inspect.signature(spelling.eager).parameters.values()
    literals = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {k: v * 1.5 for k, v in literals.items() if type(v) is float}


def _tolerance(op: str, dtype: torch.dtype) -> Tolerance:
    if op.startswith("fusegen."):
        return registry.get(op.split(".")[1]).tolerance[dtype]
    return SMALL if dtype == torch.float32 else Tolerance(rms=4e-3, peak=8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "spelling"), SPELLINGS, ids=IDS)
def test_spelling_is_found(op: str, spelling: Spelling, dtype: torch.dtype) -> None:
    literals, inputs = _other_literals(spelling), _inputs(spelling, dtype)
    after = rewrite(program(lambda *x: spelling.eager(*x, **literals), *inputs))
    assert after.counts() == {op: 1}
    (got,) = interpret(after, *inputs)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    if dtype == torch.float32 or op.startswith("fusegen."):
        assert got.dtype == dtype
        assert_close(spelling.name, got, _exactly(spelling, literals, exact), _tolerance(op, dtype))


def _exactly(spelling: Spelling, literals: dict[str, Any], inputs: list[Tensor]) -> Tensor:
    """The spelling in float64, its own casts to float32 left out."""
    given = Tensor.float, F.softmax, torch.softmax
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    F.softmax = lambda x, dim, dtype=None: given[1](x, dim)  # type: ignore[assignment]
    torch.softmax = lambda x, dim, dtype=None: given[2](x, dim)  # type: ignore[assignment]
    try:
        return spelling.eager(*inputs, **literals)
    finally:
        Tensor.float, F.softmax, torch.softmax = given  # type: ignore[method-assign,assignment]


def test_patterns_file_is_fresh() -> None:
    shipped = json.loads(patterns.FILE.read_text(encoding="utf-8"))
    assert shipped == trace.document(), "run python -m fusegen.runtime.rewrite.trace"


def test_unknown_op_is_traced(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(patterns, "FILE", tmp_path / "none.json")
    patterns.load.cache_clear()
    try:
        traced = patterns.load()
    finally:
        monkeypatch.undo()
        patterns.load.cache_clear()
    assert traced == patterns.load()


def test_a_default_that_is_also_a_dimension_is_refused() -> None:
    """Its dimension would become a literal and the form be found nowhere."""

    def eager(x: Tensor, w: Tensor, *, num_groups: int = 3) -> Tensor:
        return F.group_norm(x + w[:, :, None, None], num_groups)

    inputs = lambda: (torch.zeros(2, 6, 5, 5), torch.zeros(2, 6))  # noqa: E731
    spelling = Spelling("x + t", eager, inputs, lambda **captures: captures)
    with pytest.raises(ValueError, match="stands for dim and num_groups"):
        trace.trace_op("fusegen.group_norm.default", [spelling])


X, W, B = torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(8)


def _norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.group_norm(x, 4, w, b)


def test_norm_used_twice_is_not_fused_with_silu() -> None:
    after = rewritten(lambda x, w, b: F.silu(_norm(x, w, b)) + _norm(x, w, b), X, w=W, b=B)
    assert after.counts()["fusegen.group_norm.default"] == 2  # written twice: the first has its silu
    twice = rewritten(lambda x, w, b: (lambda y: F.silu(y) + y)(_norm(x, w, b)), X, w=W, b=B)
    assert twice.counts() == {"fusegen.group_norm.default": 1, "aten.silu.default": 1, "aten.add.Tensor": 1}
    (node,) = (n for n in twice.nodes if n.op == "fusegen.group_norm.default")
    assert node.args["activation"] == "none"


def test_norm_that_is_an_output_is_not_fused_with_silu() -> None:
    after = rewritten(lambda x, w, b: (lambda y: (F.silu(y), y))(_norm(x, w, b)), X, w=W, b=B)
    assert after.counts() == {"fusegen.group_norm.default": 1, "aten.silu.default": 1}


def test_other_constants_do_not_match() -> None:
    x = torch.randn(4, 6)
    near = rewritten(lambda x: 0.5 * x * (1.0 + torch.tanh(0.79 * (x + 0.044715 * torch.pow(x, 3.0)))), x)
    assert "aten.gelu.default" not in near.counts()
    q = torch.randn(2, 3, 7, 8)
    over_rows = rewritten(lambda q: torch.softmax(q @ q.transpose(-1, -2) * 0.3, -2) @ q, q)
    assert "fusegen.attention.default" not in over_rows.counts()


def test_different_values_for_one_wildcard_do_not_match() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    assert "aten.silu.default" not in rewritten(lambda x, y: x * torch.sigmoid(y), x, y).counts()


def test_factors_may_change_places() -> None:
    assert rewritten(lambda x: torch.sigmoid(x) * x, torch.randn(4, 6)).counts() == {"aten.silu.default": 1}


def test_reasons_for_what_is_left() -> None:
    x, w = torch.randn(3, 4, 6), torch.randn(4, 6)
    after = rewritten(lambda x, w: F.layer_norm(x, (4, 6), w, w), x, w=w)
    assert after.counts() == {"aten.layer_norm.default": 1}
    (applied,) = (a for a in after.applied if a.rule == "layer_norm: layer_norm")
    assert applied.count == 0
    assert applied.left == ("layer_norm: it normalizes over the last 2 dimensions",)


def test_every_rule_has_a_bound() -> None:
    assert bound("no-ops") == "exact"
    assert bound("attention: baddbmm") == "within the tolerance of attention"
    assert bound("silu: x*sigmoid(x)").startswith("rounds once")


def test_dropout_goes_only_where_it_does_nothing() -> None:
    x = torch.randn(3, 4)
    assert rewritten(lambda x: F.dropout(x, 0.5, training=False).exp(), x).counts() == {"aten.exp.default": 1}
    kept = rewrite(program(lambda x: F.dropout(x, 0.5, training=True) + F.dropout(x, 0.5, training=True), x))
    assert kept.counts()["aten.dropout.default"] == 2  # two draws, not one


def test_no_ops_go() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.contiguous().clone().detach().to(torch.float32) * 1.0 / 1
        return y.view(3, 4).expand(3, 4)[0:].reshape(4, 3).reshape(2, 6).exp()

    after = rewritten(function, torch.randn(3, 4))
    assert after.counts() == {"aten.reshape.default": 1, "aten.exp.default": 1}


def test_what_looks_like_a_no_op_stays() -> None:
    x = torch.randn(3, 4)
    after = rewritten(lambda x: (x[1:], x * 2, x.double(), x.reshape(4, 3), x + 0, x.expand(2, 3, 4)), x)
    assert len(after.nodes) == 6


def test_outputs_stay_apart_from_inputs_and_each_other() -> None:
    x = torch.randn(3, 4)
    after = rewritten(lambda x: (x.clone(), x.exp(), x.exp()), x)
    assert len(set(after.outputs)) == 3
    assert "x" not in after.outputs


def test_repeats_become_one_but_types_count() -> None:
    x = torch.arange(4)
    after = rewritten(lambda x: (x * 2).float() + (x * 2).float() + (x * 2.0), x)
    assert after.counts()["aten.mul.Tensor"] == 2


def test_constants_are_worked_out_within_bounds() -> None:
    x = torch.randn(3, 8)
    after = rewritten(lambda x: x * torch.exp(torch.arange(8) * -0.5)[None, :], x)
    assert after.counts() == {"aten.mul.Tensor": 1}
    large = rewritten(lambda x: x + torch.arange(1 << 17), torch.randn(1 << 17))
    assert large.counts() == {"aten.arange.default": 1, "aten.add.Tensor": 1}
    random = rewrite(program(lambda x: x + torch.rand(8), x))
    assert random.counts() == {"aten.rand.default": 1, "aten.add.Tensor": 1}


def test_products_with_weights_are_linear() -> None:
    x, w, b = torch.randn(2, 3, 8), torch.randn(8, 4), torch.randn(4)

    def conv1d(x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # as GPT-2 in transformers writes it
        return torch.addmm(b, x.view(-1, 8), w).view(2, 3, 4)

    after = rewritten(conv1d, x, w=w, b=b)
    assert after.counts() == {"aten.linear.default": 1}
    (weight,) = (v for k, v in after.weights.items() if k.endswith(".t"))
    assert weight.shape == (4, 8) and not weight.is_contiguous()  # a view of the parameter
    assert rewritten(lambda x, w: x @ w, x, w=w).counts() == {"aten.linear.default": 1}
    assert rewritten(lambda x, y: x @ y, x, w).counts() == {"aten.matmul.default": 1}
    scaled = rewritten(lambda x, w, b: torch.addmm(b, x[0], w, beta=2), x, w=w, b=b)
    assert "aten.linear.default" not in scaled.counts()


def test_dtypes_that_are_refused() -> None:
    with pytest.raises(RequestError, match="float64"):
        rewrite(program(torch.exp, torch.ones(2)), torch.float64)
