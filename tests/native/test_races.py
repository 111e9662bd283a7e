"""The C++ kernels under ThreadSanitizer, on four threads, on the cases of every op.

    make races

GCC's OpenMP runtime is not instrumented, so its barriers would be taken for races.  The kernels know their pool only
as two function pointers (``fg_set_pool``): the runner gives them one of ``std::thread``, which the sanitizer follows,
and the code between is the library's own.  No Python runs under the sanitizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from record import ROOT, Planted, PlantedLaunch, Records, build_library, build_planted, levels_of, sanitized
from runs import CPU_OPS, check

from fusegen.kernels.cpu import build, library
from fusegen.kernels.op import Op

FOLDER = ROOT / "build" / "races"
THREADS = 4

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC's ThreadSanitizer: apt-get install g++")


def _chosen(known: Sequence[str]) -> list[str]:
    """The lowest and the highest level that runs here: what differs between the others is arithmetic."""
    found = [level for level in library.levels() if level in known]
    return sorted({found[0], found[-1]})


def _levels(op: Op) -> list[str]:
    return _chosen(levels_of(op.name, library.levels()))


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of kernels with faults."""
    return build_planted(tmp_path_factory.mktemp("planted"), build.SANITIZERS["thread"])


@pytest.fixture(scope="session")
def start(planted: Path) -> list[str | Path]:
    """How the runner is started."""
    return sanitized(FOLDER, "thread", planted)


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The kernel library under the sanitizer."""
    return build_library(FOLDER, "g++", sanitize="thread", chosen=_chosen)


@pytest.mark.parametrize("op", CPU_OPS, ids=lambda op: op.name)
def test_kernels_have_no_race(op: Op, start: list[str | Path], kernels: Path, tmp_path: Path) -> None:
    shared = check(op, _levels(op), [*start, kernels], tmp_path, THREADS, bench=True)
    assert shared > 0, "no case is large enough for two threads"


@pytest.mark.parametrize("fault", [0, 1], ids=["no race", "race"])
def test_a_planted_race_is_reported_and_only_that(
    fault: int, start: list[str | Path], planted: Path, tmp_path: Path
) -> None:
    counter = torch.zeros(4096, dtype=torch.int64)
    records = Records()
    records.add(PlantedLaunch("race", Planted(counter.data_ptr(), 4096, fault), (counter,)), "scalar")
    if fault:
        with pytest.raises(AssertionError, match=r"(?s)exit code 66: .*data race.*planted\.cpp"):
            records.run([*start, planted], tmp_path / "records", THREADS)
    else:
        assert records.run([*start, planted], tmp_path / "records", THREADS) == 1
        assert bool((counter == 1).all())
