"""Noise schedules: which noise levels a trained model knows, and which of them a sampler visits.

A noise level is a pair (alpha, sigma): the noisy sample there is ``alpha * x0 + sigma * noise``.  Models trained on
betas (Ho et al. 2020) keep alpha^2 + sigma^2 = 1, flow-matching models (Lipman et al. 2023; Liu et al. 2023) keep
alpha + sigma = 1.  The state of the loop is this noisy sample itself, at the model's own scale, for every sampler: the
variance-exploding form of Karras et al. 2022 is the same state divided by alpha.

Everything here is numpy in float64, on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fusegen.runtime.errors import RequestError

Array = NDArray[np.float64]

BETAS = ("linear", "scaled_linear", "cosine", "flow")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("spaced", "karras", "exponential")
FINALS = ("zero", "sigma_min")
GRIDS = ("integer", "continuous", "open", "distilled")
RHO = 7.0  # Karras et al. 2022, equation 5
LCM_STEPS = 50  # the steps of the solver that latent consistency models are distilled from (Luo et al. 2023)


def one_of(what: str, value: object, known: tuple[str, ...]) -> None:
    """Raise a RequestError that lists the ``known`` names when ``value`` is none of them."""
    if value not in known:
        raise RequestError(f"no {what} is called {value!r}", what, f"there are {', '.join(known)}")


@dataclass(frozen=True)
class ScheduleConfig:
    """How a model was trained, and how its noise levels are visited unless the caller says otherwise.

    ``betas``: the training schedule, ``"flow"`` for flow matching.  ``beta_start``, ``beta_end``: the ends of the
    linear ones.  ``zero_snr``: shift them to no signal at the last step (Lin et al. 2023, algorithm 1).
    ``prediction``: what the model's output is; ``"flow"`` (noise minus x0) goes with ``betas="flow"`` and nothing else.
    ``spacing``: Lin et al. 2023, table 2; ``steps_offset`` is added to ``"leading"`` ones.  ``sigmas``: ``"spaced"``
    takes the levels of those steps, ``"karras"`` and ``"exponential"`` respace the noise-to-signal ratio between their
    ends.  ``final``: end without noise (``"zero"``) or at the schedule's least noisy level (``"sigma_min"``).
    ``shift``: the time shift of flow models (Esser et al. 2024, equation 23).  ``clip``: the denoised sample is
    clamped to plus or minus this (for models in pixel space), None for never.
    """

    betas: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    train_steps: int = 1000
    zero_snr: bool = False
    prediction: str = "epsilon"
    spacing: str = "leading"
    steps_offset: int = 0
    sigmas: str = "spaced"
    final: str = "zero"
    shift: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        one_of("beta schedule", self.betas, BETAS)
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("spacing", self.spacing, SPACINGS)
        one_of("schedule", self.sigmas, SIGMAS)
        one_of("final level", self.final, FINALS)
        if (self.prediction == "flow") != (self.betas == "flow"):
            raise RequestError("prediction 'flow' and betas 'flow' go together", "schedule", "set both or neither")
        if type(self.train_steps) is not int or not 1 <= self.train_steps <= 100_000:
            raise RequestError(f"train_steps {self.train_steps!r} is out of range", "schedule", "give 1 to 100000")
        if type(self.steps_offset) is not int or not 0 <= self.steps_offset < self.train_steps:
            raise RequestError("steps_offset is out of range", "schedule", f"it is {self.steps_offset!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise RequestError("the betas do not rise within (0, 1)", "schedule", "mend beta_start and beta_end")
        if not 0 < self.shift < math.inf:
            raise RequestError("shift is not a positive number", "schedule", f"it is {self.shift!r}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise RequestError("clip is not a positive number", "schedule", f"it is {self.clip!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ScheduleConfig:
        """From a mapping, as a manifest holds it; an unknown key raises."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise RequestError(f"a schedule has no {key!r}", "schedule", f"it has {', '.join(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise RequestError("a value of the schedule has the wrong type", "schedule", str(error)) from None


@dataclass(frozen=True)
class Level:
    """A noise level: the time ``t`` the model is told, and the pair of the module's text."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """Noise to signal, sigma / alpha: Karras et al.'s sigma; infinite where there is no signal."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, log(alpha / sigma): the lambda of Lu et al. 2022."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


CLEAN = Level(0.0, 1.0, 0.0)


@functools.lru_cache(maxsize=16)
def alphas_cumprod(config: ScheduleConfig) -> Array:
    """The cumulative product of 1 - beta, (train_steps,): alpha^2 of every training step."""
    n = config.train_steps
    if config.betas == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, n)
    elif config.betas == "scaled_linear":  # Rombach et al. 2022
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, n) ** 2
    elif config.betas == "cosine":  # Nichol & Dhariwal 2021, equation 17
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise RequestError("a flow-matching schedule has no betas", "schedule", "its levels are t / train_steps")
    products = cast(Array, np.cumprod(1 - betas))
    if config.zero_snr:
        roots = np.sqrt(products)
        products = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    products.setflags(write=False)
    return products


def ratios(config: ScheduleConfig) -> Array:
    """Noise to signal of every training step, (train_steps,), rising."""
    bar = alphas_cumprod(config)
    with np.errstate(divide="ignore"):
        found: Array = np.sqrt((1 - bar) / bar).astype(np.float64)
    return found


