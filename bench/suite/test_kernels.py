"""``pytest bench/``: the registry's realistic cases under pytest-benchmark, each gated on its error bound.

``pytest bench/ --benchmark-json rows.json`` keeps the figures; ``-k attention`` picks an op.  Contenders run one after
the other here; ``fusegen bench kernels`` interleaves them and is the one to quote ratios from.
"""

from __future__ import annotations

from typing import Any

import pytest

from fusegen.bench import contenders, kernels
from fusegen.bench.verify import check
from fusegen.kernels.op import Tolerance

JOBS = {f"{j.op.name}-{j.case.name}-{str(j.dtype).removeprefix('torch.')}": j for j in kernels.jobs()}


@pytest.mark.parametrize("name", ["eager", "fusegen"])
@pytest.mark.parametrize("job", JOBS)
def test_kernel(job: str, name: str, benchmark: Any) -> None:
    """The call's output is within the bound (four times as wide for the eager peer), then it is timed."""
    one = JOBS[job]
    args = one.args()
    call = contenders.KERNELS[name](one.op, args)
    if call is None:
        pytest.skip("no kernel serves these arguments on this machine")
    bound = one.op.tolerance[one.dtype]
    margin = 1.0 if name == "fusegen" else kernels.PEER_MARGIN
    got = kernels.results(one.op, call(), args)
    verdict = check(got, kernels.reference(one), Tolerance(bound.rms * margin, bound.peak * margin))
    assert verdict.ok, f"{job}: relative error rms {verdict.rms:.2g}, peak {verdict.peak:.2g}"
    benchmark.group = job
    benchmark.extra_info.update(error_rms=verdict.rms, error_peak=verdict.peak)
    benchmark.pedantic(call, rounds=9, iterations=1, warmup_rounds=2)
