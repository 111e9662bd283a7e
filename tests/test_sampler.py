"""Samplers against diffusers' schedulers run in float64, step by step, and against the papers' equations."""

from __future__ import annotations

import math

import diffusers.schedulers as schedulers
import numpy as np
import pytest
import torch
from sampler_oracle import SEEDS, SHAPE, Double, Pair, noise, our_states, pairs, plan_of, their_states, toy, worst
from torch import Tensor

from fusegen.kernels import sampler_step
from fusegen.runtime.errors import RequestError
from fusegen.runtime.loop.denoise import denoise
from fusegen.runtime.sampler import ALIASES, SAMPLERS, coefficients, find
from fusegen.runtime.schedule import ScheduleConfig, levels


@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_every_step_equals_diffusers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(pair)
    theirs = their_states(pair, plan, monkeypatch)
    assert worst(our_states(plan), theirs) < 1e-8
    states: list[Tensor] = []

    def model(i: int, x: Tensor) -> Tensor:
        states.append(x.clone())
        return toy(x.double(), plan.times[i]).float()

    states.append(denoise(model, plan, SEEDS, SHAPE))
    assert worst(states, theirs) < 1e-5


FLOW = {"betas": "flow", "prediction": "flow"}


@pytest.mark.parametrize(
    ("sampler", "spacing"),  # diffusers' flow Heun has one spacing
    [("euler", "trailing"), ("euler", "linspace"), ("heun", "linspace"), ("dpmpp_2m", "trailing")],
)
@pytest.mark.parametrize(("steps", "shift"), [(4, 1.0), (11, 3.0)])
def test_flow_matching_equals_diffusers(
    sampler: str, spacing: str, steps: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
    plan = coefficients(sampler, ScheduleConfig.of({**FLOW, "spacing": spacing, "shift": shift}), steps)
    name = kinds.get(sampler, "DPMSolverMultistepScheduler")
    module = __import__(getattr(schedulers, name).__module__, fromlist=["x"])
    monkeypatch.setattr(module, "torch", Double(torch))
    monkeypatch.setattr(module, "np", Double(np))
    if sampler == "dpmpp_2m":
        theirs = schedulers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        theirs.set_timesteps(steps)
        theirs.sigmas = torch.tensor([*plan.times / 1000, 0], dtype=torch.float64)  # its own begin at 0.999
        theirs.set_begin_index(0)
    else:
        theirs = getattr(schedulers, name)(shift=shift)
        given = (
            {"sigmas": np.linspace(1, 1 / steps, steps)} if spacing == "trailing" else {"num_inference_steps": steps}
        )
        theirs.set_timesteps(**given)
        assert np.allclose(theirs.timesteps.numpy(), plan.times, rtol=1e-9)
    x, states = noise(0), []
    for i, t in enumerate(theirs.timesteps):
        states.append(x)
        x = theirs.step(toy(x, plan.times[i]), t, x, return_dict=False)[0]
    assert worst(our_states(plan), [*states, x]) < 1e-8


def test_ddim_is_the_papers_equation_12() -> None:
    """Song et al. 2021, equations 12 and 16, with eta 0.5, written out on a noise-predicting model."""
    config = ScheduleConfig(prediction="epsilon")
    bar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
    plan = coefficients("ddim", config, 8, eta=0.5)
    x = noise(0)
    states = [x]
    for i in range(8):
        now, before = bar[875 - 125 * i], bar[750 - 125 * i] if i < 7 else 1.0
        eps = toy(x, plan.times[i])
        sigma = 0.5 * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps + sigma * noise(i + 1)
        states.append(x)
    assert worst(our_states(plan), states) < 1e-9


def test_dpmpp_2m_is_the_papers_algorithm_2() -> None:
    """Lu et al. 2022b, algorithm 2, written out on a velocity-predicting model; the last step is of first order."""
    config, steps = ScheduleConfig(betas="cosine", prediction="v_prediction", spacing="trailing"), 6
    plan, path = coefficients("dpmpp_2m", config, steps), levels(config, steps, "open")
    alpha, sigma = np.array([p.alpha for p in path]), np.array([p.sigma for p in path])
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    x = noise(0)
    states, last = [x], x
    for i in range(1, steps + 1):
        x0 = alpha[i - 1] * x - sigma[i - 1] * toy(x, plan.times[i - 1])
        h = lam[i] - lam[i - 1]
        d = x0
        if 1 < i < steps:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * d
        states, last = [*states, x], x0
    assert worst(our_states(plan), states) < 1e-9


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("betas", ["cosine", "scaled_linear"])
def test_a_perfect_model_is_recovered(name: str, betas: str) -> None:
    """With a model that always predicts the same clean sample, every sampler ends on that sample."""
    config = ScheduleConfig(betas=betas, prediction="v_prediction", spacing="trailing")
    target = torch.linspace(-1, 1, 90).reshape(SHAPE).double()
    plan = coefficients(name, config, 12)

    def velocity(x: Tensor, i: int) -> Tensor:
        row = plan.rows[i]
        return (target - row[sampler_step.P_X] * x) / row[sampler_step.P_OUT]

    found = denoise(lambda i, x: velocity(x.double(), i).float(), plan, SEEDS, SHAPE)
    assert (found - target).abs().max() < 2e-5


def test_heun_leaves_pure_noise_by_a_first_order_step() -> None:
    config = ScheduleConfig(betas="cosine", prediction="v_prediction", spacing="trailing")
    assert len(coefficients("heun", config, 10)) == 18
    assert len(coefficients("heun", ScheduleConfig(), 10)) == 19


def test_names_and_options_are_checked() -> None:
    config = ScheduleConfig()
    assert all(find(alias) in SAMPLERS for alias in ALIASES)
    assert coefficients("dpm++2m", config, 5).sampler == "dpmpp_2m"
    for wrong, say in (("eulr", "ddim, euler"), (3, "ddpm"), ([], "ddpm")):
        with pytest.raises(RequestError, match=say):
            coefficients(wrong, config, 5)  # type: ignore[arg-type]
    for options in ({"eta": 2}, {"eta": "x"}, {"eta": math.nan}, {"s_churn": 1.0}):
        with pytest.raises(RequestError):
            coefficients("ddim", config, 5, **options)
    with pytest.raises(RequestError, match="fixed_large"):
        coefficients("ddpm", config, 5, variance="learned")
    with pytest.raises(RequestError, match="betas"):
        coefficients("lcm", ScheduleConfig(**FLOW), 4)
