"""StyleGAN2's generator, written as plain PyTorch (Karras et al. 2020, arXiv:1912.04958).

A mapping network turns a latent z into an intermediate latent w; a synthesis network grows a picture from a learned
4x4 constant, each layer's convolution modulated by its own w.  Parameters and buffers bear the names, and hold the
values, of the published networks (NVlabs, stylegan2-ada-pytorch): weights are stored with unit variance and scaled
when they are used (the equalised learning rate of Karras et al. 2018), which costs nothing in an exported graph, whose
constants are folded.

Modulation and demodulation are written as scales of a convolution's input and output channels, so that all samples of
a batch share its weights (section 2.2).  Nothing here knows fusegen: the runtime finds its ops in the exported graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILTER = (1.0, 3.0, 3.0, 1.0)  # the resampling filter's taps, along either axis


@dataclass(frozen=True)
class StyleGAN2Config:
    """Sizes of a generator, or of the discriminator that goes with it.

    A resolution r has ``min(channel_base // r, channel_max)`` channels, or its entry of ``channels``, 4x4 first, where
    that is given.  ``mapping_rate`` is the mapping network's learning rate as a multiple of the other layers'.
    ``clamp`` bounds what each convolution's layer returns, as half precision needs; None: no bound.
    """

    resolution: int = 32
    z_width: int = 512
    w_width: int = 512
    mapping_layers: int = 8
    mapping_rate: float = 0.01
    channel_base: int = 32768
    channel_max: int = 512
    channels: tuple[int, ...] | None = None
    rgb_channels: int = 3
    clamp: float | None = 256.0

    def __post_init__(self) -> None:
        if self.resolution < 4 or self.resolution & (self.resolution - 1):
            raise ValueError(f"a resolution is a power of two from 4 on, not {self.resolution}")
        if self.channels is not None and len(self.channels) != len(self.resolutions):
            raise ValueError(f"{len(self.channels)} channels for the {len(self.resolutions)} resolutions from 4 on")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """4, 8, ... up to ``resolution``."""
        return tuple(1 << n for n in range(2, self.resolution.bit_length()))

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each resolution."""
        return self.channels or tuple(min(self.channel_base // r, self.channel_max) for r in self.resolutions)

    @property
    def layers(self) -> int:
        """How many w a picture takes: one for each convolution and one for the last to-RGB layer."""
        return 2 * len(self.resolutions)

    def noises(self, batch: int) -> list[tuple[int, int, int, int]]:
        """The shapes of the synthesis network's noise inputs, in order: 4x4 has one, every other resolution two."""
        sides = [r for r in self.resolutions for _ in range(1 + (r > 4))]
        return [(batch, 1, side, side) for side in sides]


def config_f(resolution: int) -> StyleGAN2Config:
    """The published network of 256, 512 or 1024 pixels a side (configuration F of the paper's table 1)."""
    if resolution not in (256, 512, 1024):
        raise ValueError(f"configuration F was published for 256, 512 and 1024 pixels, not for {resolution}")
    return StyleGAN2Config(resolution)


def resampling_filter() -> Tensor:
    """The taps as an outer product that sums to one, (4, 4)."""
    taps = torch.tensor(FILTER)
    return taps.outer(taps) / taps.sum() ** 2


def filtered(x: Tensor, taps: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Each channel of ``x`` (B, C, H, W) padded with zeros (left, right, top, bottom) and convolved with ``taps``."""
    weight = taps.flip(0, 1)[None, None].expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, padding), weight, groups=x.shape[1])


def upsampled(x: Tensor, taps: Tensor) -> Tensor:
    """``x`` (B, C, H, W) at twice the size: a zero after every element, then the filter, which keeps the magnitude."""
    x = F.pad(x[:, :, :, None, :, None], (0, 1, 0, 0, 0, 1)).flatten(4, 5).flatten(2, 3)
    return filtered(x, taps * 4, (2, 1, 2, 1))


def activated(x: Tensor, bias: Tensor, gain: float = 1.0, clamp: float | None = None) -> Tensor:
    """Bias, leaky ReLU and the factor that keeps its magnitude, on the channels of ``x`` (B, C, H, W)."""
    x = F.leaky_relu(x + bias.reshape(1, -1, 1, 1), 0.2) * (math.sqrt(2) * gain)
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


class FullyConnected(nn.Module):
    """A linear layer whose weights are stored with variance 1 / ``rate`` squared: x (B, I) -> (B, O)."""

    def __init__(self, width_in: int, width: int, rate: float = 1.0, bias: float = 0.0, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width_in) / rate)
        self.bias = nn.Parameter(torch.full((width,), bias))
        self.weight_gain, self.bias_gain = gain * rate / math.sqrt(width_in), gain * rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class Mapping(nn.Module):
    """z (B, z_width), of any length, -> w (B, w_width).

    ``w_avg`` is a moving average of w, which truncation pulls towards.
    """

    w_avg: Tensor

    def __init__(self, cfg: StyleGAN2Config):
        super().__init__()
        self.cfg = cfg
        for i in range(cfg.mapping_layers):
            width_in = cfg.z_width if i == 0 else cfg.w_width
            self.add_module(f"fc{i}", FullyConnected(width_in, cfg.w_width, cfg.mapping_rate))
        self.register_buffer("w_avg", torch.zeros(cfg.w_width))

    def forward(self, z: Tensor) -> Tensor:
        x = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for i in range(self.cfg.mapping_layers):
            x = F.leaky_relu(self.get_submodule(f"fc{i}")(x), 0.2) * math.sqrt(2)
        return x


class SynthesisLayer(nn.Module):
    """A modulated 3x3 convolution, at twice the size where ``up``, noise, bias and activation.

    x (B, I, H, W), w (B, w_width), noise (B or 1, 1, r, r) -> (B, O, r, r).  Where ``up``, the convolution is a
    transposed one of stride 2, and the filter follows it.
    """

    noise_const: Tensor
    resample_filter: Tensor

    def __init__(self, width_in: int, width: int, resolution: int, up: bool, cfg: StyleGAN2Config):
        super().__init__()
        self.up, self.clamp = up, cfg.clamp
        self.affine = FullyConnected(cfg.w_width, width_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(width, width_in, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", resampling_filter())

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        styles = self.affine(w)
        norm = torch.rsqrt(styles.square() @ self.weight.square().sum((2, 3)).t() + 1e-8)
        x = x * styles[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2) * norm[:, :, None, None]
            x = filtered(x, self.resample_filter * 4, (1, 1, 1, 1))
        else:
            x = F.conv2d(x, self.weight, padding=1) * norm[:, :, None, None]
        return activated(x + noise * self.noise_strength, self.bias, clamp=self.clamp)


class ToRGB(nn.Module):
    """A modulated 1x1 convolution to the colours, without demodulation: (B, I, r, r), w -> (B, rgb_channels, r, r)."""

    def __init__(self, width_in: int, cfg: StyleGAN2Config):
        super().__init__()
        self.clamp = cfg.clamp
        self.affine = FullyConnected(cfg.w_width, width_in, bias=1.0, gain=1 / math.sqrt(width_in))
        self.weight = nn.Parameter(torch.randn(cfg.rgb_channels, width_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(cfg.rgb_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = F.conv2d(x * self.affine(w)[:, :, None, None], self.weight, self.bias)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: its convolutions, and its to-RGB layer added to the picture so far at twice the size."""

    resample_filter: Tensor

    def __init__(self, width_in: int | None, width: int, resolution: int, cfg: StyleGAN2Config):
        super().__init__()
        self.register_buffer("resample_filter", resampling_filter())
        if width_in is None:
            self.const = nn.Parameter(torch.randn(width, 4, 4))
        else:
            self.conv0 = SynthesisLayer(width_in, width, resolution, True, cfg)
        self.conv1 = SynthesisLayer(width, width, resolution, False, cfg)
        self.torgb = ToRGB(width, cfg)

    def first(self, ws: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The 4x4 features and picture."""
        x = self.conv1(self.const[None].expand(ws.shape[0], -1, -1, -1), ws[:, 0], noise)
        return x, self.torgb(x, ws[:, 1])

    def forward(self, x: Tensor, image: Tensor, ws: Tensor, noise0: Tensor, noise1: Tensor) -> tuple[Tensor, Tensor]:
        """``ws`` (B, 3, w_width): one for each layer; to-RGB's is also the next block's first."""
        x = self.conv1(self.conv0(x, ws[:, 0], noise0), ws[:, 1], noise1)
        return x, upsampled(image, self.resample_filter) + self.torgb(x, ws[:, 2])


class Synthesis(nn.Module):
    """ws (B, cfg.layers, w_width) and one noise (B or 1, 1, r, r) a layer (``cfg.noises``) -> (B, 3, R, R), [-1, 1]."""

    def __init__(self, cfg: StyleGAN2Config):
        super().__init__()
        self.cfg, width_in = cfg, None
        for resolution, width in zip(cfg.resolutions, cfg.widths, strict=True):
            self.add_module(f"b{resolution}", SynthesisBlock(width_in, width, resolution, cfg))
            width_in = width

    def forward(self, ws: Tensor, *noise: Tensor) -> Tensor:
        x, image = cast(SynthesisBlock, self.b4).first(ws, noise[0])
        for i, resolution in enumerate(self.cfg.resolutions[1:]):
            at, block = 1 + 2 * i, self.get_submodule(f"b{resolution}")
            x, image = block(x, image, ws[:, at : at + 3], noise[at], noise[at + 1])
        return image

    def constant_noise(self) -> list[Tensor]:
        """The noise that was drawn once for this network, (1, 1, r, r) a layer: the published "const" mode."""
        return [m.noise_const[None, None] for m in self.modules() if isinstance(m, SynthesisLayer)]


class Generator(nn.Module):
    """Both networks under their published names; z (B, z_width) and the noises -> the picture (B, 3, R, R)."""

    def __init__(self, cfg: StyleGAN2Config):
        super().__init__()
        self.mapping, self.synthesis = Mapping(cfg), Synthesis(cfg)

    def forward(self, z: Tensor, *noise: Tensor) -> Tensor:
        w = self.mapping(z)
        return self.synthesis(w[:, None].expand(-1, self.synthesis.cfg.layers, -1), *noise)
