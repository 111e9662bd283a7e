"""A decoder-only transformer of the Llama kind: RMSNorm, rotary positions, grouped queries, SwiGLU, no biases.

Pre-norm blocks (Xiong et al. 2020; Zhang & Sennrich 2019), rotary positions in halves (Su et al. 2021), a key-value
head for several query heads (Ainslie et al. 2023), gated feed-forward (Shazeer 2020), output and input embeddings tied.
The weights' names are those of transformers' Llama, which the tests compare it with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusegen.kernels import op
from fusegen.runtime import rotary


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`GPT`.  ``context``: the most positions; ``hidden``: the feed-forward's width."""

    vocabulary: int
    context: int = 512
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 704
    base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.q_proj = nn.Linear(cfg.width, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.width, bias=False)
        self.head_dim = cfg.head_dim

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, Hq, n, D), k and v (B, Hkv, n, D), before they are turned."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in projections)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, n, D) turned by tables (n, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.hidden, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.hidden, bias=False)
        self.down_proj = nn.Linear(cfg.hidden, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind an RMSNorm and added to its input."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.width, cfg.epsilon)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.width, cfg.epsilon)
        self.mlp = FeedForward(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """``tokens`` (B, n) int64 -> logits (B, n, vocabulary), each of the token that follows."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocabulary, cfg.width)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, cfg.epsilon)
        radians, factor = rotary.frequencies(cfg.head_dim, cfg.base)
        cos, sin = rotary.tables(torch.arange(cfg.context), radians, factor)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))  # as in GPT-2, smaller by the depth
                nn.init.normal_(p, std=0.02 / (2 * cfg.layers) ** 0.5 if last else 0.02)

    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return [b for b in self.layers if isinstance(b, Block)]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks():
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


class Decoder(nn.Module):
    """A :class:`GPT` over key-value caches: the form that is exported, for a prompt's tokens and for one token alike.

    ``tokens`` (B, n) int64 stand at ``positions`` (B,) int64 and the n - 1 after them; ``last`` (B,) int64 is the row
    of ``tokens`` whose logits (B, vocabulary) are wanted.  ``caches``: keys and values of each layer in turn,
    (B, kv_heads, context, head_dim), written in place; what lies beyond a row's position is never read.
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        op.ops()  # registers torch.ops.fusegen
        self.gpt = gpt

    def caches(self, batch: int) -> list[Tensor]:
        """Empty caches."""
        cfg = self.gpt.cfg
        return [torch.zeros(batch, cfg.kv_heads, cfg.context, cfg.head_dim) for _ in range(2 * cfg.layers)]

    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor, caches: list[Tensor]) -> Tensor:
        gpt, n = self.gpt, tokens.shape[1]
        at = (positions[:, None] + torch.arange(n, device=tokens.device))[:, None]  # (B, 1, n): any head
        x = gpt.embed_tokens(tokens)
        for block, keys, values in zip(gpt.blocks(), caches[::2], caches[1::2], strict=True):
            q, k, v = block.self_attn.heads(block.input_layernorm(x))
            q, k = (torch.ops.fusegen.rope(y, gpt.cos, gpt.sin, at) for y in (q, k))
            torch.ops.fusegen.kv_append(k, v, keys, values, positions)
            y = torch.ops.fusegen.attention_decode(q, keys, values, positions + n)
            x = x + block.self_attn.o_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        x = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2]))
        return F.linear(gpt.norm(x), gpt.embed_tokens.weight)[:, 0]
