"""The denoising loop: guidance, batches, progress, cancelling, seeds."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from fusegen.kernels import sampler_step as kernel
from fusegen.runtime import noise
from fusegen.runtime.errors import Cancelled, RequestError
from fusegen.runtime.loop.denoise import Inpaint, Watch, denoise
from fusegen.runtime.sampler import SAMPLERS, coefficients
from fusegen.runtime.schedule import ScheduleConfig

CONFIG = ScheduleConfig(betas="cosine", prediction="v_prediction", spacing="trailing", clip=1.0)
SHAPE = (3, 7, 5)


def toy(i: int, x: Tensor) -> Tensor:
    """Element by element, so that a sample cannot see its batch."""
    return torch.sin(2 * x + 0.1 * i) * 0.8


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_seed_gives_the_same_bits_in_any_batch_and_slot(sampler: str) -> None:
    plan = coefficients(sampler, CONFIG, 6)
    together = denoise(toy, plan, [11, 5, 7, 5], SHAPE, guidance=None)
    alone = denoise(toy, plan, [7], SHAPE)
    assert torch.equal(together[2], alone[0]) and torch.equal(together[1], together[3])
    assert not torch.equal(together[0], together[1])
    guided = denoise(toy, plan, [9, 7, 1], SHAPE, guidance=3.0)
    assert torch.equal(guided[1], denoise(toy, plan, [7], SHAPE, guidance=3.0)[0])


def test_guidance_takes_the_unconditional_half_first() -> None:
    plan = coefficients("euler", CONFIG, 5)

    def halves(i: int, x: Tensor) -> Tensor:
        assert x.shape == (4, *SHAPE) and torch.equal(x[:2], x[2:])
        return torch.cat([toy(i, x[:2]), toy(i, x[2:]) + 0.3])

    by_hand = denoise(lambda i, x: toy(i, x) + 4.0 * 0.3, plan, [1, 2], SHAPE)
    assert (denoise(halves, plan, [1, 2], SHAPE, guidance=4.0) - by_hand).abs().max() < 1e-5


def test_guidance_may_differ_from_sample_to_sample() -> None:
    plan = coefficients("dpmpp_2m", CONFIG, 5)

    def halves(i: int, x: Tensor) -> Tensor:
        u, c = x.chunk(2)
        return torch.cat([toy(i, u), toy(i + 1, c)])

    both = denoise(halves, plan, [1, 2], SHAPE, guidance=[2.0, 5.0])
    assert torch.equal(both[1], denoise(halves, plan, [2], SHAPE, guidance=5.0)[0])
    with pytest.raises(RequestError, match="2 guidance values for 3 seeds"):
        denoise(halves, plan, [1, 2, 3], SHAPE, guidance=[1.0, 2.0])


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_inpainting_keeps_the_known_part_at_every_level(sampler: str) -> None:
    """Every state holds alpha known + sigma noise where the mask is 0; the sample ends on what is known."""
    plan = coefficients(sampler, CONFIG, 6)
    mask = torch.zeros(1, 1, *SHAPE[1:])
    mask[..., :3] = 1.0
    known = torch.linspace(-1, 1, 2 * 3 * 7 * 5).reshape(2, *SHAPE)
    states: list[Tensor] = []
    out = denoise(lambda i, x: states.append(x.clone()) or toy(i, x), plan, [8, 9], SHAPE, inpaint=Inpaint(known, mask))  # type: ignore[func-returns-value]
    drawn = noise.initial(noise.seed_tensor([8, 9]), SHAPE)
    assert torch.equal(out[..., 3:], known[..., 3:]) and not torch.equal(out[..., :3], known[..., :3])
    levels = plan.rows[:, [kernel.KNOWN, kernel.KNOWN_NOISE]].tolist()
    assert levels[-1] == [1.0, 0.0] and all(a[1] > b[1] for a, b in itertools.pairwise(levels) if sampler != "heun")
    for (alpha, sigma), x in zip(levels, states[1:], strict=False):
        assert (x - alpha * known - sigma * drawn)[..., 3:].abs().max() < 1e-5
    alone = denoise(toy, plan, [9], SHAPE, inpaint=Inpaint(known[1:], mask))
    assert torch.equal(alone[0], out[1])


def test_inpainting_that_does_not_fit_is_refused() -> None:
    plan = coefficients("euler", CONFIG, 2)
    with pytest.raises(RequestError, match="inpainting mask does not fit"):
        denoise(toy, plan, [1], SHAPE, inpaint=Inpaint(torch.zeros(SHAPE), torch.ones(4, 4)))


def test_a_threshold_bounds_what_is_denoised() -> None:
    config = ScheduleConfig(betas="cosine", prediction="v_prediction", spacing="trailing")
    seen: list[Tensor] = []
    plan, watch = coefficients("ddim", config, 4), Watch(preview=lambda n, x: seen.append(x))
    denoise(lambda i, x: 9 * toy(i, x), plan, [1, 2], SHAPE, watch=watch, threshold=0.9)
    assert all(x.abs().max() <= 1 for x in seen)
    assert all(0.05 < (x.abs() == 1).double().mean() < 0.2 for x in seen)  # a tenth lies past its quantile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_sees_its_own_dtype_and_the_state_stays_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def model(i: int, x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return toy(i, x)

    out = denoise(model, coefficients("euler", CONFIG, 3), [1], SHAPE, dtype=dtype)
    assert seen == [dtype] * 3 and out.dtype == torch.float32


def test_progress_and_preview_follow_every_evaluation() -> None:
    plan = coefficients("heun", CONFIG, 4)
    told: list[tuple[int, int]] = []
    seen: list[tuple[int, Tensor]] = []
    watch = Watch(progress=lambda *a: told.append(a), preview=lambda n, x: seen.append((n, x)))
    out = denoise(toy, plan, [1, 2], SHAPE, watch=watch)
    assert told == [(n, len(plan)) for n in range(1, len(plan) + 1)]
    assert [n for n, _ in seen] == [n for n, _ in told] and all(x.abs().max() <= 1 for _, x in seen)
    assert torch.equal(seen[-1][1], out)  # the last step ends on its denoised prediction


@pytest.mark.parametrize("kind", ["event", "function"])
def test_cancelling_stops_before_the_next_evaluation(kind: str) -> None:
    event, evaluated = threading.Event(), []

    def model(i: int, x: Tensor) -> Tensor:
        evaluated.append(i)
        if i == 2:
            event.set()
        return toy(i, x)

    watch = Watch(cancel=event if kind == "event" else event.is_set)
    with pytest.raises(Cancelled, match="after 3 of 9"):
        denoise(model, coefficients("euler", CONFIG, 9), [1], SHAPE, watch=watch)
    assert evaluated == [0, 1, 2]


def test_the_first_state_is_step_0_and_evaluations_draw_from_1_on() -> None:
    plan = coefficients("ddpm", CONFIG, 3)
    x = torch.ops.fusegen.noise_normal(noise.seed_tensor([4]), list(SHAPE), 0)
    given: list[Tensor] = []
    denoise(lambda i, v: given.append(v.clone()) or torch.zeros_like(v), plan, [4], SHAPE)  # type: ignore[func-returns-value]
    assert torch.equal(given[0], x)
    for n in (1, 2):
        row = torch.from_numpy(plan.rows[n - 1]).float()
        p_x, _, clip, f_x, f_d, f_n = row[:6]
        mean = f_x * given[n - 1] + f_d * (p_x * given[n - 1]).clamp(-clip, clip)
        drawn = torch.ops.fusegen.noise_normal(noise.seed_tensor([4]), list(SHAPE), n)
        assert (given[n] - mean - f_n * drawn).abs().max() < 1e-5


@pytest.mark.parametrize("seeds", ["12", b"1", 7, None, [1.0], ["1"], [-1], [2**64], [True], [None], [float("nan")]])
def test_seeds_that_are_none_are_refused(seeds: Any) -> None:
    with pytest.raises(RequestError, match="seed"):
        noise.check_seeds(seeds)


def test_all_64_bits_of_a_seed_count() -> None:
    assert noise.seed_tensor([0, 2**63 - 1, 2**63, 2**64 - 1]).tolist() == [0, 2**63 - 1, -(2**63), -1]
    drawn = noise.initial(noise.seed_tensor([1, 1 + 2**32, 1 + 2**63]), (40,))
    assert len({tuple(row.tolist()) for row in drawn}) == 3


def test_no_seeds_give_no_samples() -> None:
    assert denoise(toy, coefficients("euler", CONFIG, 2), [], SHAPE).shape == (0, *SHAPE)
