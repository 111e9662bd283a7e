"""Benchmark text models: tokens a second, the time to a first token, and from a cold process to the first text.

The peers are the same network in eager PyTorch with a static key-value cache, written as one would write it, and the
same compiled.  All write greedily, the same number of tokens; the gate compares the logits of every token of a given
text, and in float32 the tokens too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.bench import verify, whole
from fusegen.bench.row import Row
from fusegen.kernels.op import Tolerance
from fusegen.models import bundled
from fusegen.models.gpt import GPT, GPTConfig, turn
from fusegen.models.load import locate
from fusegen.models.text_generation import TextGeneration
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.derived import values
from fusegen.runtime.loop.decode import Continuation, Decoder, Running, Sampling

MODEL, TOKENS = "pycode", 64
PROMPT = "def read_json(path):\n"
TEXT = PROMPT + '    """Read a file."""\n    with open(path) as file:\n        return json.load(file)\n\n\n' * 3
STEADY = {"64 tokens": 1, "64 tokens, batch 4": 4}
FIRST, COLD = "first token after 200", "first text of a process"
# Of logits against eager float32: bfloat16 rounds every activation.
BOUNDS = {"float32": Tolerance(1e-4, 1e-3), "bfloat16": Tolerance(5e-2, 2e-1)}


@functools.cache
def _bundle() -> Bundle:
    return Bundle.open(locate(MODEL))


@functools.cache
def ids(text: str) -> list[int]:
    """A prompt's tokens, without the model."""
    tok = bundled.tokenizer(_bundle())
    begin = tok.token_to_id(_bundle().manifest.loop["begin"])
    assert begin is not None
    return [begin, *tok.encode(text, add_special_tokens=False).ids]


def network() -> GPT:
    """The network of the bundle, for eager PyTorch."""
    program = _bundle().program("decoder")
    weights = {k.removeprefix("gpt."): v for k, v in values(program.weights).items() if k.startswith("gpt.")}
    kv_heads, context, head_dim = (int(n) for n in program.inputs["caches_0"].shape[1:])
    vocabulary, width = weights["embed_tokens.weight"].shape
    made = GPT(
        GPTConfig(
            vocabulary,
            context=context,
            width=width,
            layers=sum(k.startswith("caches_") for k in program.inputs) // 2,
            heads=weights["layers.0.self_attn.q_proj.weight"].shape[0] // head_dim,
            kv_heads=kv_heads,
            hidden=weights["layers.0.mlp.up_proj.weight"].shape[0],
        )
    )
    own = made.state_dict()
    made.load_state_dict({k: weights[k] for k in own})
    return made.eval().requires_grad_(False)


class Eager:
    """The network with a static cache: a prompt at once, then a token at a time, the likeliest."""

    def __init__(self, dtype: torch.dtype, compiled: bool):
        self.gpt = network()
        cos, sin = self.gpt.cos, self.gpt.sin
        self.gpt.to(dtype)
        self.gpt.cos, self.gpt.sin = cos, sin  # float32, whatever the network's dtype
        self.forward = torch.compile(self._forward, dynamic=False) if compiled else self._forward
        self.compiled, self.dtype = compiled, dtype
        self.caches: dict[int, list[Tensor]] = {}

    def cache(self, batch: int) -> list[Tensor]:
        """The cache of a batch, made once."""
        cfg = self.gpt.cfg
        shape = (batch, cfg.kv_heads, cfg.context, cfg.head_dim)
        return self.caches.setdefault(batch, [torch.zeros(shape, dtype=self.dtype) for _ in range(2 * cfg.layers)])

    def _forward(self, tokens: Tensor, at: Tensor, keep: Tensor | None, caches: list[Tensor]) -> Tensor:
        """Logits of the last of ``tokens`` (B, n), which stand at ``at`` (n,).  With ``keep`` (n, context) the shapes
        do not depend on the position; without, attention reads what the cache holds and no more."""
        gpt, n = self.gpt, tokens.shape[1]
        x = gpt.embed_tokens(tokens)
        cos, sin = gpt.cos[at], gpt.sin[at]
        for block, key_cache, value_cache in zip(gpt.blocks(), caches[::2], caches[1::2], strict=True):
            q, k, v = block.self_attn.heads(block.input_layernorm(x))
            q, k = turn(q, cos, sin), turn(k, cos, sin)
            key_cache.index_copy_(2, at, k), value_cache.index_copy_(2, at, v)
            keys, past = key_cache, value_cache
            if keep is None:
                end = int(at[-1]) + 1
                keys, past = keys[:, :, :end], past[:, :, :end]
            y = F.scaled_dot_product_attention(q, keys, past, attn_mask=keep, is_causal=keep is None and n > 1,
                                               enable_gqa=True)  # fmt: skip
            x = x + block.self_attn.o_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return F.linear(gpt.norm(x[:, -1]), gpt.embed_tokens.weight)

    def logits(self, tokens: Tensor, start: int) -> Tensor:
        """Logits (B, vocabulary) after ``tokens`` (B, n), the first of which stands at ``start``."""
        at = torch.arange(start, start + tokens.shape[1])
        keep = torch.arange(self.gpt.cfg.context) <= at[:, None] if self.compiled else None
        return self.forward(tokens, at, keep, self.cache(tokens.shape[0]))

    @torch.inference_mode()
    def write(self, prompt: Sequence[int], batch: int, count: int) -> list[list[int]]:
        """``count`` tokens after ``prompt``, ``batch`` times at once."""
        token = self.logits(torch.tensor([list(prompt)] * batch), 0).argmax(-1)
        out = [token]
        for at in range(len(prompt), len(prompt) + count - 1):
            token = self.logits(token[:, None], at).argmax(-1)
            out.append(token)
        return [list(map(int, row)) for row in torch.stack(out, 1)]

    @torch.inference_mode()
    def follow(self, tokens: Sequence[int]) -> Tensor:
        """Logits (n, vocabulary) after each of ``tokens``, the first eight at once, then one by one."""
        rows = [self.logits(torch.tensor([tokens[:8]]), 0)]
        rows += [self.logits(torch.tensor([[t]]), at) for at, t in enumerate(tokens[8:], 8)]
        return torch.cat(rows).float()


