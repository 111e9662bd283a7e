"""What the demo says of a comparison: no speed for an output that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from fusegen.bench.timing import Timing
from fusegen.bench.verify import Verdict
from fusegen.demo import beside
from fusegen.kernels.op import Tolerance

BOUND = Tolerance(1e-2, 1e-1)


def made(rms: float, calls: dict[str, Any]) -> beside.Beside:
    verdict = Verdict(rms, rms, rms <= BOUND.rms)
    return beside.compare("some", "torch.float32", 3, "pictures", calls, verdict, BOUND, 0.01)


def test_a_wrong_output_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    calls = {name: lambda: pytest.fail("it was called") for name in ("eager", "fusegen")}
    one = made(2e-2, calls)
    assert not one.agrees and one.timed == {}
    assert "differ by 2.0e-02 of their root mean square (bound 0.01)" in capsys.readouterr().out
    assert "wrong" in list(beside.table([one]))[1]


def test_the_table_has_a_line_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    good = made(1e-3, {"eager": lambda: None, "fusegen": lambda: None})
    assert good.agrees and set(good.timed) == {"eager", "fusegen"}
    timed = {"eager": Timing(2.0, 2.0, 2.0, 1.0, 3), "fusegen": Timing(0.5, 0.5, 0.5, 4.0, 3)}
    lines = list(beside.table([beside.Beside("some", "float32", 3, "pictures", good.verdict, BOUND, timed)]))
    assert len(lines) == 2
    speeds = ("1.5 pictures a second", "6.0 pictures a second", "4.00")
    wanted = ("some", "float32", "3 pictures", *speeds, "1.0e-03, 0.01")
    assert all(cell in lines[1] for cell in wanted), lines[1]
