"""The stages of ``make gpu-check`` that measure: the roofline, tuning, and every op against its peers."""

from __future__ import annotations

import importlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusegen.bench import gpu_contenders, kernels, roofline, timing, verify
from fusegen.bench.gpu_stages import (
    Call,
    Declined,
    Setting,
    arguments,
    captured,
    cases,
    expected,
    judged,
    load,
    name_of,
    reason,
    row,
)
from fusegen.bench.row import Row
from fusegen.kernels.op import Op, Tolerance

COMPILED = 1  # cases of an op that torch.compile runs too
ROTATED = 160 * 10**6  # bytes of arguments and outputs that a timed graph goes through, so that the L2 cache is no help


def tune(setting: Setting, name: str) -> Iterator[Row]:
    """Tune on the benchmark cases; one row each, with the winner, and how much faster it is than the rule's choice."""
    op = load(setting)[name]
    module, tuning = (importlib.import_module(f"fusegen.kernels.gpu.{stem}") for stem in (name, "tune"))
    tunable, tuned = module.TUNABLE, set()
    for case, dtype in cases(op, setting, bench=True):
        base = row(setting, f"{name} tune", case.name, "fusegen", name_of(dtype))
        try:
            args = arguments(op, case, dtype, setting)
            key = tunable.key(*args)
            if key in tuned:
                continue
            if setting.over():
                yield replace(base, note="not reached: out of time")
                continue
            tuned.add(key)
            want, limit, used = expected(op, args), op.tolerance[dtype], tuning.choose(tunable, args)
            space: Any = replace(tunable, space=lambda *a: list(tunable.space(*a))[:2]) if setting.rehearse else tunable
            if not setting.rehearse:
                configs = dict.fromkeys([used, *space.space(*args)])
                importlib.import_module("fusegen.kernels.gpu.warm").warm([(name, args, c) for c in configs])
            right = lambda outs: verify.check(outs, want, limit).ok  # noqa: B023, E731
            trials = tuning.tune(space, op.allocate(*args), args, right, lambda run: measure(run, setting))
            yield _tuned(base, trials, used, setting.rehearse)
        except Exception as error:
            yield replace(base, note=reason(error))


def _tuned(base: Row, trials: list[Any], used: Any, rehearse: bool) -> Row:
    best, before = trials[0], next(t.seconds for t in trials if t.config == used)
    if not math.isfinite(best.seconds):
        return replace(base, note=f"nothing ran: {best.reason}")
    out = sum(not math.isfinite(t.seconds) for t in trials)
    found = replace(base, ok=True, extra={"tried": float(len(trials)), "out": float(out)}, note=str(best.config))
    return found if rehearse else replace(found, median_s=best.seconds, ratio=before / best.seconds)


def measure(run: Call, setting: Setting) -> float:
    """Seconds a call inside a CUDA graph of 20, the median of 9 replays; in a rehearsal one call's."""
    if setting.rehearse:
        return timing.once(run, 1)
    replay = captured([run] * 20)
    replay()
    return sorted(timing.once(replay, 1, "cuda") for _ in range(9))[4] / 20


def peaks(setting: Setting) -> Iterator[Row]:
    """The bandwidths and the matrix rates that every share of the roofline is measured against."""
    if setting.rehearse:
        yield row(setting, "roofline", "copy", "torch", ok=True, note="not measured in a rehearsal")
        return
    found = roofline.measure("cuda")
    yield row(setting, "roofline", "copy", "torch", "float32", ok=True, gbps=found.copy / 1e9)
    yield row(setting, "roofline", "read", "torch", "float32", ok=True, gbps=found.read / 1e9)
    for dtype, rate in found.peak.items():
        yield row(setting, "roofline", "matmul", "torch", dtype, ok=True, gflops=rate / 1e9)


def prepare(setting: Setting, name: str) -> Iterator[Row]:
    """What :func:`race` asks ``torch.compile`` for, compiled beside everything else: a race then finds it on disk."""
    op = load(setting)[name]
    for case, dtype in itertools.islice(cases(op, setting, bench=True), 0 if setting.rehearse else COMPILED):
        build = gpu_contenders.of(op, dtype, setting, slow=True).get("compile")
        if build:
            base = row(setting, f"{name} compile", case.name, "compile", name_of(dtype))
            begun = time.time()
            try:
                build(op, arguments(op, case, dtype, setting))
                yield replace(base, ok=True, note=f"{time.time() - begun:.0f} s")
            except Exception as error:
                yield replace(base, note=reason(error))


def race(setting: Setting, name: str) -> Iterator[Row]:
    """A row a contender for each benchmark case: gated on its error, then timed in CUDA graphs, interleaved."""
    op = load(setting)[name]
    for index, (case, dtype) in enumerate(cases(op, setting, bench=True)):
        base = row(setting, name, case.name, "all", name_of(dtype))
        if setting.over():
            yield replace(base, note="not reached: out of time")
            continue
        try:
            yield from _heat(setting, op, base, arguments(op, case, dtype, setting), dtype, index < COMPILED)
        except Exception as error:
            yield replace(base, note=reason(error))


def _heat(setting: Setting, op: Op, base: Row, args: tuple[Any, ...], dtype: torch.dtype, slow: bool) -> Iterable[Row]:
    """One case: its contenders' graphs go through as many copies of the arguments as are larger than the L2 cache."""
    cost, want = op.cost(*args), expected(op, _copy(args))
    base = replace(base, shapes=tuple(tuple(a.shape) for a in args if isinstance(a, Tensor)))
    sets = 1 if setting.rehearse else max(1, min(32, math.ceil(ROTATED / max(1, cost.bytes))))
    many = [args, *(_copy(args) for _ in range(sets - 1))]
    rows: dict[str, Row] = {}
    replays: dict[str, Call] = {}
    for who, build in gpu_contenders.of(op, dtype, setting, slow).items():
        margin = 1.0 if who == "fusegen" else kernels.PEER_MARGIN
        limit = Tolerance(op.tolerance[dtype].rms * margin, op.tolerance[dtype].peak * margin)
        try:
            calls = [build(op, a) for a in many]
            fresh = _copy(args)  # what an op writes of its arguments is its result too
            got = kernels.results(op, build(op, fresh)(), fresh)
            rows[who] = judged(replace(base, contender=who), got, want, limit)
            if rows[who].ok:
                replays[who] = captured(calls)
                replays[who]()
        except Declined as why:
            rows[who] = replace(base, contender=who, ok=not setting.rehearse, note=str(why)[:300])
        except Exception as error:
            # A rehearsal's cases are the smallest, not those that a peer's form is written for.
            excused = setting.rehearse and who != "fusegen"
            rows[who] = replace(base, contender=who, ok=excused, note=reason(error))
    if replays and not setting.rehearse:
        for who, found in timing.interleave(replays, next(iter(replays)), seconds=0.06, device="cuda").items():
            made = timed(rows[who], found, sets, roofline.measure("cuda").seconds(cost, dtype), cost)
            rows[who] = made if "eager" in replays else replace(made, ratio=None)
    return rows.values()


def _copy(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def timed(base: Row, found: timing.Timing, sets: int, floor: float, cost: Any) -> Row:
    """``base`` with the times of one call of a graph of ``sets`` calls."""
    median = found.median / sets
    found = replace(found, median=median, p20=found.p20 / sets, p80=found.p80 / sets)
    base = replace(base, median_s=median, p20_s=found.p20, p80_s=found.p80, ratio=found.ratio, extra={"sets": sets})
    return replace(
        base, gbps=cost.bytes / median / 1e9, gflops=cost.flops / median / 1e9, roofline_share=floor / median
    )
