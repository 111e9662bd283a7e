"""The networks: what others wrote (diffusers, transformers), in their published configurations.

None of this is in the runtime: it meets these networks as exported graphs alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ROOT = Path(__file__).resolve().parents[2]
_SD_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def library(name: str) -> Any:
    """diffusers or transformers, imported.

    Both ask whether a package called ``kernels`` is installed.  Run from the checkout's root, Python would show them
    our folder of that name, which refuses to be imported so: the root is taken off the path (fusegen is imported
    already, and finds its layers by its own ``__path__``).
    """
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]
    return importlib.import_module(name)


class Call(nn.Module):
    """A network as a function of tensors that returns one tensor."""

    def __init__(self, net: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.net, *inputs)


@dataclass(frozen=True)
class Network:
    """``build()`` makes the module, its weights drawn from the global generator; ``inputs(generator)`` its arguments.

    ``stored``: the dtype its weights have in the files that contenders load, all contenders alike.  ``traced``: smaller
    arguments that OpenVINO's converter traces it with, where those would take more memory than there is.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], list[Tensor]]
    stored: str = "float32"
    traced: Callable[[torch.Generator], list[Tensor]] | None = None


def _sd15() -> nn.Module:
    net = library("diffusers").UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=_SD_UP,
        cross_attention_dim=768, attention_head_dim=8,
    )  # fmt: skip
    return Call(net, lambda net, x, t, context: net(x, t, context, return_dict=False)[0])


def _sd15_inputs(g: torch.Generator) -> list[Tensor]:
    return [torch.randn(2, 4, 64, 64, generator=g), torch.full((2,), 500.0), torch.randn(2, 77, 768, generator=g)]


def _sdxl() -> nn.Module:
    net = library("diffusers").UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip

    def call(net: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, ids: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": ids}
        out: Tensor = net(x, t, context, added_cond_kwargs=added, return_dict=False)[0]
        return out

    return Call(net, call)


def _sdxl_inputs(side: int) -> Callable[[torch.Generator], list[Tensor]]:
    def inputs(g: torch.Generator) -> list[Tensor]:
        x, context = torch.randn(2, 4, side, side, generator=g), torch.randn(2, 77, 2048, generator=g)
        size = 8.0 * side
        ids = torch.tensor([size, size, 0.0, 0.0, size, size]).expand(2, 6).contiguous()
        return [x, torch.full((2,), 500.0), context, torch.randn(2, 1280, generator=g), ids]

    return inputs


def _vae() -> nn.Module:
    net = library("diffusers").AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    del net.encoder, net.quant_conv
    return Call(net, lambda net, z: net.decoder(net.post_quant_conv(z)))


def _dit() -> nn.Module:
    net = library("diffusers").DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return Call(net, lambda net, x, t, label: net(x, timestep=t, class_labels=label, return_dict=False)[0])


def _dit_inputs(g: torch.Generator) -> list[Tensor]:
    return [torch.randn(2, 4, 32, 32, generator=g), torch.full((2,), 500), torch.tensor([207, 1000])]


def _clip() -> nn.Module:
    transformers = library("transformers")
    cfg = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", attn_implementation="sdpa",
    )  # fmt: skip
    return Call(transformers.CLIPTextModel(cfg), lambda net, ids: net(ids)[0])


def _latents(side: int) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda g: [torch.randn(1, 4, side, side, generator=g)]


NETWORKS: Mapping[str, Network] = {
    "sd15-unet": Network(_sd15, _sd15_inputs),
    "sdxl-unet-512": Network(_sdxl, _sdxl_inputs(64), "bfloat16"),
    "sdxl-unet-1024": Network(_sdxl, _sdxl_inputs(128), "bfloat16", _sdxl_inputs(64)),
    "sd-vae-512": Network(_vae, _latents(64)),
    "sd-vae-576": Network(_vae, _latents(72)),  # a tile of 1024, with 16 latents in common with the next
    "sd-vae-1024": Network(_vae, _latents(128)),
    "dit-xl-2": Network(_dit, _dit_inputs),
    "clip-l": Network(_clip, lambda g: [torch.randint(0, 49408, (2, 77), generator=g)]),
}


def made(name: str) -> nn.Module:
    """The network, its weights drawn from seed 0 and rounded to its stored dtype, in float32, without gradients."""
    torch.manual_seed(0)
    net = NETWORKS[name].build().eval().requires_grad_(False)
    stored = getattr(torch, NETWORKS[name].stored)
    for p in net.parameters():
        p.copy_(p.to(stored))
    return net


def example(name: str) -> list[Tensor]:
    """The inputs that every contender gets."""
    return NETWORKS[name].inputs(torch.Generator().manual_seed(1))
