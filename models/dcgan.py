"""DCGAN's generator and discriminator, written as plain PyTorch (Radford et al. 2016, arXiv:1511.06434).

Strided convolutions alone, batch norm after all but the first and last, ReLU and tanh in the generator, leaky ReLU in
the discriminator.  The layers' names are those of PyTorch's own DCGAN example (``main.0.weight``, ...).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class DCGANConfig:
    """``resolution`` is a power of two from 8 on; the finest hidden layer is ``width`` wide, each coarser one twice."""

    resolution: int = 64
    z_width: int = 100
    width: int = 64
    rgb_channels: int = 3

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(f"a resolution is a power of two from 8 on, not {self.resolution}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden layers' channels, 4x4 first."""
        return tuple(self.width << i for i in reversed(range(self.resolution.bit_length() - 3)))


class DCGANGenerator(nn.Module):
    """z (B, z_width) -> pictures (B, rgb_channels, R, R) in [-1, 1]."""

    def __init__(self, cfg: DCGANConfig = DCGANConfig()):
        super().__init__()
        self.cfg, self.main, before = cfg, nn.Sequential(), cfg.z_width
        for i, width in enumerate(cfg.widths):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            conv = nn.ConvTranspose2d(before, width, 4, stride, padding, bias=False)
            self.main.extend([conv, nn.BatchNorm2d(width), nn.ReLU()])
            before = width
        self.main.extend([nn.ConvTranspose2d(before, cfg.rgb_channels, 4, 2, 1, bias=False), nn.Tanh()])
        self.apply(initialised)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """Pictures (B, rgb_channels, R, R) in [-1, 1] -> logits (B,), positive where they seem real."""

    def __init__(self, cfg: DCGANConfig = DCGANConfig()):
        super().__init__()
        self.cfg, self.main, before = cfg, nn.Sequential(), cfg.rgb_channels
        for i, width in enumerate(reversed(cfg.widths)):
            self.main.append(nn.Conv2d(before, width, 4, 2, 1, bias=False))
            self.main.extend(([nn.BatchNorm2d(width)] if i else []) + [nn.LeakyReLU(0.2)])
            before = width
        self.main.append(nn.Conv2d(before, 1, 4, bias=False))
        self.apply(initialised)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()


def initialised(module: nn.Module) -> None:
    """The paper's initial weights: normal with a standard deviation of 0.02, batch norm's around 1."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
