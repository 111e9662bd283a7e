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
    zero, least = {**SD15, **V, "spacing": "trailing", "zero_snr": True}, {**SD15, "final": "sigma_min"}
    one, ends = {"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"}
    clipped, clips = {**COSINE_V, "clip": 0.3}, {"clip_sample": True, "clip_sample_range": 0.3}
    return [
        *out,
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
