"""Small generators with random weights: their networks, programs and bundles; shared by the tests of the gan family."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.models.dcgan import DCGANConfig, DCGANGenerator
from fusegen.models.stylegan2 import Generator, StyleGAN2Config
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.program import Program
from fusegen.runtime.read import safetensors

TINY = StyleGAN2Config(resolution=16, z_width=24, w_width=32, mapping_layers=2, channels=(24, 16, 8))
BATCH = {0: ("batch", 1, 64)}


@functools.cache
def styled(noise: float = 0.3) -> Generator:
    """A style-based generator of 16 x 16 pixels whose noise has the strength ``noise``."""
    torch.manual_seed(0)
    made = Generator(TINY).eval().requires_grad_(False)
    for name, p in made.named_parameters():
        if name.endswith("noise_strength"):
            p.fill_(noise)
        elif name.endswith("bias"):
            p.add_(torch.randn_like(p) * 0.1)
        elif "torgb.weight" in name:
            p.mul_(0.3)
    return made


@functools.cache
def programs(noise: float = 0.3) -> dict[str, Program]:
    """:func:`styled` as its two programs."""
    net = styled(noise)
    z, ws = torch.randn(2, TINY.z_width), torch.randn(2, TINY.layers, TINY.w_width)
    noises = [torch.randn(shape) for shape in TINY.noises(2)]
    free = {"ws": BATCH, "noise": (BATCH,) * len(noises)}
    return {
        "mapping": capture(net.mapping, (z,), dynamic={"z": BATCH}, name="mapping"),
        "synthesis": capture(net.synthesis, (ws, *noises), dynamic=free, name="synthesis"),
    }


@functools.cache
def plain_program() -> Program:
    """A DCGAN generator of 16 x 16 pixels."""
    torch.manual_seed(0)
    net = DCGANGenerator(DCGANConfig(resolution=16, z_width=20, width=16)).eval().requires_grad_(False)
    for p in net.parameters():
        p.mul_(6)
    return capture(net, (torch.randn(2, 20),), dynamic={"z": BATCH}, name="generator")


def statistics(count: int = 3) -> dict[str, Tensor]:
    """What latents.safetensors holds: some mean, unit directions and deviations."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(count, TINY.w_width, generator=generator)
    return {
        "w_mean": torch.randn(TINY.w_width, generator=generator) * 0.2,
        "directions": directions / directions.norm(dim=1, keepdim=True),
        "deviations": torch.rand(count, generator=generator) + 0.5,
    }


def image(side: int = 16) -> dict[str, int]:
    return {"width": side, "height": side, "least": side, "most": side}


def bundle(
    folder: Path,
    parts: Mapping[str, Program] | None = None,
    latents: Mapping[str, Tensor] | None = None,
    files: Mapping[str, bytes] | None = None,
    **manifest: Any,
) -> Path:
    """A model as a file: :func:`programs` and :func:`statistics`, or what is given in their place."""
    parts = programs() if parts is None else parts
    if files is None:
        stored = b"".join(bytes(p) for p in safetensors.chunks(statistics() if latents is None else latents))
        files = {"latents.safetensors": stored} if "generator" not in parts else {}
    default = {"psi": 0.7} if "generator" not in parts else {}
    stated: dict[str, Any] = {"loop": {"kind": "single", "image": image()}, "sampler": default} | manifest
    Bundle.write(folder / "tiny.fg", Manifest(name="tiny", family="gan", **stated), parts, files)
    return folder / "tiny.fg"
