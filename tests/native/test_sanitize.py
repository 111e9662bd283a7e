"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on the cases of every op, at the levels of
this CPU (see ``_chosen``).

    make sanitize

No Python runs under the sanitizers: the runner gives every kernel memory that ends with the last element it may touch.
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

FOLDER = ROOT / "build" / "sanitize"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC's sanitizers: apt-get install g++")


def _chosen(known: Sequence[str]) -> list[str]:
    """The levels that run here; AVX-512 only where a source has nothing above it, which differs in a few instructions
    and takes as long to compile."""
    found = [level for level in library.levels() if level in known]
    return [level for level in found if level != "avx512" or level == found[-1]]


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of kernels with faults."""
    return build_planted(tmp_path_factory.mktemp("planted"), build.SANITIZERS["address"])


@pytest.fixture(scope="session")
def start(planted: Path) -> list[str | Path]:
    """How the runner is started."""
    return sanitized(FOLDER, "address", planted)


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The kernel library under the sanitizers."""
    return build_library(FOLDER, "g++", sanitize="address", chosen=_chosen)


@pytest.mark.parametrize("op", CPU_OPS, ids=lambda op: op.name)
def test_kernels_stay_in_their_memory(op: Op, start: list[str | Path], kernels: Path, tmp_path: Path) -> None:
    check(op, _chosen(levels_of(op.name, library.levels())), [*start, kernels], tmp_path, threads=2, behind=0)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (0, ""),
        (1, r"AddressSanitizer: use-after-poison.*planted\.cpp"),
        (2, r"AddressSanitizer: use-after-poison.*planted\.cpp"),
        (3, r"planted\.cpp.*signed integer overflow"),
    ],
    ids=["none", "behind", "before", "overflow"],
)
def test_planted_faults_are_reported(
    fault: int, report: str, start: list[str | Path], planted: Path, tmp_path: Path
) -> None:
    memory = torch.zeros(5, dtype=torch.int64)
    records = Records()
    records.add(PlantedLaunch("stray", Planted(memory.data_ptr(), 5, fault), (memory,)), "scalar")
    if report:
        with pytest.raises(AssertionError, match=f"(?s){report}"):
            records.run([*start, planted], tmp_path / "records", 1)
    else:
        assert records.run([*start, planted], tmp_path / "records", 1) == 0
