"""Benchmark every op of the registry over its realistic cases: eager PyTorch, ``torch.compile``, fusegen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusegen.bench import contenders, roofline, timing, verify
from fusegen.bench.row import Row, versions
from fusegen.kernels import op as registry
from fusegen.kernels.op import Case, Cost, Op, Tolerance

PEER_MARGIN = 4.0  # a peer's error may be this many times our bound: theirs is a different order of rounding


@dataclass(frozen=True)
class Job:
    """One op, one of its cases, one dtype, on one device."""

    op: Op
    case: Case
    dtype: torch.dtype
    device: str = "cpu"

    def args(self) -> tuple[Any, ...]:
        """The case's arguments, the same at every call."""
        made = self.case.build(torch.Generator().manual_seed(0), self.dtype)
        return tuple(a.to(self.device) if isinstance(a, Tensor) else a for a in registry.complete(self.op, made))


def jobs(names: Sequence[str] = (), cases: Sequence[str] = (), dtypes: Sequence[torch.dtype] = ()) -> Iterator[Job]:
    """The benchmark cases, all or those named; float16 is left to GPUs."""
    known = registry.ops()
    for name in names or sorted(known):
        for case in registry.get(name).cases:
            if case.bench and (not cases or case.name in cases):
                for dtype in case.dtypes:
                    if dtype in (dtypes or (torch.float32, torch.bfloat16)):
                        yield Job(known[name], case, dtype)


def reference(job: Job) -> tuple[Tensor, ...]:
    """The op's outputs in float64, then the arguments that it writes."""
    wide = tuple(_double(a) for a in job.args())
    return results(job.op, job.op.reference(*wide), wide)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def results(op: Op, value: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What a call of ``op`` returned, as a tuple, and those of ``args`` that it writes."""
    names = [a.name for a in getattr(torch.ops.fusegen, op.name).default._schema.arguments]
    returned = tuple(value) if isinstance(value, (tuple, list)) else () if value is None else (value,)
    return (*returned, *(args[names.index(name)] for name in op.mutates))


@torch.no_grad()
def run(job: Job, names: Iterable[str] = contenders.KERNELS, seconds: float = 0.5) -> list[Row]:
    """One row a contender that has a form of the op; a failed gate or a failed build is a row too.  Eager PyTorch is
    the baseline of the ratios, or the first contender where eager was not asked for; there is no ratio to a form that
    failed its gate."""
    expected = reference(job)
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Row] = {}
    for name in names:
        row, call = _gate(job, name, expected)
        if row is not None:
            rows[name] = row
        if call is not None:
            calls[name] = call
    if not calls:
        return list(rows.values())
    baseline = "eager" if "eager" in calls else next(iter(calls))
    cost = job.op.cost(*job.args())
    beyond = job.device == "cpu" and cost.bytes > roofline.last_cache()
    streams = _streams() if beyond else {}
    among = calls | {name: stream.call for name, stream in streams.items()}
    timings = timing.interleave(among, baseline, seconds=seconds, device=job.device)
    ceilings, rates = roofline.measure(job.device), {k: s.bytes / timings[k].median for k, s in streams.items()}
    ceilings = replace(ceilings, copy=rates.get("copy", ceilings.copy), read=rates.get("read", ceilings.read))
    floor = ceilings.seconds(cost, job.dtype)
    timed = [_timed(row, timings[name], cost, floor) if name in calls else row for name, row in rows.items()]
    return [replace(row, ratio=None) for row in timed] if baseline != "eager" and "eager" in rows else timed


@functools.cache
def _streams() -> dict[str, roofline.Stream]:
    """Streams through memory, timed in turn with an op that goes beyond the caches: how fast memory is may change from
    one minute to the next.  Half a GiB, made once a process."""
    return {"copy": roofline.copying(), "read": roofline.reading()}


def _bound(op: Op, name: str, dtype: torch.dtype) -> Tolerance:
    """What an output of ``dtype`` by the contender ``name`` is held to."""
    own, margin = op.tolerance[dtype], 1.0 if name == "fusegen" else PEER_MARGIN
    return contenders.BOUNDS.get((op.name, name)) or Tolerance(own.rms * margin, own.peak * margin)


def _gate(job: Job, name: str, expected: tuple[Tensor, ...]) -> tuple[Row | None, Callable[[], Any] | None]:
    args = job.args()
    base: dict[str, Any] = dict(what=job.op.name, case=job.case.name, contender=name)
    base |= dict(dtype=str(job.dtype).removeprefix("torch."), device=job.device)
    base |= dict(threads=torch.get_num_threads(), versions=versions())
    base |= dict(shapes=tuple(tuple(a.shape) for a in args if isinstance(a, Tensor)))
    try:
        call = contenders.KERNELS[name](job.op, args)
        if call is None and name != "fusegen":
            return None, None
        if call is None:
            return Row(**base, ok=False, note="no kernel serves these arguments"), None
        outs = results(job.op, call(), args)
        verdict = verify.check(outs, expected, [_bound(job.op, name, o.dtype) for o in outs])
        call()
    except Exception as error:  # a peer that cannot build or run is a result, not the end of the run
        return Row(**base, ok=False, note=f"{type(error).__name__}: {error}".splitlines()[0][:300]), None
    note = "" if verdict.ok else "over its error bound"
    row = Row(**base, ok=verdict.ok, error_rms=verdict.rms, error_peak=verdict.peak, note=note)
    return row, call if verdict.ok else None


def _timed(row: Row, t: timing.Timing, cost: Cost, floor: float) -> Row:
    share = floor / t.median
    row = replace(row, gbps=cost.bytes / t.median / 1e9, gflops=cost.flops / t.median / 1e9, roofline_share=share)
    return replace(row, median_s=t.median, p20_s=t.p20, p80_s=t.p80, ratio=t.ratio)
