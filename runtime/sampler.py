"""Samplers: functions that fill coefficient rows, on the host, in float64; they never touch a tensor.

A sampler is given the noise levels to visit (``schedule.levels``: one more than its steps) and returns one
:class:`Row` per model evaluation.  A row says how the next state is put together from the state x, the denoised
prediction D, what earlier rows stored of them, and fresh noise z:

    next = x * X + denoised * D + noise * z + sum(stored_x[slot] * hx[slot]) + sum(stored_denoised[slot] * hd[slot])

The ``sampler_step`` kernel does just that.  To add a sampler: write its function here or in a file beside this one, and
enter it in ``SAMPLERS``.  Its keyword parameters are the options a caller may set.

Levels are pairs (alpha, sigma) with x = alpha * x0 + sigma * noise, so one function serves both the models trained on
betas and the flow-matching ones.  Deterministic first-order steps of all families (DDIM, Euler in Karras et al.'s
form, flow Euler) are one formula, :func:`toward`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from fusegen.kernels import sampler_step as kernel
from fusegen.runtime.errors import RequestError
from fusegen.runtime.schedule import GRIDS, Array, Level, ScheduleConfig, levels, one_of


@dataclass(frozen=True)
class Row:
    """One evaluation at ``level`` and the combination that follows; see the module's text for the coefficients.

    ``store_x``, ``store_denoised``: the slot this evaluation's x or denoised prediction is kept in, -1 for none.
    Slots are read before they are written.
    """

    level: Level
    x: float
    denoised: float
    noise: float = 0.0
    hx: Mapping[int, float] = field(default_factory=dict)
    hd: Mapping[int, float] = field(default_factory=dict)
    store_x: int = -1
    store_denoised: int = -1


Path = Sequence[Level]

# A noise-to-signal ratio above which a state is noise alone: the schedules of published models start at 5 to 160, the
# cosine one at 20,000.
NO_SIGNAL = 1000.0


CLEAN = Level(0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Sampler:
    """``fill(path, **options)`` returns the rows; ``grid`` says which levels it visits (``schedule.times``)."""

    fill: Callable[..., list[Row]]
    grid: str
    source: str

    def __post_init__(self) -> None:
        one_of("grid", self.grid, GRIDS)

    def options(self) -> tuple[str, ...]:
        """The names of the options a caller may set."""
        return tuple(inspect.signature(self.fill).parameters)[1:]


@dataclass(frozen=True)
class Coefficients:
    """All that a denoising loop needs of a sampler.

    ``rows``: (evaluations, ``sampler_step.ROW``) float64.  ``times``: (evaluations,) float64, what the model is told.
    ``initial``: the first state is this times unit noise.  ``first_input``: the first model input is this times it.
    """

    sampler: str
    rows: Array
    times: Array
    initial: float
    first_input: float

    def __len__(self) -> int:
        return len(self.rows)


def toward(now: Level, then: Level, eta: float = 0.0) -> tuple[float, float, float]:
    """One first-order step from ``now`` to ``then``: the factors of x, denoised and noise.

    The noise in x is split: part goes on to the new level, part is replaced by fresh noise, as much of it as
    DDPM's posterior has at ``eta`` 1, none at 0 (Song et al. 2021, equations 12 and 16).  At 1 this is also Karras-form
    ancestral sampling, the first-order SDE form of DPM-Solver++, and the mean of Ho et al. 2020, equation 7.
    """
    if then.sigma == 0:
        return 0.0, then.alpha, 0.0
    left = 0.0 if math.isinf(now.ratio) else (then.ratio / now.ratio) ** 2
    noise = eta * then.sigma * math.sqrt(max(0.0, 1 - left))
    keep = math.sqrt(max(0.0, then.sigma**2 - noise**2)) / now.sigma
    return keep, then.alpha - keep * now.alpha, noise


def ddim(path: Path, eta: float = 0.0) -> list[Row]:
    """Denoising diffusion implicit models, Song et al. 2021."""
    return [Row(now, *toward(now, then, eta)) for now, then in pairwise(path)]


def ddpm(path: Path, variance: str = "fixed_small") -> list[Row]:
    """Ancestral sampling of Ho et al. 2020, section 3.2, with either of its two variances."""
    one_of("variance", variance, ("fixed_small", "fixed_large"))
    rows = ddim(path, eta=1.0)
    if variance == "fixed_large":  # the beta from one visited level to the next, and none into the last
        kept = [now.alpha / then.alpha if then.sigma else 1.0 for now, then in pairwise(path)]
        rows = [replace(row, noise=math.sqrt(1 - k * k)) for row, k in zip(rows, kept, strict=True)]
    return rows


def euler(path: Path) -> list[Row]:
    """Euler steps along the probability-flow ODE, Karras et al. 2022; flow matching's own step."""
    return ddim(path)


