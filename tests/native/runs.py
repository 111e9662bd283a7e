"""What is run elsewhere: an op's cases, and arguments that nobody chose."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import Fenced, assert_all_close, truth
from record import Records, foreign
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Op

DRAWN = 12  # random arguments an op
SHARED = 1 << 22  # operations and bytes that no kernel leaves to one thread

CPU_OPS = [op for op in registry.ops().values() if any(k.device == "cpu" for k in op.kernels)]


def arguments(op: Op) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(label, arguments): every small case in every dtype, and random arguments."""
    for case in (c for c in op.cases if not c.bench):
        for dtype in case.dtypes:
            yield f"{case.name} / {dtype}", case.build(torch.Generator().manual_seed(2024), dtype)
    if op.draw is not None:
        choices = Draw(random.Random(2024).randint)
        for i in range(DRAWN):
            dtype = choices.choice(tuple(op.tolerance))
            yield f"random {i} / {dtype}", op.draw(choices, dtype)


def large(op: Op) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(label, arguments) of the smallest realistic case that is worth two threads, in one dtype."""
    work = {c: _work(op, _build(c)) for c in op.cases if c.bench}
    case = min((c for c in work if work[c] >= SHARED), key=lambda c: work[c], default=max(work, key=lambda c: work[c]))
    yield case.name, _build(case)


def _build(case: Any) -> tuple[Any, ...]:
    return tuple(case.build(torch.Generator().manual_seed(2024), case.dtypes[0]))


def _work(op: Op, args: tuple[Any, ...]) -> int:
    least = op.cost(*args)
    return least.flops + least.bytes


def check(
    op: Op, levels: Sequence[str], command: Sequence[str | Path], folder: Path, threads: int, bench: bool = False,
    behind: int = 61,
) -> int:  # fmt: skip
    """Run the op's kernels at ``levels`` with the runner, and compare each result with the reference in float64; how
    many times they used more than one thread.  ``behind``: elements of each buffer behind its last that counts."""
    records, runs = Records(), []
    for label, args, want in _true(op, bench):
        for level in levels:
            with foreign(level):
                for kernel in (k for k in op.kernels if k.device == "cpu" and k.decline(*args) is None):
                    run = Fenced(op, args, behind)
                    launch = kernel.bind(run.outs, run.args)
                    if isinstance(launch, CpuLaunch):  # others call PyTorch
                        records.add(launch, level)
                        runs.append((f"{label} / {kernel.name} at {level}", run, want))
    assert runs, f"no kernel of {op.name} takes any of its cases at {', '.join(levels)}"
    shared = records.run(command, folder / f"{op.name}.records", threads)
    for label, run, want in runs:
        assert_all_close(op, label, run.results(), want)
    return shared


def _true(op: Op, bench: bool) -> list[tuple[str, tuple[Any, ...], dict[str, Tensor]]]:
    """:func:`arguments`, each with what the reference makes of them in float64; kept, where several tests ask."""
    small = _kept(op.name)
    return small if not bench else small + [(label, args, truth(op, args)) for label, args in large(op)]


@functools.cache
def _kept(name: str) -> list[tuple[str, tuple[Any, ...], dict[str, Tensor]]]:
    op = registry.get(name)
    return [(label, args, truth(op, args)) for label, args in arguments(op)]