def level_at(config: ScheduleConfig, t: float) -> Level:
    """The level of time ``t``; between whole steps the noise-to-signal ratio is interpolated, as diffusers does."""
    if t == int(t):
        bar = float(alphas_cumprod(config)[int(t)])
        return Level(t, math.sqrt(bar), math.sqrt(1 - bar))
    known = ratios(config)
    return _at_ratio(float(np.interp(t, np.arange(len(known)), known)), t)


def _at_ratio(ratio: float, t: float) -> Level:
    alpha = 1 / math.sqrt(1 + ratio * ratio)
    return Level(t, alpha, ratio * alpha)


def time_of(config: ScheduleConfig, ratio: float) -> float:
    """The time whose noise-to-signal ratio is ``ratio``: interpolated in its logarithm, held at the ends."""
    known = ratios(config)
    return float(np.interp(math.log(ratio), np.log(known), np.arange(len(known))))


def times(config: ScheduleConfig, steps: int, grid: str) -> Array:
    """The times a sampler of that ``grid`` visits, (steps,), falling.

    ``"integer"``: whole times from first to last (DDPM, DDIM).  ``"continuous"``: the same, unrounded for
    ``"linspace"`` (Euler and Heun).  ``"open"``: whole times that stop one interval short of the last (DPM-Solver).
    ``"distilled"``: taken from the fifty steps of a distilled model's teacher (LCM).
    """
    n = config.train_steps
    if grid == "distilled":
        teacher = (np.arange(1, LCM_STEPS + 1) * (n // LCM_STEPS) - 1)[::-1]
        return teacher[np.floor(np.linspace(0, LCM_STEPS, steps, endpoint=False)).astype(int)].astype(np.float64)
    if config.spacing == "trailing":
        return np.round(n - np.arange(steps) * (n / steps)) - 1.0
    extra = 1 if grid == "open" else 0
    if config.spacing == "leading":
        leading = np.arange(steps + extra) * (n // (steps + extra)) + config.steps_offset
        return leading[::-1][:steps].astype(np.float64)
    every: Array = np.linspace(0, n - 1, steps + extra)[::-1][:steps] if steps + extra > 1 else np.array([n - 1.0])
    return every.copy() if grid == "continuous" else np.round(every)


def levels(config: ScheduleConfig, steps: int, grid: str = "integer") -> list[Level]:
    """The ``steps`` levels to evaluate the model at, noisiest first, and the level to end on: ``steps + 1`` of them.

    Raises RequestError where the schedule has fewer levels than ``steps``.
    """
    if type(steps) is not int or steps < 1:
        raise RequestError("steps is not a positive integer", "steps", f"it is {steps!r}")
    open_end = grid == "open" and config.spacing != "trailing"
    limit = LCM_STEPS if grid == "distilled" else config.train_steps - open_end
    if steps > limit:
        raise RequestError(f"{steps} steps are too many for this sampler", "steps", f"ask for at most {limit}")
    if config.betas == "flow":
        return _flow_levels(config, steps)
    visited = times(config, steps, grid)
    if visited[0] > config.train_steps - 1:
        raise RequestError(f"{steps} steps with an offset start after the last training step", "steps", "ask for fewer")
    path = [level_at(config, float(t)) for t in visited]
    if config.sigmas != "spaced" and grid != "distilled":
        path = _respaced(config, path, grid)
    return [*path, CLEAN if config.final == "zero" else level_at(config, 0.0)]


def _respaced(config: ScheduleConfig, path: list[Level], grid: str) -> list[Level]:
    """Levels respaced between the ends of ``path``, or, for the open grid, between those of the whole schedule."""
    known = ratios(config)
    first, last = (float(known[-1]), float(known[0])) if grid == "open" else (path[0].ratio, path[-1].ratio)
    if math.isinf(first):
        raise RequestError("a schedule that starts without signal cannot be respaced", "schedule", "use 'spaced'")
    ramp = np.linspace(0, 1, len(path))
    if config.sigmas == "karras":
        spaced = (first ** (1 / RHO) + ramp * (last ** (1 / RHO) - first ** (1 / RHO))) ** RHO
    else:
        spaced = np.exp(math.log(first) + ramp * (math.log(last) - math.log(first)))
    return [_at_ratio(float(ratio), time_of(config, float(ratio))) for ratio in spaced]


def _flow_levels(config: ScheduleConfig, steps: int) -> list[Level]:
    """Flow matching: sigma falls evenly from 1 and is then shifted (Esser et al. 2024).

    ``"trailing"`` ends at 1 / steps, as Flux has it; ``"linspace"`` at the least shifted training level, as SD3 has it.
    """
    if config.sigmas != "spaced":
        raise RequestError(f"{config.sigmas} sigmas are for models trained on betas", "schedule", "use 'spaced'")
    if config.spacing == "leading":
        raise RequestError("flow levels have no leading spacing", "schedule", "use 'trailing' or 'linspace'")

    def shifted(s: Array) -> Array:
        return config.shift * s / (1 + (config.shift - 1) * s)

    least = 1 / steps if config.spacing == "trailing" else float(shifted(np.array(1 / config.train_steps)))
    sigma = shifted(np.linspace(1, least, steps)) if steps > 1 else np.ones(1)
    return [*(Level(float(s) * config.train_steps, 1 - float(s), float(s)) for s in sigma), CLEAN]
