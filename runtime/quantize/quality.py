"""What quantizing costs: a program in int8 against the same program in float32, on inputs that are stated.

Two measures: the relative root mean square of the error, and the cosine between the outputs, of the worst sample.  Of a
denoiser the outputs that count are those of a whole trajectory, in which errors may grow or cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.compile import default_dtype
from fusegen.runtime.engine import Session
from fusegen.runtime.errors import QualityError
from fusegen.runtime.loop.denoise import Watch, denoise
from fusegen.runtime.program import Program, TensorSpec
from fusegen.runtime.sampler import coefficients
from fusegen.runtime.schedule import ScheduleConfig

LEAST = 0.999  # the cosine below which a quantized program is refused, unless told otherwise
SEED, STEPS, SAMPLER = 1, 20, "dpmpp_2m"
# The schedule and guidance of a denoiser that comes without its own: Stable Diffusion 1.
SCHEDULE = ScheduleConfig(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
GUIDANCE = 7.5

BROKEN, MOST_PSNR = 1e9, 200.0  # in the place of infinities, which JSON lacks

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Trial:
    """A way to run a session for its outputs by name; ``stated`` says on what, as plain data."""

    run: Callable[[Session, Progress | None], Mapping[str, Tensor]]
    stated: Mapping[str, Any]


def measured(original: Program, made: Program, trial: Trial, progress: Progress | None = None) -> dict[str, Any]:
    """The quality of ``made`` as it would run on this CPU, against ``original`` in float32, as plain data.

    ``relative_rms`` is the largest of the outputs', ``cosine`` the smallest of any sample; both also by output.
    """
    dtype = default_dtype("cpu")
    want = trial.run(compile_program(original, "cpu", torch.float32), progress)
    got = trial.run(compile_program(made, "cpu", dtype), progress)
    found = {name: compared(got[name], want[name]) for name in want}
    worst = {
        "relative_rms": max(f["relative_rms"] for f in found.values()),
        "cosine": min(f["cosine"] for f in found.values()),
    }
    short = str(dtype).removeprefix("torch.")
    return {**worst, "outputs": found, "against": "float32", "dtype": short, "inputs": dict(trial.stated)}


def compared(got: Tensor, want: Tensor) -> dict[str, float]:
    """Relative root mean square of the error, the cosine of the sample (dimension 0) that has the smallest, and the
    peak signal-to-noise ratio in decibels, the peak being the range of ``want``.

    Where a value is not finite they are :data:`BROKEN`, -1 and 0.
    """
    a, b = got.double(), want.double()
    if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return {"relative_rms": BROKEN, "cosine": -1.0, "psnr": 0.0}
    if torch.equal(a, b):
        return {"relative_rms": 0.0, "cosine": 1.0, "psnr": MOST_PSNR}
    error = (a - b).square().mean().sqrt()
    psnr = 20 * float(torch.log10((b.max() - b.min()) / error))
    rows = (a.flatten(1), b.flatten(1)) if a.dim() > 1 else (a.reshape(1, -1), b.reshape(1, -1))
    cosine = float(torch.cosine_similarity(*rows, dim=1).min())
    size = b.square().mean().sqrt()
    return {"relative_rms": min(BROKEN, float(error / size)), "cosine": cosine, "psnr": max(0.0, min(MOST_PSNR, psnr))}


def require(found: Mapping[str, Any], least: float, where: str) -> None:
    """Raise :class:`QualityError` where the cosine is below ``least``."""
    if not found["cosine"] >= least:
        raise QualityError(
            f"in int8 the cosine to the original is {found['cosine']:.6f}, below {least:g}", where,
            "keep layers (--most-error, --keep), or allow more with --least-cosine",
        )  # fmt: skip


def trial_of(specs: Mapping[str, TensorSpec], steps: int = STEPS) -> Trial:
    """A trial for a bare program whose inputs have these static specs: a trajectory of a denoiser (inputs x, a time for
    each sample, features of the prompt), one evaluation of anything else.
    """
    ranks = [len(s.shape) for s in specs.values()]
    if ranks == [4, 1, 3] and all(s.dtype.is_floating_point for s in specs.values()):
        return _trajectory(specs, steps)
    inputs = drawn(specs)

    def run(session: Session, progress: Progress | None) -> Mapping[str, Tensor]:
        made = session(**inputs)
        values = made if isinstance(made, tuple) else (made,)
        return {f"output {i}": value for i, value in enumerate(values)}  # rewrites give outputs other names

    stated = {name: list(spec.shape) for name, spec in specs.items()}
    rule = "standard normal; of one dimension: uniform in [0, 1000); integers: 0"
    return Trial(run, {"evaluations": 1, "seed": SEED, "values": rule, "shapes": stated})


def drawn(specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Seeded inputs of static specs: standard normal, times (one dimension) uniform in [0, 1000), integers 0."""
    generator = torch.Generator().manual_seed(SEED)
    out = {}
    for name, spec in specs.items():
        shape = [int(d) for d in spec.shape]
        if not spec.dtype.is_floating_point:
            out[name] = torch.zeros(shape, dtype=spec.dtype)
        elif len(shape) <= 1:
            out[name] = (torch.rand(shape, generator=generator) * 1000).to(spec.dtype)
        else:
            out[name] = torch.randn(shape, generator=generator).to(spec.dtype)
    return out


def _trajectory(specs: Mapping[str, TensorSpec], steps: int) -> Trial:
    """A trajectory from noise, guided where the batch has two halves for it; features are standard normal."""
    (x, shape), (t, _), (features, _) = ((name, [int(d) for d in spec.shape]) for name, spec in specs.items())
    guided = shape[0] % 2 == 0
    seeds = range(SEED, SEED + (shape[0] // 2 if guided else shape[0]))
    plan = coefficients(SAMPLER, SCHEDULE, steps)

    def run(session: Session, progress: Progress | None) -> Mapping[str, Tensor]:
        times = torch.from_numpy(plan.times).to(specs[t].dtype)
        model = session.trajectory(fixed={features: drawn(specs)[features]}, per_step={t: times})
        guidance = GUIDANCE if guided else None
        watch = Watch(progress)
        return {"latent": denoise(model, plan, list(seeds), shape[1:], guidance, dtype=specs[x].dtype, watch=watch)}

    stated = {"evaluations": len(plan), "sampler": SAMPLER, "steps": steps, "guidance": GUIDANCE if guided else 1}
    return Trial(run, {**stated, "seeds": list(seeds), "features": f"standard normal, seed {SEED}", "shape": shape})