def euler_a(path: Path, eta: float = 1.0) -> list[Row]:
    """Ancestral Euler steps (k-diffusion's ``sample_euler_ancestral``)."""
    return ddim(path, eta)


def heun(path: Path) -> list[Row]:
    """Heun's second-order steps, Karras et al. 2022, algorithm 1 without churn: two evaluations a step but the last.

    The ODE is dy/ds = (y - denoised) / s, where y is x / alpha and s is sigma / alpha for a model trained on betas, and
    y is x and s is sigma for a flow-matching one.  A step that starts above ``NO_SIGNAL`` is of first order: averaging
    slopes over so long an interval multiplies the denoised predictions' difference by its length.
    """
    flow = all(math.isclose(level.alpha + level.sigma, 1) for level in path)
    rows = []
    for now, then in pairwise(path):
        second = then.sigma > 0 and (flow or now.ratio < NO_SIGNAL)
        rows.append(Row(now, *toward(now, then), store_x=0 if second else -1, store_denoised=0 if second else -1))
        if second:
            a, b = (now.sigma, then.sigma) if flow else (now.ratio, then.ratio)
            grow, scale, half = (1.0, 1.0, (b - a) / 2) if flow else (then.alpha / now.alpha, then.alpha, (b - a) / 2)
            hx, hd = {0: grow * (1 + half / a)}, {0: -scale * half / a}
            rows.append(Row(then, half / b, -scale * half / b, hx=hx, hd=hd))
    return rows


