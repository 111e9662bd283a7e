"""diffusers' schedulers in float64 with our noise, and our rows run by the kernel's reference in float64."""

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
from fusegen.runtime.sampler import Coefficients, coefficients
from fusegen.runtime.schedule import ScheduleConfig

SEEDS, SHAPE = (3, 2**63 + 5), (3, 6, 5)


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
V = {"prediction": "v_prediction"}
COSINE_V = {"betas": "cosine", **V}
SD15 = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def pairs() -> list[Pair]:
    ddpm, ddim, heun, lcm = "DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "LCMScheduler"
    euler, ancestral = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
    dpm = "DPMSolverMultistepScheduler"
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
                if sampler == "heun" and schedule is COSINE_V:  # starts above NO_SIGNAL, where ours is of first order
                    schedule = {"betas": "linear", "prediction": "v_prediction"}
                schedule = {**schedule, "spacing": "linspace"}
                out.append(Pair(sampler, scheduler, schedule, 12, ours=ours, theirs={**more, **theirs}))
        if sampler in ("euler", "euler_a", "heun", "dpmpp_2m", "ddpm"):
            out.append(Pair(sampler, scheduler, {**SD15, "spacing": "linspace"}, 7, theirs=more))
    return out + special_pairs()


def special_pairs() -> list[Pair]:
    """Noise scales, ends and clips other than the usual."""
    ddpm, ddim, heun, dpm = "DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"
    zero, least = {**SD15, **V, "spacing": "trailing", "zero_snr": True}, {**SD15, "final": "sigma_min"}
    one, ends = {"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"}
    clipped, clips = {**COSINE_V, "clip": 0.3}, {"clip_sample": True, "clip_sample_range": 0.3}
    return [
        Pair("ddim", ddim, SD15, 10, ours={"eta": 0.6}, step={"eta": 0.6}),
        Pair("ddim", ddim, {**least, "steps_offset": 1}, 30, theirs=one),
        Pair("ddim", ddim, zero, 10),
        Pair("ddpm", ddpm, SD15, 25, ours={"variance": "fixed_large"}, theirs={"variance_type": "fixed_large"}),
        Pair("dpmpp_2m", dpm, least, 9, theirs=ends),
        Pair("dpmpp_2m", dpm, least, 20, theirs=ends),
        Pair("heun", heun, clipped, 9, theirs=clips),
        Pair("ddpm", ddpm, clipped, 9, theirs=clips),
        Pair("ddim", ddim, clipped, 9, theirs=clips, step={"use_clipped_model_output": True}),
    ]


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
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
