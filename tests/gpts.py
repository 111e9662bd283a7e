"""A small language model with random weights: its network, its program, its bundle; shared by the tests of text."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusegen.models.gpt import GPT, GPTConfig
from fusegen.models.zoo.pycode import data, export
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.program import Program

TEXTS = ["def add(a, b):\n    return a + b\n\n\nclass Café:\n    naïve = '日本 👋🏽'\n"] * 3


@functools.cache
def tokenizer_json() -> str:
    """A byte-level tokenizer of 300 tokens."""
    return str(data.tokenizer(TEXTS, 300).to_str())


def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json())


@functools.cache
def gpt() -> GPT:
    """Two layers, four heads on two of keys and values, weights large enough for tokens to differ."""
    torch.manual_seed(0)
    made = GPT(GPTConfig(300, context=128, width=64, layers=2, heads=4, kv_heads=2, hidden=96)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * (0.25 if p.dim() == 2 else 0.1) + (p.dim() == 1))
    return made.requires_grad_(False)


@functools.cache
def program() -> Program:
    """:func:`gpt` as it is exported."""
    return export.decoder(gpt())


def bundle(folder: Path) -> Path:
    """The model as a file, its weights as they are."""
    loop = {"context": gpt().cfg.context, **export.TOKENS}
    manifest = Manifest(name="tiny", family="text-generation", loop=loop, sampler={"max_tokens": 20})
    Bundle.write(folder / "tiny.fg", manifest, {"decoder": program()}, {"tokenizer.json": tokenizer_json().encode()})
    return folder / "tiny.fg"


def greedy(prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt, the whole network run for each."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        logits: Tensor = gpt()(tokens)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return [int(t) for t in tokens[0, len(prompt) :]]
