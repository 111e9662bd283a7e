"""Schedules and grids against diffusers, and their refusals."""

from __future__ import annotations

import math
from typing import Any

import diffusers.schedulers as schedulers
import numpy as np
import pytest

from fusegen.models.zoo.emoji.train import alphas_cumprod as emoji_alphas
from fusegen.runtime.errors import RequestError
from fusegen.runtime.schedule import CLEAN, ScheduleConfig, alphas_cumprod, level_at, levels, ratios, time_of, times

THEIRS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("betas", THEIRS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_equal_diffusers(betas: str, zero_snr: bool) -> None:
    ours = alphas_cumprod(ScheduleConfig(betas=betas, beta_start=0.00085, beta_end=0.012, zero_snr=zero_snr))
    theirs = schedulers.DDIMScheduler(
        beta_schedule=THEIRS[betas], beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr
    ).alphas_cumprod.numpy()
    # theirs is a product of a thousand float32 factors, the cosine's last ones within 6e-5 of exact
    assert np.abs(ours - theirs).max() < 2e-6 and np.all(np.diff(ours) < 0)
    assert not zero_snr or ours[-1] == 0


def test_the_emoji_models_schedule_is_the_cosine_one() -> None:
    assert np.abs(alphas_cumprod(ScheduleConfig(betas="cosine")) - emoji_alphas().numpy()).max() < 1e-15


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 50, 333, 999, 1000])
def test_times_equal_diffusers(spacing: str, steps: int) -> None:
    config = ScheduleConfig(spacing=spacing)
    grids = {"integer": "DDPMScheduler", "continuous": "EulerDiscreteScheduler", "open": "DPMSolverMultistepScheduler"}
    for grid, name in grids.items():
        if spacing == "linspace" and steps == 1 and grid != "open":
            assert times(config, 1, grid) == [999]  # diffusers begins, and ends, at time 0
        elif not (grid == "open" and steps == 1000 and spacing != "trailing"):
            theirs = getattr(schedulers, name)(timestep_spacing=spacing)
            theirs.set_timesteps(steps)
            assert np.allclose(times(config, steps, grid), theirs.timesteps.numpy(), atol=1e-4), grid


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_lcm_times_equal_diffusers(steps: int) -> None:
    theirs = schedulers.LCMScheduler()
    theirs.set_timesteps(steps)
    assert np.array_equal(times(ScheduleConfig(), steps, "distilled"), theirs.timesteps.numpy())


@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
@pytest.mark.parametrize("betas", ["scaled_linear", "cosine"])
def test_respaced_sigmas_equal_diffusers(sigmas: str, betas: str) -> None:
    config, flag = ScheduleConfig(betas=betas, spacing="linspace", sigmas=sigmas), {f"use_{sigmas}_sigmas": True}
    for grid, name in {"continuous": "EulerDiscreteScheduler", "open": "DPMSolverMultistepScheduler"}.items():
        theirs = getattr(schedulers, name)(beta_schedule=THEIRS[betas], timestep_spacing="linspace", **flag)
        theirs.set_timesteps(15)
        ours = levels(config, 15, grid)
        assert np.allclose([p.ratio for p in ours], theirs.sigmas.numpy(), rtol=4e-4)
        # theirs, from float32 alphas, are this far off exact ones at the ends; DPM-Solver there rounds its times
        assert np.allclose([p.t for p in ours[:-1]], theirs.timesteps.numpy(), atol=1.01 if grid == "open" else 0.06)


def test_levels_fall_and_end_clean() -> None:
    for grid in ("integer", "continuous", "open", "distilled"):
        path = levels(ScheduleConfig(betas="cosine", spacing="trailing"), 20, grid)
        found = [p.ratio for p in path]
        assert len(path) == 21 and path[-1] == CLEAN and found == sorted(set(found), reverse=True)
        assert all(abs(p.alpha**2 + p.sigma**2 - 1) < 1e-12 for p in path)
    assert levels(ScheduleConfig(final="sigma_min"), 20)[-1].t == 0.0


@pytest.mark.parametrize("t", [0.0, 1.0, 17.0, 511.5, 998.99, 999.0])
def test_a_ratio_knows_its_time(t: float) -> None:
    config = ScheduleConfig(betas="scaled_linear")
    assert time_of(config, level_at(config, t).ratio) == pytest.approx(t, abs=0.02)


def test_times_of_ratios_out_of_range_are_held() -> None:
    known = ratios(ScheduleConfig())
    assert time_of(ScheduleConfig(), known[-1] * 2) == 999 and time_of(ScheduleConfig(), known[0] / 2) == 0


@pytest.mark.parametrize(
    "values",
    [
        {"beta": 1},
        {"betas": "sigmoid"},
        {"betas": []},
        {"prediction": "eps"},
        {"spacing": "middle"},
        {"sigmas": "beta"},
        {"final": "one"},
        {"betas": "flow"},
        {"prediction": "flow"},
        {"train_steps": 0},
        {"train_steps": 10**9},
        {"train_steps": 10.5},
        {"steps_offset": -1},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"beta_end": "x"},
        {"shift": 0},
        {"shift": math.nan},
        {"clip": -1},
        {"clip": math.inf},
    ],
)
def test_wrong_values_are_refused_in_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        ScheduleConfig.of(values)
    assert "\n" not in str(error.value)


def test_unknown_keys_are_refused_with_the_known() -> None:
    with pytest.raises(RequestError, match="betas, beta_start"):
        ScheduleConfig.of({"beta_schedule": "linear"})


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9, 2**63, 2.0, "4", None, True])
def test_steps_out_of_range_are_refused(steps: Any) -> None:
    for grid in ("integer", "continuous", "open", "distilled"):
        with pytest.raises(RequestError):
            levels(ScheduleConfig(spacing="trailing"), steps, grid)


def test_an_offset_past_the_end_is_refused() -> None:
    with pytest.raises(RequestError, match="offset"):
        levels(ScheduleConfig(steps_offset=1), 1000)
