"""Benchmark whole models: seconds a picture in steady state, and from a cold process to the first picture."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fusegen.bench import text_models, timing, verify
from fusegen.bench.row import Row, versions
from fusegen.kernels.op import Tolerance

PROMPT, STEPS, GUIDANCE, SAMPLER = "pig face", 20, 3.0, "dpmpp_2m"
BATCHES = (1, 8)
# Bounds on pictures in [0, 1] against eager float32: bfloat16 rounds every activation of 40 network runs.
BOUNDS = {"float32": Tolerance(2e-3, 2e-2), "bfloat16": Tolerance(5e-2, 5e-1)}
WHO = ("eager", "compile", "fusegen")

Make = Callable[[int], Callable[[], Any]]


@dataclass(frozen=True)
class Contender:
    """Who generates, in which dtype; ``make(batch)`` is the call that returns the pictures."""

    name: str
    dtype: str
    make: Make


def _emoji(name: str, dtype: str) -> Contender:
    import fusegen

    model = fusegen.load("emoji", dtype=dtype)
    if name == "fusegen":
        request: dict[str, Any] = dict(steps=STEPS, guidance=GUIDANCE, sampler=SAMPLER)
        return Contender(name, dtype, lambda n: lambda: model.generate(PROMPT, seeds=range(n), **request))
    from fusegen.bench.pipelines import EagerTextToImage

    peer = EagerTextToImage(model, getattr(torch, dtype), compiled=name == "compile")
    return Contender(name, dtype, lambda n: lambda: peer.generate(PROMPT, STEPS, GUIDANCE, range(n), SAMPLER))


def _pixels(images: Any) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).float() / 255


def emoji(who: Sequence[str], dtypes: Sequence[str], seconds: float) -> list[Row]:
    """The emoji model: 20 steps of DPM++ 2M with guidance, batches of 1 and 8, then the first picture of a process."""
    made = [_emoji(name, dtype) for name in who or WHO for dtype in dtypes or ("float32", "bfloat16")]
    rows = []
    for batch in BATCHES:
        expected = _pixels(_emoji("eager", "float32").make(batch)())
        rows += _steady(made, batch, expected, seconds)
    last = made[-1].dtype
    return rows + _cold([c.name for c in made if c.dtype == last], last)


def _steady(made: Sequence[Contender], batch: int, expected: torch.Tensor, seconds: float) -> list[Row]:
    calls, rows = {}, {}
    for c in made:
        call = c.make(batch)
        verdict = verify.check([_pixels(call())], [expected], BOUNDS[c.dtype])
        call()
        key = f"{c.name} {c.dtype}"
        rows[key] = _row("emoji", f"batch {batch}", c, verdict)
        if verdict.ok:
            calls[key] = call
    if not calls:  # nobody passed: the rows say why, and there is no time to give
        return list(rows.values())
    baseline = next(iter(calls))
    timed = timing.interleave(calls, baseline, seconds=seconds, sample=0.0)
    return [_with(rows[key], timed[key], batch) if key in timed else rows[key] for key in rows]


def _row(what: str, case: str, c: Contender, verdict: verify.Verdict) -> Row:
    note = "" if verdict.ok else f"over its error bound: rms {verdict.rms:.2g}, peak {verdict.peak:.2g}"
    facts: dict[str, Any] = dict(threads=torch.get_num_threads(), versions=versions(), note=note)
    errors: dict[str, Any] = dict(error_rms=verdict.rms, error_peak=verdict.peak)
    return Row(what, case, c.name, c.dtype, "cpu", verdict.ok, **errors, **facts)


def _with(row: Row, t: timing.Timing, batch: int) -> Row:
    extra = {"seconds_per_image": t.median / batch, "rounds": t.rounds}
    return replace(row, median_s=t.median, p20_s=t.p20, p80_s=t.p80, ratio=t.ratio, extra=extra)


def _cold(who: Iterable[str], dtype: str, rounds: int = 3) -> list[Row]:
    """From starting Python to the first picture, each in a process of its own, in turn; compile caches start empty."""
    times: dict[str, list[float]] = {name: [] for name in who}
    for index in range(rounds):
        for name in times:
            if name != "compile" or index == 0:  # it takes minutes, and once tells enough
                times[name].append(_first(name, dtype))
    base = statistics.median(times.get("eager") or next(iter(times.values())))
    rows = []
    for name, taken in times.items():
        middle = statistics.median(taken)
        span: dict[str, Any] = dict(median_s=middle, p20_s=min(taken), p80_s=max(taken), ratio=base / middle)
        extra = {"rounds": float(len(taken))}
        rows.append(Row("emoji", "first picture of a process", name, dtype, "cpu", True, **span, extra=extra))
    return [replace(r, threads=torch.get_num_threads(), versions=versions()) for r in rows]


def _first(name: str, dtype: str) -> float:
    import time

    with tempfile.TemporaryDirectory() as empty:
        cold = {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
        start = time.perf_counter()
        command = [sys.executable, "-m", "fusegen.bench.models", name, dtype]
        done = subprocess.run(command, env=os.environ | cold, capture_output=True, text=True)
        taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the process of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    json.loads(done.stdout)
    return taken


MODELS: Mapping[str, Callable[[Sequence[str], Sequence[str], float], list[Row]]] = {
    "emoji": emoji,
    "pycode": lambda *a: [r for rows in text_models.pycode(a[0], a[1], text_models.CASES, a[2]) for r in rows],
}

if __name__ == "__main__":
    print(json.dumps({"pixels": float(_pixels(_emoji(*sys.argv[1:]).make(1)()).mean())}))
