"""One sampler step against the samplers' own formulas, written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from compare import assert_close
from peers import diffusers
from torch import Tensor

from fusegen.kernels import sampler_step as op
from fusegen.kernels.noise_normal import normal_numpy
from fusegen.kernels.op import pick

SHAPE = (2, 3, 9, 7)
EXACT = op.OP.tolerance[torch.float32]


def _tensors(twice: bool = False, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=g)
    out = torch.randn((SHAPE[0] * (1 + twice), *SHAPE[1:]), generator=g)
    history = torch.full((2 * op.SLOTS, *SHAPE), math.nan)
    return x, out, history, torch.tensor([11, -12]), torch.tensor([7.5, 3.0])


def _step(x: Tensor, out: Tensor, row: dict[str, float], history: Tensor, seeds: Tensor, guidance: Tensor,
          *options: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.fusegen.sampler_step(
        x, out, torch.tensor(op.make_row(**row)), history, seeds, guidance, *options
    )
    return made


def test_euler_of_an_epsilon_model() -> None:
    """Karras et al. 2022, algorithm 1 without churn: x + (sigma' - sigma) (x - denoised) / sigma."""
    x, eps, *rest = _tensors()
    sigma, following = 3.7, 2.9
    row = {"P_X": 1, "P_OUT": -sigma, "X": following / sigma, "D": 1 - following / sigma}
    row["INPUT"] = 1 / (following**2 + 1) ** 0.5
    got, model_input, denoised = _step(x, eps, row, *rest)
    want_denoised = x.double() - sigma * eps.double()
    want = x.double() + (following - sigma) * (x.double() - want_denoised) / sigma
    assert_close("denoised", denoised, want_denoised, EXACT)
    assert_close("next", got, want, EXACT)
    assert_close("input", model_input, want / (following**2 + 1) ** 0.5, EXACT)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_of_a_velocity_model_with_clipping(eta: float) -> None:
    """Song et al. 2021, equation 12; x0 = alpha x - sigma v (Salimans & Ho 2022), clipped to [-1, 1]."""
    x, v, history, seeds, guidance = _tensors()
    alpha2, beta2 = 0.3, 0.55  # alpha-bar now and after
    noise = eta * ((1 - beta2) / (1 - alpha2)) ** 0.5 * (1 - alpha2 / beta2) ** 0.5
    direction = (1 - beta2 - noise**2) ** 0.5 / (1 - alpha2) ** 0.5
    row = {
        "P_X": alpha2**0.5, "P_OUT": -((1 - alpha2) ** 0.5), "CLIP": 1, "X": direction,
        "D": beta2**0.5 - direction * alpha2**0.5, "NOISE": noise, "STEP": 31,
    }  # fmt: skip
    got, _, denoised = _step(x, v, row, history, seeds, guidance)
    x0 = (alpha2**0.5 * x.double() - (1 - alpha2) ** 0.5 * v.double()).clamp(-1, 1)
    eps = (x.double() - alpha2**0.5 * x0) / (1 - alpha2) ** 0.5
    z = torch.from_numpy(normal_numpy(seeds.numpy(), SHAPE[1:], 31)).double()
    want = beta2**0.5 * x0 + (1 - beta2 - noise**2) ** 0.5 * eps + noise * z
    assert_close("denoised", denoised, x0, EXACT)
    assert_close("next", got, want, EXACT)


def test_heun_over_two_evaluations() -> None:
    """Karras et al. 2022, algorithm 1: the second evaluation goes back to the stored x and slope."""
    x, _, history, seeds, guidance = _tensors()
    s0, s1 = 5.0, 2.0
    first, second = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)) for k in (8, 9))
    row0 = {"P_X": 1, "P_OUT": -s0, "X": s1 / s0, "D": 1 - s1 / s0, "STORE_X": 2, "STORE_D": 1}
    x1, _, d0 = _step(x, first, row0, history, seeds, guidance)
    h = (s1 - s0) / 2
    row1 = {"P_X": 1, "P_OUT": -s1, "X": h / s1, "D": -h / s1, "HX2": 1 + h / s0, "HD1": -h / s0}
    got, _, _ = _step(x1, second, row1, history, seeds, guidance)
    slope0 = first.double()
    euler = x.double() + (s1 - s0) * slope0
    slope1 = second.double()  # (x1 - denoised) / s1 of an epsilon model
    assert_close("euler", x1, euler, EXACT)
    assert_close("heun", got, x.double() + (s1 - s0) * (slope0 + slope1) / 2, EXACT)
    assert torch.equal(history[2], x) and torch.equal(history[op.SLOTS + 1], d0)
    untouched = [i for i in range(2 * op.SLOTS) if i not in (2, op.SLOTS + 1)]
    assert bool(history[untouched].isnan().all())


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guidance_and_its_rescale(rescale: float, dtype: torch.dtype) -> None:
    """Lin et al. 2023, equations 14 to 16, with each sample's own guidance."""
    x, out, history, seeds, guidance = _tensors(twice=True)
    out = out.to(dtype)
    got, model_input, denoised = _step(x, out, {"P_OUT": 1, "D": 1, "INPUT": 0.5}, history, seeds, guidance, rescale)
    uncond, cond = out.double().chunk(2)
    cfg = uncond + guidance.double().view(-1, 1, 1, 1) * (cond - uncond)
    deviation = [t.flatten(1).std(1).view(-1, 1, 1, 1) for t in (cond, cfg)]
    want = rescale * (cfg * deviation[0] / deviation[1]) + (1 - rescale) * cfg
    assert_close("denoised", denoised, want, EXACT)
    assert_close("next", got, want, EXACT)
    assert model_input.dtype == dtype and torch.equal(model_input[:2], model_input[2:])
    assert_close("input", model_input[:2], want / 2, op.OP.tolerance[dtype])


