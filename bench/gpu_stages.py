"""What the stages of ``make gpu-check`` share: the setting, arguments on the device, launches, rows, graphs."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusegen.bench import kernels, verify
from fusegen.bench.row import Row, versions
from fusegen.kernels import catalogue
from fusegen.kernels import op as registry
from fusegen.kernels.op import Case, Launch, Op, Tolerance

Call = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """``device``: "cuda", or "cpu" to rehearse under Triton's interpreter; ``until``: when to stop (time.time())."""

    device: str
    until: float

    @property
    def rehearse(self) -> bool:
        return self.device == "cpu"

    def over(self) -> bool:
        return time.time() > self.until


def load(setting: Setting) -> Mapping[str, Op]:
    """The registry; in a rehearsal with the GPU kernels too, which it leaves out where there is no GPU."""
    found = registry.ops()
    if setting.rehearse:
        importlib.import_module("fusegen.kernels.gpu.interpreter").mend()
    for name in catalogue.triton_names() if setting.rehearse else ():
        if not any(k.device == "cuda" for k in found[name].kernels):
            found[name].kernels.extend(importlib.import_module(f"fusegen.kernels.gpu.{name}").KERNELS)
    return found


def served(setting: Setting) -> Mapping[str, Op]:
    """The ops that have a kernel for GPUs."""
    found = load(setting)
    return {name: found[name] for name in catalogue.triton_names()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def place(value: Any, device: str) -> Any:
    """``value`` on ``device`` with its strides and offset: the whole storage moves, gaps and all."""
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def arguments(op: Op, case: Case, dtype: torch.dtype, setting: Setting, seed: int = 0) -> tuple[Any, ...]:
    made = registry.complete(op, case.build(torch.Generator().manual_seed(seed), dtype))
    return tuple(place(a, setting.device) for a in made)


def expected(op: Op, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The float64 reference's outputs and what it wrote of its arguments."""
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return kernels.results(op, op.reference(*wide), wide)


class Declined(RuntimeError):
    """No kernel takes these arguments; the reference serves them.  One line."""


def bound(op: Op, args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Launch]:
    """(outputs full of NaN, the launch of the GPU kernel); raises :class:`Declined`."""
    picked = registry.pick(op, "cuda", args)
    if picked.kernel is None:
        raise Declined(f"the reference serves: {picked.refusal()}")
    outs = op.allocate(*args)
    for out in outs:
        out.fill_(math.nan if out.is_floating_point() else -1)
    return outs, picked.kernel.bind(outs, args)


def row(setting: Setting, what: str, case: str, contender: str, dtype: str = "", **more: Any) -> Row:
    device = torch.cuda.get_device_name() if setting.device == "cuda" else "interpreter"
    return Row(what, case, contender, dtype, device, more.pop("ok", False), versions=versions(), **more)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def judged(base: Row, outs: tuple[Tensor, ...], want: tuple[Tensor, ...], limit: Tolerance) -> Row:
    """``base`` with the errors of ``outs``; a NaN on both sides (history nobody read) is no error."""
    both = [torch.isnan(o) & torch.isnan(w) for o, w in zip(outs, want, strict=True)]
    got, wanted = ([t.masked_fill(b, 0.0) for t, b in zip(side, both, strict=True)] for side in (outs, want))
    found = verify.check(got, wanted, limit)
    note = base.note if found.ok else "over its error bound"
    return replace(base, ok=found.ok, error_rms=found.rms, error_peak=found.peak, note=note)


FEW = 4  # cases that float16, and the race in float32, are held to: their code differs in little but names


def cases(op: Op, setting: Setting, bench: bool) -> Iterator[tuple[Case, torch.dtype]]:
    """Cases and dtypes: bfloat16 first, as what matters most should be there if time runs out."""
    if setting.rehearse:
        chosen = [c for c in op.cases if c.small and "no " not in c.name and "one " not in c.name][:2]
    else:
        chosen = [c for c in op.cases if not bench or c.bench]
    dtypes = (torch.bfloat16, torch.float32) if bench else (torch.bfloat16, torch.float32, torch.float16)
    for dtype in dtypes[1:] if setting.rehearse else dtypes:  # the interpreter cuts bfloat16 where GPUs round
        few = dtype == torch.float16 or (bench and dtype == torch.float32)
        yield from ((case, dtype) for case in (chosen[:FEW] if few else chosen) if dtype in case.dtypes)


def captured(calls: list[Call]) -> Call:
    """``calls``, run in order, as one CUDA graph's replay; on a CPU as they are."""
    if not torch.cuda.is_available():
        return lambda: [c() for c in calls]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
