"""What the benchmarks of whole models share: rows behind a gate, and the time from a cold process to a first output."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusegen.bench import timing, verify
from fusegen.bench.row import Row, versions

WHO = ("eager", "compile", "fusegen")


@dataclass(frozen=True)
class Suite:
    """A model's benchmark.  ``run(who, dtypes, cases, seconds)`` yields the rows of each dtype and case as they are
    measured; each of ``cases`` can be run by itself: torch.compile takes minutes for every case, dtype and process.
    ``who``: the contenders it runs; ``more``: others, that run only where they are named."""

    cases: Sequence[str]
    run: Callable[[Sequence[str], Sequence[str], Sequence[str], float], Iterator[list[Row]]]
    who: Sequence[str] = WHO
    more: Sequence[str] = ()


def gated(what: str, case: str, name: str, dtype: str, verdict: verify.Verdict) -> Row:
    """A contender's row before it is timed."""
    note = "" if verdict.ok else f"over its error bound: rms {verdict.rms:.2g}, peak {verdict.peak:.2g}"
    facts: dict[str, Any] = dict(threads=torch.get_num_threads(), versions=versions(), note=note)
    return Row(what, case, name, dtype, "cpu", verdict.ok, error_rms=verdict.rms, error_peak=verdict.peak, **facts)


def timed(
    rows: Mapping[str, Row],
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    extra: Callable[[float], dict[str, float]],
    min_rounds: int = 5,
) -> list[Row]:
    """``rows`` with the times of the ``calls``, those that passed their gate, in turn; the first is the baseline.
    ``extra(median)``: what else a row says."""
    if not calls:  # nobody passed: the rows say why, and there is no time to give
        return list(rows.values())
    took = timing.interleave(calls, next(iter(calls)), seconds=seconds, min_rounds=min_rounds, sample=0.0)
    return [_with(row, took[key], extra) if key in took else row for key, row in rows.items()]


def _with(row: Row, t: timing.Timing, extra: Callable[[float], dict[str, float]]) -> Row:
    more = extra(t.median) | {"rounds": float(t.rounds)}
    return replace(row, median_s=t.median, p20_s=t.p20, p80_s=t.p80, ratio=t.ratio, extra=more)


def cold(
    what: str, case: str, module: str, who: Sequence[str], dtype: str, more: Sequence[str] = (), rounds: int = 3
) -> list[Row]:
    """From starting Python to a first output, each in a process of its own, in turn; compile caches start empty.

    ``python -m module NAME DTYPE *more`` makes the output of the contender NAME and tells of it by :func:`say`.  A
    row's extra has ``peak_mib``, the most memory that was resident in the process, not in a compiler it started."""
    times: dict[str, list[float]] = {name: [] for name in who}
    peaks: dict[str, float] = dict.fromkeys(who, 0.0)
    for index in range(rounds):
        for name in times:
            if name != "compile" or index == 0:  # it takes minutes, and once tells enough
                taken, peak = _process(module, name, dtype, *more)
                times[name].append(taken)
                peaks[name] = max(peaks[name], peak)
    base = statistics.median(times.get("eager") or next(iter(times.values())))
    rows = []
    for name, all_taken in times.items():
        middle = statistics.median(all_taken)
        span: dict[str, Any] = dict(median_s=middle, p20_s=min(all_taken), p80_s=max(all_taken), ratio=base / middle)
        extra = {"rounds": float(len(all_taken)), "peak_mib": round(peaks[name], 1)}
        span |= dict(threads=torch.get_num_threads(), versions=versions(), extra=extra)
        rows.append(Row(what, case, name, dtype, "cpu", True, **span))
    return rows


def _process(module: str, *arguments: str) -> tuple[float, float]:
    """Seconds, and MiB resident at the most."""
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
        start = time.perf_counter()
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
        taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the process of {arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return taken, float(json.loads(done.stdout)["peak_mib"])


def say(made: Mapping[str, Any]) -> None:
    """Print what a process of :func:`cold` made, with the most memory that was resident in it, in MiB."""
    print(json.dumps({**made, "peak_mib": peak_mib()}))


def peak_mib() -> float:
    """The most memory that was resident in this process, in MiB.

    A parent cannot ask for that: what Linux reports of a child begins with what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kib) / 1024