def test_a_prediction_without_deviation_is_not_rescaled() -> None:
    x, out, history, seeds, guidance = _tensors(twice=True)
    _, _, denoised = _step(x, torch.full_like(out, 2.0), {"P_OUT": 1, "D": 1}, history, seeds, guidance, 0.7)
    assert bool((denoised == 2).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_zero_coefficient_reads_nothing(bad: float) -> None:
    x, out, history, seeds, guidance = _tensors()
    spoilt = torch.full_like(x, bad)
    history.fill_(bad)
    got, _, denoised = _step(spoilt, out, {"P_OUT": 1, "D": 1}, history, seeds, guidance)
    assert torch.equal(denoised, out) and torch.equal(got, out)
    got, _, denoised = _step(x, spoilt, {"P_X": 1, "X": 1}, history, seeds, guidance)
    assert torch.equal(denoised, x) and torch.equal(got, x)
    got, _, denoised = _step(x, spoilt, {"P_OUT": 1, "X": 1}, history, seeds, guidance)
    assert torch.equal(got, x) and not bool(denoised.isfinite().any())


@pytest.mark.parametrize(("kind", "slot"), list(itertools.product("XD", range(op.SLOTS))))
def test_each_slot_is_read_before_it_is_written(kind: str, slot: int) -> None:
    x, out, history, seeds, guidance = _tensors()
    at = slot + (op.SLOTS if kind == "D" else 0)
    history[at] = 3.0
    row = {"P_OUT": 1.0, f"H{kind}{slot}": 2.0, f"STORE_{kind}": float(slot)}
    got, _, denoised = _step(x, out, row, history, seeds, guidance)
    assert bool((got == 6).all())
    assert torch.equal(history[at], x if kind == "X" else denoised)


def test_clipping_keeps_nan() -> None:
    x, out, history, seeds, guidance = _tensors()
    out[0, 0, 0, 0] = math.nan
    _, _, denoised = _step(x, out, {"P_OUT": 1, "CLIP": 0.5}, history, seeds, guidance)
    assert bool(denoised[0, 0, 0, 0].isnan()) and denoised.nan_to_num().abs().max() <= 0.5


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("scale", [0.2, 4.0])
def test_dynamic_thresholding_is_diffusers(ratio: float, scale: float) -> None:
    """Saharia et al. 2022, section 2.3; a scale below 1 leaves the sample as it is."""
    x, out, history, seeds, guidance = _tensors()
    scheduler = diffusers().DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=float("inf")
    )
    want = scheduler._threshold_sample(scale * out.double())
    got, _, denoised = _step(x, out, {"P_OUT": scale, "D": 1}, history, seeds, guidance, 0.0, ratio)
    assert_close("denoised", denoised, want, EXACT)
    assert_close("next", got, want, EXACT)


