"""The stages of ``make gpu-check`` that look at results: references, noise bits, batches, graphs."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusegen.bench.gpu_stages import (
    Setting,
    arguments,
    bound,
    captured,
    cases,
    expected,
    judged,
    load,
    name_of,
    reason,
    row,
    served,
)
from fusegen.bench.kernels import results
from fusegen.bench.row import Row
from fusegen.kernels import op as registry

BESIDE = 4  # kernels that an op's stage compiles at a time, beside those of two dozen others


def launches(setting: Setting, name: str) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(op, arguments, configuration) of every case that :func:`correct` will run."""
    op, module = load(setting)[name], importlib.import_module(f"fusegen.kernels.gpu.{name}")
    for case, dtype in cases(op, setting, bench=False):
        args = registry.complete(op, case.build(torch.Generator().manual_seed(0), dtype))
        if module.KERNELS[0].decline(*args) is None:
            yield name, args, module.TUNABLE.default(*args) if hasattr(module, "TUNABLE") else None


def precompile(setting: Setting, name: str) -> Iterator[Row]:
    """Compile what the cases of an op take side by side, so that this stage and the races find it on disk."""
    if setting.rehearse:
        count = sum(1 for _ in launches(setting, name))
        yield row(setting, f"{name} kernels", f"{count} launches", "fusegen", ok=True, note="not in a rehearsal")
        return
    start = time.time()
    warm = importlib.import_module("fusegen.kernels.gpu.warm").warm
    reasons = warm(launches(setting, name), most=BESIDE)
    bad = [why for why in reasons if why]
    note = f"{len(bad)} did not compile: {bad[0]}" if bad else f"{time.time() - start:.0f} s"
    yield row(setting, f"{name} kernels", f"{len(reasons)} kernels", "fusegen", ok=not bad, note=note[:300])


def correct(setting: Setting, name: str) -> Iterator[Row]:
    """Every case in every dtype against the float64 reference; outputs start as NaN.  Compiled first, side by side."""
    op = load(setting)[name]
    yield from precompile(setting, name)
    for case, dtype in cases(op, setting, bench=False):
        base = row(setting, f"{name} correct", case.name, "fusegen", name_of(dtype))
        if setting.over():
            yield replace(base, note="not reached: out of time")
            continue
        try:
            seed = 0 if setting.rehearse else int(time.time())  # a rehearsal is the same every time
            args = arguments(op, case, dtype, setting, seed=seed)
            want = expected(op, tuple(a.clone() if isinstance(a, Tensor) else a for a in args))
            if declined := registry.pick(op, "cuda", args).refusal():
                yield replace(base, ok=True, note=f"the reference serves: {declined}"[:300])
                continue
            outs, launch = bound(op, args)
            launch.run()
            yield judged(base, results(op, outs, args), want, op.tolerance[dtype])
        except Exception as error:
            yield replace(base, note=reason(error))


def noise(setting: Setting) -> Iterator[Row]:
    """The noise kernel's bits against numpy's, over many seeds and steps."""
    op = load(setting)["noise_normal"]
    from fusegen.kernels.noise_normal import normal_numpy

    shape = [61, 7] if setting.rehearse else [4, 1031, 257]
    for step, sample in ((0, 0), (1, 3), (16, 0), (2**31 + 5, 2**32 - 1)):
        seeds = torch.randint(-(2**63), 2**63 - 1, (5,), dtype=torch.int64)
        outs, launch = bound(op, (seeds.to(setting.device), shape, step, sample))
        launch.run()
        want = torch.from_numpy(normal_numpy(seeds.numpy(), shape, step, sample))
        same = bool((outs[0].cpu().view(torch.int32) == want.view(torch.int32)).all())
        note = "" if same else "not equal to the bit"
        yield row(setting, "noise bits", f"step {step}, sample {sample}", "fusegen", "float32", ok=same, note=note)


def batch(setting: Setting) -> Iterator[Row]:
    """A sample's result must be the same to the bit whatever batch it is in."""
    for name, op in served(setting).items():
        for case, dtype in [pair for pair in cases(op, setting, bench=True) if pair[1] == torch.bfloat16][:3]:
            args = arguments(op, case, dtype, setting)
            if setting.over() or op.alone is None or args[0].shape[0] < 2:
                continue
            base = row(setting, f"{name} batch", case.name, "fusegen", name_of(dtype))
            try:
                alone = op.alone(args, 0)
                (whole, first), (single, second) = bound(op, args), bound(op, alone)
                first.run()
                second.run()
                same = torch.equal(whole[0][:1], single[0])
                yield replace(base, ok=same, note="" if same else "sample 0 depends on its batch")
            except Exception as error:
                yield replace(base, note=reason(error))


def graphs(setting: Setting) -> Iterator[Row]:
    """Each op captured in a CUDA graph and replayed: the same bits as the plain launch.  A sampler step reads its row
    at replay: the row is changed after capture."""
    for name, op in served(setting).items():
        for case, dtype in [pair for pair in cases(op, setting, bench=True) if pair[1] == torch.float32][:3]:
            base = row(setting, f"{name} graph", case.name, "fusegen", name_of(dtype))
            try:
                args = arguments(op, case, dtype, setting)
                outs, launch = bound(op, args)
                replay = captured([launch.run])
                if name == "sampler_step":
                    args[2][3] = 0.123  # the coefficient of x
                for out in outs:
                    out.fill_(math.nan if out.is_floating_point() else -1)
                replay()
                replayed = [o.clone() for o in outs]
                launch.run()
                same = all(torch.equal(a, b) for a, b in zip(replayed, outs, strict=True))
                yield replace(base, ok=same, note="" if same else "a replay differs from the launch")
            except Exception as error:
                yield replace(base, note=reason(error))
