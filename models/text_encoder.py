"""A small bidirectional transformer that turns caption tokens into the features a U-Net attends to.

Pre-norm blocks (Xiong et al. 2020) with learned positions; padding tokens are masked out as keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a :class:`TextEncoder`; ``pad`` is the token id that is masked."""

    vocabulary: int
    length: int = 16
    width: int = 128
    layers: int = 3
    head_dim: int = 32
    pad: int = 0


class TextBlock(nn.Module):
    """Self-attention and a GELU feed-forward network, each behind a LayerNorm and added to its input."""

    def __init__(self, cfg: TextEncoderConfig):
        super().__init__()
        self.heads = cfg.width // cfg.head_dim
        self.norm1 = nn.LayerNorm(cfg.width)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)
        self.norm2 = nn.LayerNorm(cfg.width)
        self.up = nn.Linear(cfg.width, 4 * cfg.width)
        self.down = nn.Linear(4 * cfg.width, cfg.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """``tokens`` (B, length) int64 -> (B, length, width) features. The first token is never padding."""

    def __init__(self, cfg: TextEncoderConfig):
        super().__init__()
        self.cfg = cfg
        self.token = nn.Embedding(cfg.vocabulary, cfg.width)
        self.position = nn.Parameter(torch.randn(cfg.length, cfg.width) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self.cfg.pad)[:, None, None, :]
        x = self.token(tokens) + self.position
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)
