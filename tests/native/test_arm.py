"""The C++ kernels for AArch64, at every level they have there, run by an emulator on the cases of every op.

    make test-arm

The library is cross-compiled whole and loaded by a small AArch64 program; the arguments and the truth they are compared
with come from this process.  It shows that NEON code computes what it should, not how fast.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from record import ROOT, build_library, build_runner, levels_of
from runs import CPU_OPS, check

from fusegen.kernels.op import Op

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
SYSTEM = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler keeps its libraries
LEVELS = ("scalar", "neon")
emulator = next((e for e in EMULATORS if shutil.which(e)), None)

pytestmark = pytest.mark.skipif(
    emulator is None or shutil.which(COMPILER) is None,
    reason="needs an emulator and a cross compiler: apt-get install qemu-user-static g++-aarch64-linux-gnu",
)


@pytest.fixture(scope="session")
def command() -> list[str | Path]:
    """How the AArch64 runner is started."""
    folder = ROOT / "build" / "arm"
    made = build_library(folder, COMPILER)
    return [str(emulator), "-L", SYSTEM, build_runner(folder, COMPILER), made]


@pytest.mark.parametrize("op", CPU_OPS, ids=lambda op: op.name)
def test_kernels_agree_with_the_reference(op: Op, command: list[str | Path], tmp_path: Path) -> None:
    check(op, levels_of(op.name, LEVELS), command, tmp_path, threads=2)
