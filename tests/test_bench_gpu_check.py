"""`make gpu-check`, rehearsed on the CPU under Triton's interpreter: every stage is reached and nothing in it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fusegen.bench import gpu_check
from fusegen.bench import row as rows_file
from fusegen.kernels import catalogue


def test_a_rehearsal_reaches_every_stage_and_nothing_fails(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "fusegen.bench.gpu_check", "--rehearse", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = rows_file.read(out)
    assert [(r.what, r.case, r.note) for r in rows if not r.ok] == []
    for op in catalogue.triton_names():
        assert {r.what for r in rows} >= {f"{op} correct", op}, op  # against its reference; beside its peers
    checked, timed = gpu_check.stages()
    models = {stage.partition(":")[2] for stage in timed if stage.startswith("model:")}
    assert len([r for r in rows if r.what == "model" and r.contender in ("eager", "all")]) == len(models)
    assert {r.what.split()[0] for r in rows} >= {"noise", "roofline"} and len(checked) > len(catalogue.triton_names())
