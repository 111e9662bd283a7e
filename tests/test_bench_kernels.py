"""What the kernel benchmarks compare: an op's outputs and the arguments that it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusegen.bench import contenders, kernels
from fusegen.cli import main
from fusegen.kernels import op as registry


def _job(op: str, case: str) -> kernels.Job:
    return kernels.Job(registry.get(op), registry.get(op).case(case), torch.float32)


def test_what_an_op_writes_is_compared() -> None:
    rows = kernels.run(_job("kv_append", "8x8x1x128 into 4096"), ("eager", "fusegen"), seconds=0.0)
    assert [(r.contender, r.ok, r.error_rms) for r in rows] == [("eager", True, 0.0), ("fusegen", True, 0.0)]


def test_who_writes_nothing_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(op: Any, args: Any) -> Any:
        return lambda: None

    monkeypatch.setitem(contenders.KERNELS, "fusegen", idle)
    (row,) = kernels.run(_job("kv_append", "8x8x1x128 into 4096"), ("fusegen",), seconds=0.0)
    assert not row.ok and row.note == "over its error bound" and row.median_s is None


def test_there_is_no_ratio_to_a_form_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(op: Any, args: Any) -> Any:
        return lambda: None

    monkeypatch.setitem(contenders.KERNELS, "eager", idle)
    eager, ours = kernels.run(_job("kv_append", "8x8x1x128 into 4096"), ("eager", "fusegen"), seconds=0.0)
    assert not eager.ok and ours.ok and ours.median_s is not None and ours.ratio is None


def test_each_output_is_held_to_its_own_bound() -> None:
    """What a case is made in, float32, is none of its outputs' dtypes."""
    (row,) = kernels.run(_job("conv_taps_int8", "640x640"), ("fusegen",), seconds=0.0)
    assert row.ok and row.error_peak == 0.0


def test_a_fault_is_shown_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "run", lambda *args: [].pop())
    assert main(["bench", "kernels", "--op", "kv_append"]) == 1
    assert (
        capsys.readouterr().err
        == "fusegen: fault: IndexError: pop from empty list (-v shows where; please report it)\n"
    )
    assert main(["bench", "kernels", "--op", "kv_append", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err
