"""Benchmark models that make pictures: seconds a picture, and from a cold process to the first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusegen.bench import verify, whole
from fusegen.bench.row import Row
from fusegen.kernels.op import Tolerance

PROMPT, STEPS, GUIDANCE, SAMPLER = "pig face", 20, 3.0, "dpmpp_2m"
BATCHES = {"batch 1": 1, "batch 8": 8}
COLD = "first picture of a process"
# Bounds on pictures in [0, 1] against eager float32, three times what was measured: bfloat16 rounds every activation of
# 40 network runs, and float32 may turn a value of 256.
BOUNDS = {"float32": Tolerance(1e-4, 1.2e-2), "bfloat16": Tolerance(6e-3, 5e-2)}

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


def pixels(images: Any) -> torch.Tensor:
    """Pictures as (B, H, W, C) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).float() / 255


def emoji(who: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], seconds: float) -> Iterator[list[Row]]:
    """The emoji model: 20 steps of DPM++ 2M with guidance, batches of 1 and 8, then the first picture of a process.

    Yields the rows of each dtype and case as they are measured; the contenders of a dtype are timed in turn.
    """
    for dtype in dtypes or ("float32", "bfloat16"):
        made = [_emoji(name, dtype) for name in who or whole.WHO] if set(cases) != {COLD} else []
        for case in cases:
            if case == COLD:
                yield whole.cold("emoji", COLD, "fusegen.bench.picture_models", who or whole.WHO, dtype)
            else:
                expected = pixels(_emoji("eager", "float32").make(BATCHES[case])())
                yield _steady(made, case, expected, seconds)


def _steady(made: Sequence[Contender], case: str, expected: torch.Tensor, seconds: float) -> list[Row]:
    calls, rows = {}, {}
    for c in made:
        call = c.make(BATCHES[case])
        verdict = verify.check([pixels(call())], [expected], BOUNDS[c.dtype])
        call()
        rows[c.name] = whole.gated("emoji", case, c.name, c.dtype, verdict)
        if verdict.ok:
            calls[c.name] = call
    return whole.timed(rows, calls, seconds, lambda t: {"seconds_per_image": t / BATCHES[case]})


EMOJI = whole.Suite((*BATCHES, COLD), emoji)

if __name__ == "__main__":
    whole.say({"pixels": float(pixels(_emoji(*sys.argv[1:]).make(1)()).mean())})
