"""Inputs that a program writes in place: versions, order, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fusegen.kernels import op
from fusegen.runtime import state
from fusegen.runtime.api import capture, compile
from fusegen.runtime.errors import GraphError
from fusegen.runtime.program import Program, Ref
from fusegen.runtime.read import graph_json
from fusegen.runtime.rewrite import rewrite

op.ops()  # registers torch.ops.fusegen


class Twice(nn.Module):
    """Appends x, attends, appends what came out, and attends again: four values in the memory of two inputs."""

    def forward(self, x: Tensor, at: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = k.sum(-1)
        torch.ops.fusegen.kv_append(x, x, k, v, at)
        y = torch.ops.fusegen.attention_decode(x, k, v, at + 1)
        torch.ops.fusegen.kv_append(y, y + 1, k, v, at + 1)
        z = torch.ops.fusegen.attention_decode(y, k, v, at + 2)
        return z, k.sum(-1) - before


def inputs(batch: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(batch)
    caches = (torch.randn(batch, 1, 6, 8, generator=g) for _ in "kv")
    return (torch.randn(batch, 1, 1, 8, generator=g), torch.arange(batch), *caches)


def twice() -> Program:
    batch = {0: ("batch", 1, 8)}
    return capture(Twice(), inputs(), dynamic=dict.fromkeys(("x", "at", "k", "v"), batch))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_writes_and_reads_keep_their_order(backend: str) -> None:
    session = compile(twice(), backend=backend)
    for batch in (2, 3, 2):
        ours, theirs = inputs(batch), inputs(batch)
        want = Twice()(*theirs)
        for got, wanted in zip(session(*ours), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
        for mine, wanted in zip(ours[2:], theirs[2:], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=2e-5)


def test_versions_name_the_memory_they_lie_in() -> None:
    found = state.versions(twice())
    assert [len(v) for v in found.values()] == [3, 3] and list(found) == ["k", "v"]
    assert all(versions[0] == name for name, versions in found.items())


def test_rewrites_keep_writes_and_the_sums_around_them() -> None:
    program = rewrite(twice())
    counts = program.counts()
    assert counts["fusegen.kv_append.default"] == 2 and counts["aten.sum.dim_IntList"] == 2


def test_json_keeps_the_versions() -> None:
    program = twice()
    again = graph_json.loads(graph_json.dumps(program), program.weights, "test")
    assert state.versions(again) == state.versions(program)


def test_a_use_of_what_was_written_over_is_refused() -> None:
    program = twice()
    last = program.nodes[-1]
    assert last.op == "aten.sub.Tensor"
    stale = replace(last, args={**last.args, "other": Ref("k")})
    with pytest.raises(GraphError, match="uses 'k', which was written over"):
        state.check(program.with_nodes((*program.nodes[:-1], stale)))
    with pytest.raises(GraphError, match="output 'k' was written over"):
        state.check(replace(program, outputs=("k",)))


def test_a_weight_is_never_written() -> None:
    program = twice()
    inputs_ = {k: v for k, v in program.inputs.items() if k != "k"}
    with pytest.raises(GraphError, match="writes to 'k_cache', which is no input"):
        state.check(replace(program, inputs=inputs_, weights={"k": torch.zeros(2, 1, 6, 8)}))