class Fusegen:
    """The same through the runtime."""

    def __init__(self, model: TextGeneration):
        self.loop = Decoder(model.decoder, model.text.context, (), ())  # no token ends a text: equal work for all

    def write(self, prompt: Sequence[int], batch: int, count: int) -> list[list[int]]:
        """As :meth:`Eager.write`."""
        running = Running(self.loop, [Continuation(prompt, Sampling(temperature=0.0), 0, count)] * batch)
        out: list[list[int]] = [[] for _ in range(batch)]
        while running.going:
            for row, token in running.next().items():
                out[row].append(token)
        running.close()
        return out

    def follow(self, tokens: Sequence[int]) -> Tensor:
        """As :meth:`Eager.follow`."""
        lane = self.loop.take(1)
        rows = []
        for at, part in [(0, tokens[:8]), *((i, [t]) for i, t in enumerate(tokens[8:], 8))]:
            run = lane.form(len(part))
            lane.tokens[len(part)][0] = torch.tensor(part)
            lane.rows["positions"][0], lane.rows["last"][0] = at, len(part) - 1
            rows.append(run()[2].clone())
        lane.rows["last"][0] = 0
        self.loop.give(lane)
        return torch.cat(rows).float()


def contender(name: str, dtype: str) -> Eager | Fusegen:
    """Who writes, by name."""
    import fusegen

    if name == "fusegen":
        return Fusegen(fusegen.load(MODEL, dtype=dtype))
    return Eager(getattr(torch, dtype), name == "compile")


def pycode(who: Sequence[str], dtypes: Sequence[str], cases: Sequence[str], seconds: float) -> Iterator[list[Row]]:
    """The Python model; yields the rows of each dtype and case as they are measured."""
    for dtype in dtypes or ("float32", "bfloat16"):
        warm = [c for c in cases if c != COLD]
        made = {name: contender(name, dtype) for name in who or whole.WHO} if warm else {}
        verdicts = _verdicts(made, dtype) if made else {}
        for case in warm:
            yield _steady(made, verdicts, dtype, case, seconds)
        if COLD in cases:
            yield whole.cold(MODEL, COLD, "fusegen.bench.text_models", who or whole.WHO, dtype)


def _verdicts(made: dict[str, Any], dtype: str) -> dict[str, verify.Verdict]:
    """Whether each contender gives the logits of eager float32 for a given text, and in float32 its greedy tokens."""
    oracle, text, prompt = contender("eager", "float32"), ids(TEXT), ids(PROMPT)
    expected, tokens = oracle.follow(text), oracle.write(prompt, 2, TOKENS)
    out = {}
    for name, one in made.items():
        verdict = verify.check([one.follow(text)], [expected], BOUNDS[dtype])
        same = dtype != "float32" or one.write(prompt, 2, TOKENS) == tokens
        out[name] = replace(verdict, ok=verdict.ok and same)
    return out


def _steady(
    made: dict[str, Any], verdicts: dict[str, verify.Verdict], dtype: str, case: str, seconds: float
) -> list[Row]:
    prompt, count = (ids(PROMPT), TOKENS) if case in STEADY else (ids(TEXT * 4)[:200], 1)
    batch = STEADY.get(case, 1)
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(one.write, prompt, batch, count) for name, one in made.items() if verdicts[name].ok
    }
    for call in calls.values():
        call(), call()
    rows = {name: whole.gated(MODEL, case, name, dtype, verdicts[name]) for name in made}
    return whole.timed(rows, calls, seconds, lambda t: {"tokens_per_second": batch * count / t})


PYCODE = whole.Suite((*STEADY, FIRST, COLD), pycode)

if __name__ == "__main__":
    whole.say({"tokens": contender(*sys.argv[1:]).write(ids(PROMPT), 1, 16)})
