"""The C++ kernels under ThreadSanitizer, on four threads, on the cases of every op.

    make races

GCC's OpenMP runtime is not instrumented, so its barriers would be taken for races.  The kernels know their pool only
as two function pointers (``fg_set_pool``): the runner gives them one of ``std::thread``, which the sanitizer follows,
and the code between is the library's own.  No Python runs under the sanitizer.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from record import HERE, ROOT, Records, build_library, build_runner, levels_of
from runs import CPU_OPS, check

from fusegen.kernels.cpu import build, library
from fusegen.kernels.op import Op

FOLDER = ROOT / "build" / "races"
FLAGS = build.SANITIZERS["thread"]
THREADS = 4

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC's ThreadSanitizer: apt-get install g++")


def _levels(op: Op) -> list[str]:
    """The op's lowest and highest level here: what differs between the others is arithmetic."""
    found = levels_of(op.name, library.levels())
    return sorted({found[0], found[-1]})


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str | Path]]:
    """How the runner is started on a library."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    runner = build_runner(FOLDER, "g++", FLAGS)
    empty = tmp_path_factory.mktemp("probe") / "empty"
    empty.write_bytes(bytes(8))
    library_path = _planted(tmp_path_factory.mktemp("planted"))
    probe = subprocess.run([runner, library_path, empty, "1"], capture_output=True, text=True, check=False)
    fixed = ["setarch", "-R"] if "unexpected memory mapping" in probe.stderr else []  # GCC 12 and much randomization

    return lambda path: [*fixed, runner, path]


def _planted(folder: Path) -> Path:
    """A library of the pool and the kernel with a race."""
    made = folder / "librace.so"
    sources = [build.HERE / "pool.cpp", HERE / "race.cpp"]
    command = ["g++", *build.FLAGS, *FLAGS, "-shared", *map(str, sources), "-o", str(made), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return made


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The kernel library under the sanitizer."""
    return build_library(FOLDER, "g++", sanitize="thread", levels={level for op in CPU_OPS for level in _levels(op)})


@pytest.mark.parametrize("op", CPU_OPS, ids=lambda op: op.name)
def test_kernels_have_no_race(op: Op, start: Any, kernels: Path, tmp_path: Path) -> None:
    shared = check(op, _levels(op), start(kernels), tmp_path, THREADS, bench=1)
    assert shared > 0, "no case is large enough for two threads"


class _Race(ctypes.Structure):
    _fields_ = [("counter", ctypes.c_void_p), ("items", ctypes.c_int64), ("shared", ctypes.c_int64)]


@dataclass
class _Launch:
    """What Records reads of a launch."""

    op: str
    struct: ctypes.Structure
    outs: tuple[torch.Tensor, ...]
    args: tuple[Any, ...] = ()


@pytest.mark.parametrize("shared", [False, True], ids=["no race", "race"])
def test_a_planted_race_is_reported_and_only_that(shared: bool, start: Any, tmp_path: Path) -> None:
    counter = torch.zeros(4096, dtype=torch.int64)
    records = Records()
    records.add(_Launch("race", _Race(counter.data_ptr(), 4096, shared), (counter,)), "scalar")  # type: ignore[arg-type]
    command = start(_planted(tmp_path))
    if shared:
        with pytest.raises(AssertionError, match=r"(?s)exit code 66: .*data race.*race\.cpp"):
            records.run(command, tmp_path / "records", THREADS)
    else:
        assert records.run(command, tmp_path / "records", THREADS) == 1
        assert bool((counter == 1).all())
