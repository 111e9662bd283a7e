"""What several evaluations make, with random weights: Stable Diffusion 1.5's picture from noise to pixels, 20 steps of
DPM++ 2M with guidance and the decoder; a picture of 1024 pixels decoded in four tiles.

Every peer runs the networks its own way; the steps between are ours as eager PyTorch for all but fusegen, which takes
out of the loop what does not change in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fusegen.bench.pipelines import combine
from fusegen.bench.published import files, networks
from fusegen.bench.published.peers import PEERS
from fusegen.bench.published.peers import opened as session_of
from fusegen.kernels import sampler_step as row
from fusegen.runtime import noise
from fusegen.runtime.loop.denoise import denoise
from fusegen.runtime.loop.tiles import tiled
from fusegen.runtime.sampler import Coefficients, coefficients
from fusegen.runtime.schedule import ScheduleConfig

PICTURE, UNET, DECODER = "sd15-picture", "sd15-unet", "sd-vae-512"
STEPS, GUIDANCE, SEED, SCALE = 20, 7.5, 0, 0.18215
SHAPE = (4, 64, 64)
TILED, LARGE, TILE, COMMON = "sd-vae-1024-tiled", "sd-vae-1024", "sd-vae-576", 16
# What is made -> how often each network is evaluated for it.
EVALUATIONS = {PICTURE: {UNET: STEPS, DECODER: 1}, TILED: {TILE: 4}}


def plan() -> Coefficients:
    """Stable Diffusion's schedule, sampled."""
    return coefficients("dpmpp_2m", ScheduleConfig("scaled_linear", beta_start=0.00085, beta_end=0.012), STEPS)


def opened(name: str, what: str, folder: Path, dtype: str) -> Callable[[], Tensor]:
    """What a contender is timed on: one evaluation of a network on its example inputs, or a picture."""
    if what == TILED:
        (part,), (latents,) = networks.example(TILE), networks.example(LARGE)
        forward = PEERS[name].load(TILE, folder.parent / TILE, dtype, [part])
        return lambda: tiled(lambda x: forward([x]), latents, (part.shape[2], part.shape[3]), COMMON)
    if what != PICTURE:
        inputs, _, _ = files.expected(folder)
        forward = PEERS[name].load(what, folder, dtype, inputs)
        return lambda: forward(inputs)
    context, sampled = networks.example(UNET)[2], plan()
    decode = PEERS[name].load(DECODER, folder.parent / DECODER, dtype, networks.example(DECODER))
    if name == "fusegen":
        session, times = session_of(folder.parent / UNET, dtype), torch.tensor(sampled.times, dtype=torch.float32)
        _, t, c = session.program.inputs

        def run() -> Tensor:
            loop = session.trajectory({c: context}, {t: times})
            return decode([denoise(loop, sampled, [SEED], SHAPE, GUIDANCE) / SCALE])

        return run
    unet = PEERS[name].load(UNET, folder.parent / UNET, dtype, networks.example(UNET))
    return lambda: decode([_sampled(unet, sampled, context) / SCALE])


def _sampled(unet: Callable[[list[Tensor]], Tensor], sampled: Coefficients, context: Tensor) -> Tensor:
    x = noise.initial(noise.seed_tensor([SEED], "cpu"), SHAPE) * sampled.initial
    scale, history = sampled.first_input, [None] * (2 * row.SLOTS)
    for r, t in zip(sampled.rows.tolist(), sampled.times.tolist(), strict=True):
        given = x * scale
        out = unet([torch.cat([given, given]), torch.full((2,), t), context])
        x, _ = combine(x, out, r, history, GUIDANCE)
        scale = r[row.INPUT]
    return x
