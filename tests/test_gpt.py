"""The transformer against transformers' Llama with the same weights, whole and as the decoder that is exported."""

from __future__ import annotations

from typing import Any

import gpts
import peers
import pytest
import torch
from networks import relative
from torch import Tensor

from fusegen.runtime.api import compile
from fusegen.runtime.errors import GraphError, RequestError


@pytest.fixture(scope="module")
def llama() -> Any:
    """The oracle: LlamaForCausalLM with the weights of ``gpts.gpt``."""
    cfg, transformers = gpts.gpt().cfg, peers.transformers()
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocabulary, hidden_size=cfg.width, intermediate_size=cfg.hidden, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, max_position_embeddings=cfg.context,
        rms_norm_eps=cfg.epsilon, rope_theta=cfg.base, tie_word_embeddings=True, attention_bias=False,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = made.model.load_state_dict(gpts.gpt().state_dict(), strict=False)
    assert not missing and not unexpected
    made.tie_weights()
    return made


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_logits_are_those_of_llama(llama: Any) -> None:
    x = tokens(2, 50)
    with torch.no_grad():
        assert relative(gpts.gpt()(x), llama(x).logits) <= 2e-6


@pytest.mark.parametrize(
    ("backend", "dtype", "bound"), [("eager", None, 3e-6), ("cpu", None, 3e-6), ("cpu", "bfloat16", 4e-2)]
)
def test_the_decoder_gives_the_logits_of_llama(llama: Any, backend: str, dtype: str | None, bound: float) -> None:
    """A prompt in padded chunks, then token by token, over caches that are written in place."""
    session = compile(gpts.program(), backend=backend, dtype=dtype)
    x, caches = tokens(2, 30), session.zeros({"batch": 2}).values()
    with torch.no_grad():
        want = llama(x).logits
    first = torch.cat([x[:, :13], torch.zeros(2, 3, dtype=torch.int64)], 1)
    assert relative(session(first, torch.zeros(2).long(), torch.full((2,), 12), *caches), want[:, 12]) <= bound
    for at in range(13, 30):
        got = session(x[:, at : at + 1], torch.full((2,), at), torch.zeros(2).long(), *caches)
        assert relative(got, want[:, at]) <= bound, at


def test_greedy_tokens_are_those_of_transformers(llama: Any) -> None:
    x = tokens(1, 9, seed=3)
    out = llama.generate(x, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert gpts.greedy(x[0].tolist(), 40) == out[0, 9:].tolist()


def test_pinned_inputs_are_read_and_written_where_they_lie() -> None:
    session = compile(gpts.program(), deterministic=True)
    x, caches = tokens(1, 12), session.zeros({"batch": 1})
    token, position, last = torch.zeros(1, 1).long(), torch.zeros(1).long(), torch.zeros(1).long()
    pinned = session.pinned({"tokens": token, "positions": position, "last": last, **caches})
    before = {name: cache.data_ptr() for name, cache in caches.items()}
    with torch.no_grad():
        want = gpts.gpt()(x)
    for at in range(12):
        token[0, 0], position[0] = x[0, at], at
        assert relative(pinned(), want[:, at]) <= 3e-6
    assert before == {name: cache.data_ptr() for name, cache in caches.items()}
    assert all(bool((cache[:, :, :12] != 0).any()) and not bool(cache[:, :, 12:].any()) for cache in caches.values())


def test_a_program_says_what_it_writes() -> None:
    session = compile(gpts.program(), dtype="bfloat16")
    assert list(session.state) == [f"caches_{i}" for i in range(4)]
    assert session.program.inputs["caches_0"].dtype == torch.bfloat16, "the caches are in the compute dtype"
    caches = session.zeros({"batch": 2})
    assert {tuple(c.shape) for c in caches.values()} == {(2, 2, 128, 16)}
    strided = {k: torch.zeros(2, 128, 2, 16, dtype=torch.bfloat16).transpose(1, 2) for k in caches}
    with pytest.raises(RequestError, match=r"'caches_0' is used where it lies.*contiguous"):
        session(tokens(2, 1), torch.zeros(2).long(), torch.zeros(2).long(), *strided.values())


def test_a_token_after_the_context_is_dropped_and_a_wrong_shape_is_one_line() -> None:
    session = compile(gpts.program(), deterministic=True)
    caches = session.zeros({"batch": 1})
    session(tokens(1, 1), torch.tensor([128]), torch.zeros(1).long(), *caches.values())
    assert not any(bool(c.any()) for c in caches.values())
    with pytest.raises(RequestError, match="n from 1 to 64"):
        session(tokens(1, 65), torch.zeros(1).long(), torch.zeros(1).long(), *caches.values())


def test_a_module_may_write_only_to_its_inputs() -> None:
    class Buffer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(1, 1, 4, 8))

        def forward(self, k: Tensor, positions: Tensor) -> Tensor:
            torch.ops.fusegen.kv_append(k, k, self.cache, self.cache.clone(), positions)
            return torch.ops.fusegen.attention_decode(k, self.cache, self.cache, positions + 1)

    from fusegen.runtime.api import capture

    with pytest.raises(GraphError, match="writes to 'k_cache', which is no input"):
        capture(Buffer(), (torch.zeros(1, 1, 1, 8), torch.zeros(1).long()))
