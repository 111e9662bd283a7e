"""Samplers against diffusers' schedulers run in float64, step by step, and against the papers' equations."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers.schedulers as schedulers
import numpy as np
import pytest
import torch
from torch import Tensor

from fusegen.kernels import sampler_step
from fusegen.kernels.noise_normal import normal_numpy
from fusegen.runtime.errors import RequestError
from fusegen.runtime.loop.denoise import denoise
from fusegen.runtime.sampler import ALIASES, SAMPLERS, Coefficients, coefficients, find
from fusegen.runtime.schedule import ScheduleConfig, levels

SEEDS, SHAPE = (3, 2**63 + 5), (3, 6, 5)
RANDOM = {"ddpm", "euler_a", "dpmpp_2m_sde", "lcm"}


class Double:
    """A module in which float32 means float64: diffusers' schedulers, given it, compute in float64 throughout."""

    def __init__(self, module: Any):
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class Pair:
    """One of ours and the scheduler it must equal; ``ours`` and ``theirs`` are what only one of them is told."""

    sampler: str
    scheduler: str
    schedule: dict[str, Any] = field(default_factory=dict)
    steps: int = 10
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        said = {**self.schedule, **self.ours, **self.theirs, **self.step}
        return "-".join([self.sampler, str(self.steps), *(f"{k}={v}" for k, v in said.items())])


KARRAS = ({"sigmas": "karras"}, {"use_karras_sigmas": True})
EXPONENTIAL = ({"sigmas": "exponential"}, {"use_exponential_sigmas": True})
COSINE_V = {"betas": "cosine", "prediction": "v_prediction"}
SD15 = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def pairs() -> list[Pair]:
    ddpm, ddim, euler = "DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"
    ancestral, heun, dpm, lcm = "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"
    out = []
    for sampler, scheduler, more in [
        ("ddpm", ddpm, {}),
        ("ddim", ddim, {}),
        ("euler", euler, {}),
        ("euler_a", ancestral, {}),
        ("heun", heun, {}),
        ("dpmpp_2m", dpm, {}),
        ("dpmpp_2m_sde", dpm, {"algorithm_type": "sde-dpmsolver++"}),
        ("lcm", lcm, {"original_inference_steps": 50}),
    ]:
        for schedule in (
            SD15,
            {**SD15, "prediction": "v_prediction", "spacing": "trailing"},
            {"betas": "linear", "prediction": "sample", "spacing": "trailing"},
            {**COSINE_V, "spacing": "leading"},
        ):
            if not (sampler == "euler_a" and schedule.get("prediction") == "sample"):
                for steps in (4, 20):
                    out.append(Pair(sampler, scheduler, schedule, steps, theirs=more))
        if sampler in ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde"):
            for (ours, theirs), schedule in ((KARRAS, SD15), (KARRAS, COSINE_V), (EXPONENTIAL, SD15)):
                schedule = {**schedule, "spacing": "linspace"}
                out.append(Pair(sampler, scheduler, schedule, 12, ours=ours, theirs={**more, **theirs}))
        if sampler in ("euler", "euler_a", "heun", "dpmpp_2m", "ddpm"):
            out.append(Pair(sampler, scheduler, {**SD15, "spacing": "linspace"}, 7, theirs=more))
    out.append(Pair("ddim", ddim, SD15, 10, ours={"eta": 0.6}, step={"eta": 0.6}))
    out.append(Pair("ddim", ddim, {**SD15, "steps_offset": 1, "final": "sigma_min"}, 30, theirs={"set_alpha_to_one": False}))
    out.append(Pair("ddim", ddim, {**SD15, "prediction": "v_prediction", "spacing": "trailing", "zero_snr": True}, 10))
    out.append(Pair("ddpm", ddpm, SD15, 25, ours={"variance": "fixed_large"}, theirs={"variance_type": "fixed_large"}))
    out.append(Pair("dpmpp_2m", dpm, {**SD15, "final": "sigma_min"}, 9, theirs={"final_sigmas_type": "sigma_min"}))
    out.append(Pair("dpmpp_2m", dpm, {**SD15, "final": "sigma_min"}, 20, theirs={"final_sigmas_type": "sigma_min"}))
    out.append(Pair("heun", heun, {**COSINE_V, "clip": 0.3}, 9, theirs={"clip_sample": True, "clip_sample_range": 0.3}))
    out.append(Pair("ddpm", ddpm, {**COSINE_V, "clip": 0.3}, 9, theirs={"clip_sample": True, "clip_sample_range": 0.3}))
    out.append(Pair("ddim", ddim, {**COSINE_V, "clip": 0.3}, 9,
                    theirs={"clip_sample": True, "clip_sample_range": 0.3}, step={"use_clipped_model_output": True}))  # fmt: skip
    return out


