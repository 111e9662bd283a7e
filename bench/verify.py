"""The gate: no speed is reported for an output that is not right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusegen.kernels.op import Tolerance


@dataclass(frozen=True)
class Verdict:
    """Relative errors against the reference, and whether they are inside the bound."""

    rms: float
    peak: float
    ok: bool


def errors(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """Root mean square and largest error of ``out``, relative to the reference's; infinite for NaN or another shape.

    An infinity where the reference has the same one is no error.
    """
    if out.shape != reference.shape:
        return math.inf, math.inf
    if out.numel() == 0:
        return 0.0, 0.0
    same = reference.isinf() & (out == reference)
    ref = reference.double().masked_fill(same, 0.0)
    difference = out.double().masked_fill(same, 0.0) - ref
    if not bool(torch.isfinite(difference).all()):
        return math.inf, math.inf
    scale = float(ref.square().mean().sqrt()) or 1.0
    peak = float(ref.abs().max()) or 1.0
    return float(difference.square().mean().sqrt()) / scale, float(difference.abs().max()) / peak


def check(outs: Sequence[Tensor], references: Sequence[Tensor], bound: Tolerance | Sequence[Tolerance]) -> Verdict:
    """The worst errors over all outputs, each held to ``bound`` or to its own."""
    pairs = [errors(o, r) for o, r in zip(outs, references, strict=True)]
    bounds = [bound] * len(pairs) if isinstance(bound, Tolerance) else bound
    good = all(rms <= b.rms and peak <= b.peak for (rms, peak), b in zip(pairs, bounds, strict=True))
    return Verdict(max(p[0] for p in pairs), max(p[1] for p in pairs), good)
