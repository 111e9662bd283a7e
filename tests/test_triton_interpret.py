"""Every Triton kernel, run by Triton's interpreter on the CPU, against the float64 reference.

The interpreter has to be chosen before Triton is imported, so each op runs in a process of its own (this file as a
script), which prints one line of JSON a case.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusegen.kernels import catalogue


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", catalogue.triton_names())
def test_kernels_match_the_reference(name: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, name],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=1800,  # a hang, not a slow machine
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= 8
    assert [r for r in results if not r["ok"]] == []


def configurations(module: Any, args: tuple[Any, ...]) -> Iterator[Any]:
    """The rule's configuration, and small tiles that lead small cases down the paths of large ones."""
    yield module.TUNABLE.default(*args)
    if str(args[0].dtype) != "torch.bfloat16":  # one dtype fewer keeps this test short; float16 takes the same paths
        yield from module.TUNABLE.small(*args)


def bindings(module: Any, op: Any, made: list[tuple[Any, ...]]) -> Iterator[tuple[str, Any, Any, Any]]:
    """(label, outputs, arguments, launch) of every way to run the case; each takes one of ``made``."""
    if not hasattr(module, "TUNABLE"):
        args = made.pop()
        outs = op.allocate(*args)
        yield "", outs, args, module.KERNELS[0].bind(outs, args)
        return
    from fusegen.kernels.gpu.launch import TritonLaunch

    for config in configurations(module, made[0]):
        args = made.pop()
        outs = op.allocate(*args)
        yield str(config), outs, args, TritonLaunch(args, module.TUNABLE.stages(outs, args, config))


def errors(out: Any, reference: Any) -> tuple[float, float]:
    """Relative root mean square and peak error; a NaN in both (history that was never read) is no error."""
    import torch

    from fusegen.bench import verify

    both = torch.isnan(out) & torch.isnan(reference)
    return verify.errors(out.masked_fill(both, 0.0), reference.masked_fill(both, 0.0))


def double(value: Any) -> Any:
    return value.double() if hasattr(value, "is_floating_point") and value.is_floating_point() else value


def check(name: str) -> Iterator[dict[str, Any]]:
    """One result for each small case, dtype and configuration; a kernel that declines one is a failure too."""
    import torch

    from fusegen.kernels.gpu.interpreter import mend

    spec, module = (importlib.import_module(f"fusegen.kernels.{folder}{name}") for folder in ("", "gpu."))
    op = spec.OP
    mend()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    written = [
        i for i, a in enumerate(getattr(torch.ops.fusegen, name).default._schema.arguments) if a.name in op.mutates
    ]
    for case in (c for c in op.cases if c.small):
        for dtype in case.dtypes:
            made = [case.build(torch.Generator().manual_seed(1), dtype) for _ in range(5)]
            if (reason := module.KERNELS[0].decline(*made[0])) is not None:
                yield {"case": case.name, "dtype": str(dtype), "ok": False, "why": reason}
                continue
            wide = [double(a) for a in made.pop()]
            expected = op.reference(*wide)
            expected = (*(expected if isinstance(expected, tuple) else (expected,)), *(wide[i] for i in written))
            bound = op.tolerance[dtype]
            for label, outs, args, launch in bindings(module, op, made):
                launch.run()
                pairs = zip((*outs, *(args[i] for i in written)), expected, strict=True)
                found = [errors(o, e) for o, e in pairs]
                ok = all(rms <= bound.rms and peak <= bound.peak for rms, peak in found)
                yield {"case": case.name, "dtype": str(dtype), "config": label, "ok": ok, "errors": found}


if __name__ == "__main__":
    for result in check(sys.argv[1]):
        print(json.dumps(result))