def dpmpp_2m(path: Path, eta: float = 0.0) -> list[Row]:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2 in its midpoint form; ``eta`` 1 is its SDE form.

    The first step is of first order, and so is one into no noise, or the last of fewer than 15.
    """
    rows, steps = [], len(path) - 1
    for i, (now, then) in enumerate(pairwise(path)):
        x, denoised, noise = toward(now, then, eta)
        h = then.log_snr - now.log_snr
        before = now.log_snr - path[i - 1].log_snr if i else math.inf
        last = i == steps - 1 and steps < 15
        back = 0.0 if math.isinf(h) or last or h == 0 else 0.5 * h / before
        hd = {0: -denoised * back} if back else {}
        rows.append(Row(now, x, denoised * (1 + back), noise, hd=hd, store_denoised=0))
    return rows


def dpmpp_2m_sde(path: Path, eta: float = 1.0) -> list[Row]:
    """The SDE form of DPM-Solver++(2M), Lu et al. 2022b, appendix."""
    return dpmpp_2m(path, eta)


def lcm(path: Path) -> list[Row]:
    """Multistep sampling of a latent consistency model, Luo et al. 2023, algorithm 3.

    The consistency function is c_skip x + c_out denoised, with sigma_data 0.5 and times scaled by 10 (its appendix).
    """
    rows: list[Row] = []
    for now, then in pairwise(path):
        scaled = now.t * 10
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        last = len(rows) == len(path) - 2
        alpha, sigma = (1.0, 0.0) if last else (then.alpha, then.sigma)
        rows.append(Row(now, alpha * skip, alpha * out, sigma))
    return rows


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, "integer", "Ho et al. 2020"),
    "ddim": Sampler(ddim, "integer", "Song et al. 2021"),
    "euler": Sampler(euler, "continuous", "Karras et al. 2022"),
    "euler_a": Sampler(euler_a, "continuous", "k-diffusion"),
    "heun": Sampler(heun, "continuous", "Karras et al. 2022"),
    "dpmpp_2m": Sampler(dpmpp_2m, "open", "Lu et al. 2022"),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, "open", "Lu et al. 2022"),
    "lcm": Sampler(lcm, "distilled", "Luo et al. 2023"),
}

# The names that users of stable-diffusion.cpp, k-diffusion and diffusers know.
ALIASES = {
    "euler_ancestral": "euler_a",
    "dpm++2m": "dpmpp_2m",
    "dpm++_2m": "dpmpp_2m",
    "dpm++2m_sde": "dpmpp_2m_sde",
    "dpm++_2m_sde": "dpmpp_2m_sde",
}


def find(name: str) -> str:
    """The registered name for ``name`` or an alias of it; the error lists those there are."""
    known = ALIASES.get(name, name) if isinstance(name, str) else name
    one_of("sampler", known, tuple(SAMPLERS))
    return known


def coefficients(sampler: str, config: ScheduleConfig, steps: int, **options: Any) -> Coefficients:
    """The coefficients of ``steps`` steps of ``sampler`` under ``config``.

    Options are the sampler's own (``eta``, ``variance``).  Raises RequestError for an unknown name or option, or a
    number of steps that the schedule does not have.
    """
    name = find(sampler)
    entry = SAMPLERS[name]
    for key, value in options.items():
        if key not in entry.options():
            known = ", ".join(entry.options()) or "none"
            raise RequestError(f"{name} has no option {key!r}", "sampler", f"it has {known}")
        if key == "eta" and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise RequestError("eta is not a number from 0 to 1", "sampler", f"it is {value!r}")
    if name == "lcm" and config.betas == "flow":
        raise RequestError("lcm is for models trained on betas", "sampler", "use euler")
    path = levels(config, steps, entry.grid)
    rows = entry.fill(path, **options)
    reached = [row.level for row in rows[1:]] + [CLEAN if name == "lcm" else path[-1]]
    table = np.stack([pack(row, then, config, n) for n, (row, then) in enumerate(zip(rows, reached, strict=True), 1)])
    # Ancestors of the integer and open grids start from unit noise; Karras-form ones from the first level's own share.
    unit = entry.grid != "continuous" or config.spacing == "leading"
    return Coefficients(name, table, np.array([r.level.t for r in rows]), 1.0 if unit else path[0].sigma, 1.0)


def predict(prediction: str, level: Level) -> tuple[float, float]:
    """The factors of x and of the model's output in the denoised prediction.

    epsilon: Ho et al. 2020, equation 15; v: Salimans & Ho 2022, appendix D; flow: x0 = x - sigma (noise - x0).
    """
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow":
        return 1.0, -level.sigma
    if prediction == "v_prediction":
        return level.alpha, -level.sigma
    if level.alpha == 0:
        raise RequestError("a noise prediction says nothing where there is no signal", "schedule", "zero_snr needs v")
    return 1 / level.alpha, -level.sigma / level.alpha


def pack(row: Row, then: Level, config: ScheduleConfig, number: int) -> Array:
    """``row`` as the kernel reads it; evaluation ``number`` (from 1) draws its noise at that step of the counter.

    A known part is brought to ``then``, the level the row leads to, with the noise of the first state (step 0).
    """
    out = np.zeros(kernel.ROW)
    out[kernel.P_X], out[kernel.P_OUT] = predict(config.prediction, row.level)
    out[kernel.CLIP] = math.inf if config.clip is None else config.clip
    out[kernel.X], out[kernel.D], out[kernel.NOISE] = row.x, row.denoised, row.noise
    out[kernel.INPUT], out[kernel.STEP] = 1.0, number
    out[kernel.STORE_X], out[kernel.STORE_D] = row.store_x, row.store_denoised
    out[kernel.KNOWN], out[kernel.KNOWN_NOISE] = then.alpha, then.sigma
    for slot, value in row.hx.items():
        out[kernel.HX0 + slot] = value
    for slot, value in row.hd.items():
        out[kernel.HD0 + slot] = value
    return out
