"""Plans: what is bound, what it costs, where outputs lie, what depends on what; and the layout of memory."""

from __future__ import annotations

import json
import random

import pytest
import torch
from networks import unet_inputs, unet_program
from torch import nn

from fusegen.kernels import op as registry
from fusegen.runtime import api
from fusegen.runtime.errors import GraphError
from fusegen.runtime.memory import ALIGNMENT, Interval, lay_out

NAMES = ("x", "t", "context")


def plan_of(backend: str = "cpu", batch: int = 2, **more):
    session = api.compile(unet_program(), backend=backend)
    return session.planned(dict(zip(NAMES, unet_inputs(batch), strict=True)), **more)


def test_fused_ops_products_and_views_are_bound_and_nothing_else_is_left_of_them():
    plan = plan_of()
    ops = [s.node.op for s in plan.steps]
    assert ops.count("fusegen.attention.default") == 8
    assert not any(o.startswith(("aten.group_norm", "aten.layer_norm", "aten.scaled_dot", "aten.conv2d")) for o in ops)
    assert all(s.binding.how in ("kernel", "library", "aten", "view", "reference") for s in plan.steps)
    conv = [s for s in plan.steps if s.node.op == "runtime.conv2d"]
    assert conv and all(s.binding.name.startswith("onednn") for s in conv)


def test_eager_is_the_graph_as_exported():
    plan = plan_of("eager")
    exported = [n.op for n in unet_program().nodes if not n.op.startswith(("sym.", "aten.sym_"))]
    assert sorted(s.node.op for s in plan.steps) == sorted(exported)
    assert plan.layout.peak == 0


def test_flops_of_products_are_counted():
    plan = plan_of(batch=2)
    first = next(s for s in plan.steps if s.node.op == "runtime.conv2d")
    assert first.flops == 2 * (2 * 16 * 16) * 32 * 3 * 9
    assert first.bytes == 4 * (2 * 3 * 256 + 32 * 27 + 32 + 2 * 32 * 256)
    once, twice = (sum(s.flops for s in p.steps if s.phase != "constant") for p in (plan, plan_of(batch=4)))
    assert twice == pytest.approx(2 * once, rel=0.01)  # what depends on weights alone is done once for any batch


def test_phases_follow_the_inputs():
    plan = plan_of(fixed=("context",), per_step=("t",))
    phases = {s.phase for s in plan.steps}
    assert {"fixed", "per_step", "step"} <= phases
    for step in plan.steps:
        want = {(): "constant", ("context",): "fixed", ("t",): "per_step", ("t", "context"): "per_step"}
        assert step.phase == want.get(step.depends, "step")
    loose = plan_of()
    assert all(s.phase == ("step" if s.depends else "constant") for s in loose.steps)


def test_the_plan_reads_as_text_and_as_json():
    plan = plan_of()
    text = str(plan)
    assert "GFLOP" in text and "onednn conv2d" in text and "other bits in another batch" in text
    document = json.loads(json.dumps(plan.to_json()))
    assert len(document["steps"]) == len(plan.steps)
    assert {"node", "op", "binding", "declined", "invariant", "phase", "bytes", "flops"} <= document["steps"][0].keys()


def test_declined_kernels_are_listed_with_their_reasons():
    declining = registry.Kernel("picky", "cpu", lambda *args: "it is picky", lambda outs, args: None, rank=1000)
    kernels = registry.get("layer_norm").kernels
    kernels.append(declining)
    try:
        plan = plan_of()
    finally:
        kernels.remove(declining)
    step = next(s for s in plan.steps if s.node.op == "fusegen.layer_norm.default")
    assert [(d.kernel, d.reason) for d in step.binding.declined][:1] == [("picky", "it is picky")]
    assert "declined picky: it is picky" in str(plan)


class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_a_graph_that_draws_random_numbers_is_refused_by_name():
    session = api.compile(api.capture(Random(), (torch.randn(3),)))
    with pytest.raises(GraphError, match=r"randn_like.*draws random numbers.*node"):
        session.planned({"x": torch.randn(3)})


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x)[0]


def test_deterministic_names_the_node_that_cannot_be():
    session = api.compile(api.capture(Unknown(), (torch.randn(2, 3, 3),)), deterministic=True)
    with pytest.raises(GraphError, match=r"linalg_qr.*node"):
        session.planned({"x": torch.randn(2, 3, 3)})


def overlapping(a: Interval, b: Interval) -> bool:
    return a.start <= b.end and b.start <= a.end


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_are_live_together_do_not_overlap(seed):
    draw = random.Random(seed)
    made = []
    for i in range(draw.randint(0, 60)):
        start = draw.randint(0, 40)
        made.append(Interval(f"v{i}", draw.choice([0, 1, 63, 64, 1000, 4096]), start, start + draw.randint(0, 10)))
    layout = lay_out(made)
    assert layout.live <= layout.peak <= sum(i.nbytes + ALIGNMENT for i in made)
    for i, a in enumerate(made):
        assert layout.offsets[a.name] % ALIGNMENT == 0
        assert layout.offsets[a.name] + a.nbytes <= layout.peak
        for b in made[:i]:
            if overlapping(a, b) and a.nbytes and b.nbytes:
                apart = layout.offsets[a.name] >= layout.offsets[b.name] + b.nbytes
                assert apart or layout.offsets[b.name] >= layout.offsets[a.name] + a.nbytes


def test_a_chain_reuses_two_buffers():
    chain = [Interval(f"v{i}", 1024, i, i + 1) for i in range(10)]
    layout = lay_out(chain)
    assert layout.peak == layout.live == 2048
