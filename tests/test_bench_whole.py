"""The time and memory of a process until its first output."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusegen.bench import report, whole

MODULE = """
import sys
from fusegen.bench import whole
name, dtype, more = sys.argv[1:]
if name == "broken":
    raise SystemExit("no such contender")
held = b"x" * (300 << 20 if name == "fusegen" else 1)  # touched, so that it is resident
whole.say({"of": [name, dtype, more, len(held)]})
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "first_output.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "first_output"


def test_a_cold_row_has_the_process_s_time_and_peak_memory(module: str) -> None:
    rows = whole.cold("m", "first", module, ("eager", "fusegen"), "float32", ["more"], rounds=1)
    eager, ours = rows
    assert [r.contender for r in rows] == ["eager", "fusegen"] and eager.ratio == 1
    assert all(r.median_s and r.median_s > 0 and r.extra["rounds"] == 1 for r in rows)
    assert 280 < ours.extra["peak_mib"] - eager.extra["peak_mib"] < 340
    assert "peak MiB" in [c.header for c in report.table(rows, "t").columns]


def test_a_process_that_fails_is_an_error_that_says_why(module: str) -> None:
    with pytest.raises(RuntimeError, match=r"the process of broken failed.*no such contender"):
        whole.cold("m", "first", module, ("broken",), "float32", ["more"], rounds=1)
