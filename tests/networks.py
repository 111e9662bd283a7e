"""Small networks with random weights, and what they are called with: shared by the runtime's tests."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusegen.models.text_encoder import TextEncoder, TextEncoderConfig
from fusegen.models.unet import ResidualBlock, UNet, UNetConfig
from fusegen.runtime.api import capture
from fusegen.runtime.program import Program

SMALL = UNetConfig(widths=(32, 64), attention=(False, True), head_dim=16, context_width=48, time_width=64, groups=8)


@functools.cache
def unet() -> UNet:
    """A two-level text-conditioned U-Net; the layers that training starts at zero are random."""
    torch.manual_seed(0)
    made = UNet(SMALL).eval().requires_grad_(False)
    nn.init.normal_(made.conv_out.weight, std=0.1)
    for module in made.modules():
        if isinstance(module, ResidualBlock):
            nn.init.normal_(module.conv2.weight, std=0.05)
    return made


def unet_inputs(batch: int, size: int = 16, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context; sample i is the same in every batch."""
    made = []
    for sample in range(batch):
        generator = torch.Generator().manual_seed(seed * 1000 + sample)
        x = torch.randn(3, size, size, generator=generator)
        made.append((x, torch.rand((), generator=generator) * 1000, torch.randn(5, 48, generator=generator)))
    x, t, context = (torch.stack(parts) for parts in zip(*made, strict=True))
    return x, t, context


@functools.cache
def unet_program() -> Program:
    """:func:`unet`, its batch from 1 to 64."""
    dynamic = {"x": {0: ("batch", 1, 64)}, "t": {0: "batch"}, "context": {0: "batch"}}
    return capture(unet(), unet_inputs(2), dynamic=dynamic)


@functools.cache
def text_encoder() -> TextEncoder:
    """A two-layer text encoder."""
    torch.manual_seed(0)
    return TextEncoder(TextEncoderConfig(vocabulary=50, length=8, width=32, layers=2, head_dim=16)).eval()


@functools.cache
def text_program() -> Program:
    """:func:`text_encoder` for a batch from 1 to 64."""
    return capture(text_encoder(), (tokens(2),), dynamic={"tokens": {0: ("batch", 1, 64)}})


def tokens(batch: int) -> Tensor:
    """Captions that end in padding."""
    made = torch.randint(1, 50, (batch, 8), generator=torch.Generator().manual_seed(3))
    made[:, 5:] = 0
    return made


def plainly(module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The module's output, without gradients."""
    with torch.no_grad():
        return module(*inputs)


def relative(got: Tensor, want: Tensor) -> float:
    """Root mean square of the error over that of ``want``; infinite where ``got`` is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    error = (got.double() - want.double()).square().mean().sqrt()
    return float(error / want.double().square().mean().sqrt())
