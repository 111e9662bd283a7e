"""Interleaved timing: every contender runs once in each round, so that a noisy neighbour meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds: median, the 20th and 80th percentile; ``ratio`` of the baseline's time to it."""

    median: float
    p20: float
    p80: float
    ratio: float
    rounds: int


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(call: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Seconds a call, the mean of ``repeats`` calls on end."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    sample: float = 0.002,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time ``contenders`` (already warm) A B C A B C … for about ``seconds`` each; ``sample`` is the least length of
    one measurement, reached by repeating short calls (0: single calls).  The order turns by one each round."""
    repeats = dict.fromkeys(contenders, 1)
    for name, call in contenders.items() if sample else ():
        length = min(once(call, 1, device) for _ in range(2))
        repeats[name] = max(1, round(sample / max(length, 1e-7)))
    names, spent, rounds = list(contenders), 0.0, 0
    samples: dict[str, list[float]] = {name: [] for name in names}
    while rounds < min_rounds or spent < seconds * len(names):
        for name in names:
            t = once(contenders[name], repeats[name], device)
            samples[name].append(t)
            spent += t * repeats[name]
        names.append(names.pop(0))
        rounds += 1
    return {name: _summary(samples[name], samples[baseline]) for name in contenders}


def _summary(times: list[float], base: list[float]) -> Timing:
    ordered = sorted(times)
    at = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
    ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
    return Timing(statistics.median(times), at(0.2), at(0.8), ratio, len(times))
