"""The eager peers of whole models: the reference architectures with the bundle's weights, in plain PyTorch.

The eager pipeline is given the strongest form we know of it: inference mode, channels-last, the sampler as a handful of
tensor operations with its coefficients ready, the text encoded once, and conditional and unconditional halves batched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusegen.kernels import sampler_step as row
from fusegen.models.pixels import pictures
from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.text_to_image import TextToImage
from fusegen.models.unet import UNet
from fusegen.models.zoo.emoji.train import NETWORKS
from fusegen.runtime import noise
from fusegen.runtime.derived import values
from fusegen.runtime.sampler import coefficients


def emoji_modules(model: TextToImage) -> tuple[TextEncoder, UNet]:
    """The emoji model's networks as modules, with the weights of its bundle."""
    assert model.bundle is not None
    text = TextEncoder(TextEncoderConfig(vocabulary=model.tokenizer.get_vocab_size()))
    unet = UNet(NETWORKS[model.bundle.manifest.loop["image"]["width"]])
    for part, net in (("text_encoder", text), ("denoiser", unet)):
        weights = values(model.bundle.program(part).weights)
        net.load_state_dict({k: v.clone() for k, v in weights.items()}, strict=False)
    return text.eval(), unet.eval()


def combine(x: Tensor, out: Tensor, r: Sequence[float], history: list[Any], guidance: float) -> tuple[Tensor, Tensor]:
    """One sampler step in eager PyTorch: (next x, denoised). ``r`` is a row as Python floats."""
    uncond, cond = out.float().chunk(2)
    o = uncond + guidance * (cond - uncond)
    denoised = (r[row.P_X] * x + r[row.P_OUT] * o).clamp(-r[row.CLIP], r[row.CLIP])
    nxt = r[row.X] * x + r[row.D] * denoised
    for slot in range(row.SLOTS):
        if r[row.HX0 + slot]:
            nxt = nxt + r[row.HX0 + slot] * history[slot]
        if r[row.HD0 + slot]:
            nxt = nxt + r[row.HD0 + slot] * history[row.SLOTS + slot]
    if r[row.STORE_X] >= 0:
        history[int(r[row.STORE_X])] = x
    if r[row.STORE_D] >= 0:
        history[row.SLOTS + int(r[row.STORE_D])] = denoised
    return nxt, denoised


class EagerTextToImage:
    """The emoji pipeline on plain modules; ``compiled`` wraps the U-Net in ``torch.compile``."""

    def __init__(self, model: TextToImage, dtype: torch.dtype, compiled: bool = False):
        self.model, self.dtype = model, dtype
        text, unet = emoji_modules(model)
        self.text = text
        self.unet: Callable[..., Tensor] | nn.Module = unet.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True
            self.unet = torch.compile(unet, dynamic=False, mode="max-autotune-no-cudagraphs")

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(self, prompt: str, steps: int, guidance: float, seeds: Sequence[int], sampler: str) -> Any:
        """The pictures of ``seeds``; the sampler must draw no noise of its own."""
        model, n = self.model, len(seeds)
        ids = torch.tensor([e.ids for e in model.tokenizer.encode_batch(["", prompt])])
        context = self.text(ids).repeat_interleave(n, dim=0).to(self.dtype)
        plan = coefficients(sampler, model.schedule, steps)
        rows, times = plan.rows.tolist(), plan.times.tolist()
        shape = (model.image.channels, model.image.height, model.image.width)
        x = noise.initial(noise.seed_tensor(seeds, "cpu"), shape) * plan.initial
        scale, history = plan.first_input, [None] * (2 * row.SLOTS)
        for r, t in zip(rows, times, strict=True):
            if r[row.NOISE]:
                raise ValueError(f"{sampler} draws noise; the eager pipeline has no equal source of it")
            given = (x * scale).to(self.dtype).contiguous(memory_format=torch.channels_last)
            out = self.unet(torch.cat([given, given]), torch.full((2 * n,), t), context)
            x, _ = combine(x, out, r, history, guidance)
            scale = r[row.INPUT]
        return pictures(x)
