"""A row's bits are its own on GPUs too: kernels for one row, few and many, run by Triton's interpreter, give the same.

As in test_triton_interpret.py, that takes a process of its own (this file as a script).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_rows_of_linear_int4_have_the_same_bits_in_every_kernel() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=900,  # a hang, not a slow machine
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and [line for line in lines if not line.endswith("equal")] == []


def main() -> None:
    """Segments of several groups and of one, the last not whole, with zero points and without."""
    import torch

    from fusegen.kernels.gpu.interpreter import mend
    from fusegen.kernels.gpu.launch import TritonLaunch
    from fusegen.kernels.gpu.linear_int4 import Config, stages
    from fusegen.kernels.linear_int4 import OP, pack, quantize_int4

    mend()
    torch.manual_seed(0)
    for group, k, symmetric in ((32, 32 * 67 - 5, False), (128, 700, True)):
        p = pack(*quantize_int4(torch.randn(20, k), group, symmetric), group)
        x = torch.randn(19, k)

        def run(rows: slice, config: Config, p=p, x=x) -> torch.Tensor:  # type: ignore[no-untyped-def]
            args = (x[rows], p.weight, p.scales, 20, p.zeros, None, None, "gelu_tanh", "int8")
            outs = OP.allocate(*args)
            TritonLaunch(args, stages(outs, args, config)).run()
            return outs[0]

        whole, words = run(slice(0, 19), Config(32, 32, 4, 2)), max(8, group // 8)
        for rows, config in (
            (slice(0, 1), Config(1, 16, 4, 2, words, True)),
            (slice(3, 6), Config(2, 32, 8, 1, words, True)),
            (slice(5, 9), Config(4, 16, 4, 1, group // 8)),
        ):
            print(group, rows, "equal" if torch.equal(run(rows, config), whole[rows]) else "different")


if __name__ == "__main__":
    main()
