"""What the roofline allows an op, and that a contender without a form of an op has no row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusegen.bench import contenders, kernels, roofline
from fusegen.bench.roofline import Roofline
from fusegen.kernels import onednn
from fusegen.kernels import op as registry
from fusegen.kernels.onednn import saturates
from fusegen.kernels.op import Case, Cost

ROOF = Roofline(copy=10.0, read=20.0, peak={"float32": 100.0, "bfloat16": 200.0, "int8": 400.0})


@pytest.mark.parametrize(
    ("cost", "dtype", "seconds"),
    [
        (Cost(flops=0, bytes=100), torch.float32, 10.0),  # how much is read is not told: at the rate of a copy
        (Cost(flops=0, bytes=100, written=50), torch.float32, 10.0),
        (Cost(flops=0, bytes=100, written=90), torch.float32, 10.0),
        (Cost(flops=0, bytes=100, written=0), torch.float32, 5.0),
        (Cost(flops=0, bytes=100, written=10), torch.float32, 2.0 + 4.0),  # 20 bytes are copied, 80 only read
        (Cost(flops=1000, bytes=0), torch.float32, 10.0),
        (Cost(flops=1000, bytes=0), torch.bfloat16, 5.0),
        (Cost(flops=1000, bytes=0), torch.float16, 10.0),  # no peak of its own
        (Cost(flops=1000, bytes=0, products="int8"), torch.bfloat16, 2.5),
        (Cost(flops=1000, bytes=0, products="int4"), torch.bfloat16, 5.0),
    ],
)
def test_the_least_time(cost: Cost, dtype: torch.dtype, seconds: float) -> None:
    assert ROOF.seconds(cost, dtype) == pytest.approx(seconds)


def _job(op: str, case: str, dtype: torch.dtype = torch.float32) -> kernels.Job:
    known = registry.get(op)
    found = known.case(case)
    return kernels.Job(known, Case(found.name, found.build), dtype)


def test_a_contender_without_a_form_of_the_op_has_no_row() -> None:
    rows = kernels.run(_job("linear_int4", "small"), ["eager", "onednn"], seconds=0.01)
    assert [r.contender for r in rows] == ["eager"]


@pytest.mark.parametrize("case", ["gelu_tanh", "silu", "prime sizes"])
def test_onednn_is_gated_by_a_bound_of_its_own(case: str) -> None:
    (row,) = kernels.run(_job("linear_int8", case), ["onednn"], seconds=0.01)
    bound, own = registry.get("linear_int8").tolerance[torch.float32], contenders.BOUNDS["linear_int8", "onednn"]
    assert (row.contender, row.ok) == ("onednn", not saturates()), row
    error = row.error_rms or 0.0
    assert error > own.rms if saturates() else bound.rms * kernels.PEER_MARGIN < error < own.rms


@pytest.mark.parametrize("case", ["gelu_tanh", "silu", "prime sizes"])
@pytest.mark.parametrize("found", [True, False])
def test_eager_int8_is_right_where_onednns_sums_saturate_too(
    case: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "saturates", lambda: found or saturates())
    (row,) = kernels.run(_job("linear_int8", case), ["eager"], seconds=0.01)
    assert row.ok, row


def test_without_bfloat16_products_the_ceiling_is_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(roofline, "_matmul", lambda dtype, size, device: measured.append(dtype) or 7.0)
    monkeypatch.setattr(roofline, "_int8", lambda size: 9.0)
    monkeypatch.setattr(roofline, "_rate", lambda stream, device: 1.0)
    assert roofline.measure.__wrapped__().peak == {"float32": 7.0, "bfloat16": 7.0, "int8": 9.0}
    assert measured == [torch.float32]


def test_memory_is_timed_beside_what_goes_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []

    def stream(name: str) -> roofline.Stream:
        return roofline.Stream(lambda: moved.append(name), 10**9)

    monkeypatch.setattr(roofline, "measure", lambda device: replace(ROOF, peak={"float32": 1e15}))
    monkeypatch.setattr(roofline, "copying", lambda: stream("copy"))
    monkeypatch.setattr(roofline, "reading", lambda: stream("read"))
    monkeypatch.setattr(kernels, "_streams", kernels._streams.__wrapped__)  # not those of another test
    monkeypatch.setattr(roofline, "last_cache", lambda: 1 << 30)
    (inside,) = kernels.run(_job("rms_norm", "small"), ["fusegen"], seconds=0.001)
    assert not moved and inside.roofline_share is not None
    monkeypatch.setattr(roofline, "last_cache", lambda: 16)
    (beyond,) = kernels.run(_job("rms_norm", "small"), ["fusegen"], seconds=0.001)
    assert min(moved.count("copy"), moved.count("read")) >= 5  # at least the rounds
    assert beyond.roofline_share is not None and beyond.roofline_share < inside.roofline_share
