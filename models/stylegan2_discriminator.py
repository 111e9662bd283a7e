"""StyleGAN2's discriminator, written as plain PyTorch (Karras et al. 2020, arXiv:1912.04958): residual, with the
minibatch standard deviation of Karras et al. 2018.  Names and values are stored as in :mod:`.stylegan2`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusegen.models.stylegan2 import FullyConnected, StyleGAN2Config, activated, filtered, resampling_filter

GROUP = 4  # pictures whose spread is one number of the minibatch standard deviation


class ConvLayer(nn.Module):
    """A convolution, at half the size where ``down`` (filtered first), and where it has a bias the activation.

    x (B, I, H, W) -> (B, O, H, W) or (B, O, H / 2, W / 2); ``gain`` scales what comes out.
    """

    resample_filter: Tensor

    def __init__(
        self, width_in: int, width: int, taps: int, clamp: float | None, down: bool = False, bias: bool = True,
        gain: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.down, self.clamp, self.gain = down, clamp, gain
        self.weight = nn.Parameter(torch.randn(width, width_in, taps, taps))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.weight_gain = 1 / math.sqrt(width_in * taps * taps)
        self.register_buffer("resample_filter", resampling_filter())

    def forward(self, x: Tensor) -> Tensor:
        taps, scale = self.weight.shape[-1], self.weight_gain * (1.0 if self.bias is not None else self.gain)
        weight = self.weight * scale
        if self.down and taps == 1:
            # On a CPU a strided filter's backward pass is ten times as slow as that of one whose pixels are left out.
            x = F.conv2d(filtered(x, self.resample_filter, (1, 1, 1, 1))[:, :, ::2, ::2], weight)
        elif self.down:
            x = F.conv2d(filtered(x, self.resample_filter, (2, 2, 2, 2)), weight, stride=2)
        else:
            x = F.conv2d(x, weight, padding=taps // 2)
        return x if self.bias is None else activated(x, self.bias, self.gain, self.clamp)


class DiscriminatorBlock(nn.Module):
    """Two convolutions, the second at half the size, and a 1x1 skip beside them; from the colours where it is first."""

    resample_filter: Tensor

    def __init__(self, rgb_channels: int | None, width: int, width_out: int, clamp: float | None):
        super().__init__()
        self.register_buffer("resample_filter", resampling_filter())
        self.fromrgb = None if rgb_channels is None else ConvLayer(rgb_channels, width, 1, clamp)
        self.conv0 = ConvLayer(width, width, 3, clamp)
        self.conv1 = ConvLayer(width, width_out, 3, clamp, down=True, gain=math.sqrt(0.5))
        self.skip = ConvLayer(width, width_out, 1, clamp, down=True, bias=False, gain=math.sqrt(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.fromrgb is None else self.fromrgb(x)
        return self.skip(x) + self.conv1(self.conv0(x))


def with_spread(x: Tensor) -> Tensor:
    """One channel more: the standard deviation over groups of ``GROUP`` samples, averaged over all else."""
    b, _, h, w = x.shape
    group = math.gcd(b, GROUP)
    y = x.reshape(group, b // group, -1)
    spread = (y - y.mean(0)).square().mean(0).add(1e-8).sqrt().mean(1)
    return torch.cat([x, spread.repeat(group).reshape(b, 1, 1, 1).expand(-1, -1, h, w).to(x.dtype)], dim=1)


class Epilogue(nn.Module):
    """4x4: the spread of the minibatch, a convolution and two linear layers: (B, C, 4, 4) -> (B, 1)."""

    def __init__(self, width: int, clamp: float | None):
        super().__init__()
        self.conv = ConvLayer(width + 1, width, 3, clamp)
        self.fc, self.out = FullyConnected(width * 16, width), FullyConnected(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(with_spread(x)).flatten(1)
        return self.out(F.leaky_relu(self.fc(x), 0.2) * math.sqrt(2))


class Discriminator(nn.Module):
    """Pictures (B, 3, R, R) in [-1, 1] -> logits (B, 1), positive where they seem to come from the training set."""

    def __init__(self, cfg: StyleGAN2Config):
        super().__init__()
        self.cfg, widths = cfg, cfg.widths
        for i in range(len(widths) - 1, 0, -1):
            rgb = cfg.rgb_channels if i == len(widths) - 1 else None
            block = DiscriminatorBlock(rgb, widths[i], widths[i - 1], cfg.clamp)
            self.add_module(f"b{cfg.resolutions[i]}", block)
        self.b4 = Epilogue(widths[0], cfg.clamp)

    def forward(self, x: Tensor) -> Tensor:
        for resolution in self.cfg.resolutions[:0:-1]:
            x = self.get_submodule(f"b{resolution}")(x)
        return self.b4(x.to(self.b4.out.weight.dtype))  # which may be wider than the blocks'