def scheduler(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The diffusers scheduler of ``pair``, in float64, its noise ours."""
    cls = getattr(schedulers, pair.scheduler)
    module = __import__(cls.__module__, fromlist=["x"])
    monkeypatch.setattr(module, "torch", Double(torch))
    monkeypatch.setattr(module, "np", Double(np))
    config = asdict(ScheduleConfig.of(pair.schedule))
    names = {"cosine": "squaredcos_cap_v2"}
    theirs = {
        "num_train_timesteps": config["train_steps"],
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        "beta_schedule": names.get(config["betas"], config["betas"]),
        "prediction_type": config["prediction"],
        "timestep_spacing": config["spacing"],
        "steps_offset": config["steps_offset"],
        **({"rescale_betas_zero_snr": True} if config["zero_snr"] else {}),
        **({"clip_sample": False} if "clip_sample" in inspect.signature(cls).parameters else {}),
        **pair.theirs,
    }
    return cls(**theirs)


def toy(x: Tensor, t: float) -> Tensor:
    """A nonlinear model of x and the time."""
    return torch.tanh(1.3 * x + 0.4 * torch.sin(3 * x) - 0.1) * (0.7 + 0.0003 * t) + 0.2 * x


def their_states(pair: Pair, plan: Coefficients, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The model's inputs and the result, at the model's scale (Karras-form schedulers keep x / alpha)."""
    sched = scheduler(pair, monkeypatch)
    sched.set_timesteps(pair.steps)
    if hasattr(sched, "set_begin_index"):
        sched.set_begin_index(0)
    drawn = {"step": 0}
    module = __import__(type(sched).__module__, fromlist=["x"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise(drawn["step"]))
    exploding = pair.sampler in ("euler", "euler_a", "heun")
    x = noise(0) * sched.init_noise_sigma
    states = []
    for i, t in enumerate(sched.timesteps):
        drawn["step"] = i + 1
        given = sched.scale_model_input(x, t)
        states.append(given)
        now = int(t) if pair.sampler == "lcm" else t  # a tensor would send its scalings through float32
        x = sched.step(toy(given, plan.times[i]), now, x, return_dict=False, **pair.step)[0]
    return [*states, x / math.sqrt(1 + float(sched.sigmas[-1]) ** 2) if exploding else x]


def noise(step: int) -> Tensor:
    keys = np.array([s - 2**64 if s >= 2**63 else s for s in SEEDS], np.int64)
    return torch.from_numpy(normal_numpy(keys, SHAPE, step)).double()


def our_states(plan: Coefficients) -> list[Tensor]:
    """The rows run by the kernel's reference in float64."""
    keys = torch.tensor([s - 2**64 if s >= 2**63 else s for s in SEEDS])
    x = noise(0) * plan.initial
    given, states = x * plan.first_input, []
    history = torch.full((2 * sampler_step.SLOTS, *x.shape), math.nan, dtype=torch.float64)
    for i, row in enumerate(plan.rows):
        states.append(given)
        x, given, _ = sampler_step.reference(
            x, toy(given, plan.times[i]), torch.from_numpy(row), history, keys, torch.ones(2, dtype=torch.float64)
        )
    return [*states, x]


def plan_of(pair: Pair) -> Coefficients:
    inside = {k: v for k, v in pair.ours.items() if k == "sigmas"}
    options = {k: v for k, v in pair.ours.items() if k != "sigmas"}
    return coefficients(pair.sampler, ScheduleConfig.of({**pair.schedule, **inside}), pair.steps, **options)


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest error of any state over that state's largest magnitude."""
    assert len(ours) == len(theirs)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs))


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
