"""A text-conditioned denoising U-Net, written as plain PyTorch.

The building blocks are those of Ho et al. 2020 (residual blocks with GroupNorm and a time embedding) and Rombach
et al. 2022 (spatial transformers whose keys and values come from the text).  Nothing here knows fusegen: the network
is exported with ``torch.export`` and the runtime binds its own kernels to the graph it finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a :class:`UNet`.

    ``widths`` are the channels of each resolution, finest first; ``attention`` says at which of them a spatial
    transformer follows every residual block; ``context_width`` is the width of the text features.
    """

    in_channels: int = 3
    widths: tuple[int, ...] = (64, 96, 160)
    blocks: int = 1
    attention: tuple[bool, ...] = (False, False, True)
    head_dim: int = 40
    context_width: int = 128
    time_width: int = 256
    groups: int = 32


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the time steps ``t`` (B,), in [0, 1000): (B, width), float32 (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10_000.0) / half))
    angles = t.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the time embedding is added between, a 1x1 skip where widths differ."""

    def __init__(self, width_in: int, width: int, cfg: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.time = nn.Linear(cfg.time_width, width)
        self.norm2 = nn.GroupNorm(cfg.groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head attention of ``x`` (B, L, width) over ``context`` (B, M, context_width), or over itself."""

    def __init__(self, width: int, head_dim: int, context_width: int | None = None):
        super().__init__()
        self.heads = width // head_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context_width or width, width, bias=False)
        self.v = nn.Linear(context_width or width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        projected = self.q(x), self.k(source), self.v(source)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The gated feed-forward network GEGLU of Shazeer 2020."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """Self-attention, cross-attention to the text and a feed-forward network over the pixels of an image."""

    def __init__(self, width: int, cfg: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, width)
        self.proj_in = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.attention1 = Attention(width, cfg.head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.attention2 = Attention(width, cfg.head_dim, cfg.context_width)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 2 * width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, height, w = x.shape
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(b, height * w, c))
        h = h + self.attention1(self.norm1(h))
        h = h + self.attention2(self.norm2(h), context)
        h = h + self.feed_forward(self.norm3(h))
        return x + self.proj_out(h).reshape(b, height, w, c).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A residual block, then a spatial transformer where the configuration asks for one."""

    def __init__(self, width_in: int, width: int, attention: bool, cfg: UNetConfig):
        super().__init__()
        self.block = ResidualBlock(width_in, width, cfg)
        self.transformer = SpatialTransformer(width, cfg) if attention else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.block(x, time)
        return x if self.transformer is None else self.transformer(x, context)


class UNet(nn.Module):
    """The denoiser: ``x`` (B, C, H, W), ``t`` (B,) in [0, 1000), ``context`` (B, L, context_width) -> (B, C, H, W).

    The first feature of the context, the text's summary, also joins the time embedding, so that every residual block
    knows the subject.  H and W are multiples of ``2 ** (len(widths) - 1)``.
    """

    def __init__(self, cfg: UNetConfig = UNetConfig()):
        super().__init__()
        self.cfg = cfg
        widths, levels = cfg.widths, len(cfg.widths)
        hidden = cfg.time_width
        self.time = nn.Sequential(nn.Linear(widths[0], hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.pooled = nn.Linear(cfg.context_width, cfg.time_width)
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.down, self.shrink, skips, width = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level in range(levels):
            for _ in range(cfg.blocks):
                self.down.append(Stage(width, widths[level], cfg.attention[level], cfg))
                width = widths[level]
                skips.append(width)
            if level < levels - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle1 = Stage(width, width, True, cfg)
        self.middle2 = Stage(width, width, False, cfg)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(levels)):
            for _ in range(cfg.blocks + 1):
                self.up.append(Stage(width + skips.pop(), widths[level], cfg.attention[level], cfg))
                width = widths[level]
            if level:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm_out = nn.GroupNorm(cfg.groups, width)
        self.conv_out = nn.Conv2d(width, cfg.in_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        time = self.time(timestep_embedding(t, self.cfg.widths[0]).to(x.dtype))
        time = time + self.pooled(context[:, 0])
        x = self.conv_in(x)
        skips, blocks = [x], self.cfg.blocks
        for index, stage in enumerate(self.down):
            x = stage(x, time, context)
            skips.append(x)
            if index % blocks == blocks - 1 and index // blocks < len(self.shrink):
                x = self.shrink[index // blocks](x)
                skips.append(x)
        x = self.middle2(self.middle1(x, time, context), time, context)
        for index, stage in enumerate(self.up):
            x = stage(torch.cat([x, skips.pop()], dim=1), time, context)
            if index % (blocks + 1) == blocks and index // (blocks + 1) < len(self.grow):
                x = self.grow[index // (blocks + 1)](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