def test_what_is_not_finite_counts_as_the_largest_number() -> None:
    x, out, history, seeds, guidance = _tensors()
    out[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    _, _, denoised = _step(x, 3 * out, {"P_OUT": 1, "D": 1}, history, seeds, guidance, 0.0, 0.5)
    flat = denoised[0].flatten()
    assert bool(flat[0].isnan()) and flat[1:3].tolist() == [1.0, -1.0] and bool(flat[3:].isfinite().all())
    middle = (3 * out[0]).abs().flatten().nan_to_num(nan=torch.inf).sort().values
    k = (len(middle) - 1) / 2
    s = (middle[int(k)] + (k - int(k)) * (middle[int(k) + 1] - middle[int(k)])).clamp(min=1)
    assert (flat[3:] - (3 * out[0].flatten()[3:]).clamp(-s, s) / s).abs().max() < 1e-6


def test_a_known_part_is_noised_to_the_new_level_and_kept() -> None:
    """Lugmayr et al. 2022, equation 8, with the noise of the loop's first state."""
    x, out, history, seeds, guidance = _tensors()
    g = torch.Generator().manual_seed(4)
    known, mask = torch.randn(SHAPE, generator=g), torch.rand(SHAPE, generator=g).round()
    mask[0, 0, 0, 0] = 0.25
    row = {"P_OUT": 1.0, "X": 0.5, "D": 0.3, "KNOWN": 0.8, "KNOWN_NOISE": 0.6, "KNOWN_STEP": 5, "INPUT": 2}
    got, model_input, denoised = _step(x, out, row, history, seeds, guidance, 0.0, 0.0, mask, known)
    z = torch.from_numpy(normal_numpy(seeds.numpy(), SHAPE[1:], 5)).double()
    free = 0.5 * x.double() + 0.3 * out.double()
    want = mask * free + (1 - mask) * (0.8 * known.double() + 0.6 * z)
    assert_close("next", got, want, EXACT)
    assert_close("input", model_input, 2 * want, EXACT)
    assert torch.equal(denoised, out)


def test_rows_are_made_by_name() -> None:
    assert op.make_row(HD3=2.0)[op.HD3] == 2.0 and len(op.make_row()) == op.ROW == len(op.NAMES)
    assert op.make_row()[op.CLIP] == math.inf and op.make_row()[op.STORE_X] == -1
    with pytest.raises(KeyError, match="HX9"):
        op.make_row(HX9=1.0)


def test_what_does_not_fit_is_refused_or_declined_by_name() -> None:
    x, out, history, seeds, guidance = _tensors()
    row = torch.tensor(op.make_row())
    for name, changed in {"out": out[:1], "row": row[:5], "history": history[1:], "seeds": seeds.int()}.items():
        args = {"x": x, "out": out, "row": row, "history": history, "seeds": seeds, "guidance": guidance}
        with pytest.raises(ValueError, match=f"sampler_step: {name}"):
            torch.ops.fusegen.sampler_step(*{**args, name: changed}.values())
    with pytest.raises(ValueError, match="sampler_step: known"):
        torch.ops.fusegen.sampler_step(x, out, row, history, seeds, guidance, 0.0, 0.0, x, x[:1])
    with pytest.raises(ValueError, match="mask and known go together"):
        torch.ops.fusegen.sampler_step(x, out, row, history, seeds, guidance, 0.0, 0.0, x)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        torch.ops.fusegen.sampler_step(x, out, row, history, seeds, guidance, 0.0, 1.5)
    rest = (out, row, history, seeds, guidance, 0.0, 0.0, None, None)
    reasons = pick(op.OP, "cpu", (x.double(), *rest)).declined
    assert all("x is torch.float64" in d.reason for d in reasons)
