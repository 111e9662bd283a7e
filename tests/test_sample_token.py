"""sample_token against transformers' processors, the laws of chance, and its own promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peers import transformers
from scipy import stats
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels import sample_token as op
from fusegen.kernels.cpu import library
from fusegen.kernels.op import pick

V = 1543  # prime
NAMES = op.Arguments._fields


def _sample(logits: Tensor, seed: int = 1, **given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = logits.shape[0]
    given = {"seeds": torch.full((batch,), seed), "positions": torch.arange(batch)} | given
    made: tuple[Tensor, Tensor, Tensor, Tensor] = registry.run(op.OP, tuple(op.Arguments(logits=logits, **given)))
    return made


def _logits(batch: int = 4, vocabulary: int = V, seed: int = 0) -> Tensor:
    return 2.5 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(seed))


def _all(batch: int, value: float) -> Tensor:
    return torch.full((batch,), value)


def _kept(logits: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """(which tokens can be drawn (B, V), their log-probabilities, -inf elsewhere), by asking for all of them."""
    _, _, ids, logprobs = _sample(logits, top=logits.shape[1], **given)
    table = torch.full(logits.shape, -torch.inf)
    for b in range(logits.shape[0]):
        there = ids[b] >= 0
        table[b, ids[b][there]] = logprobs[b][there]
    return table > -torch.inf, table


def _processed(processor: Any, scores: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out = processor(torch.zeros(len(scores), 1, dtype=torch.int64) if ids is None else ids, scores.double().clone())
    return out > -torch.inf, out.log_softmax(-1)


def _agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert (ours[1] - theirs[1])[theirs[0]].abs().max() < 2e-5


@pytest.mark.parametrize(
    ("name", "option", "ours", "value"),
    [
        *(("TopKLogitsWarper", "top_k", "top_k", k) for k in (1, 7, 50, V - 1, V, 5 * V)),
        *(("TopPLogitsWarper", "top_p", "top_p", p) for p in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0)),
        *(("MinPLogitsWarper", "min_p", "min_p", p) for p in (0.0, 0.01, 0.2, 1.0)),
        *(("TypicalLogitsWarper", "mass", "typical_p", p) for p in (0.05, 0.2, 0.5, 0.95)),
    ],
)
def test_truncation_keeps_what_transformers_keeps(name: str, option: str, ours: str, value: float) -> None:
    logits = _logits()
    warper = getattr(transformers(), name)(**{option: value})
    _agree(_kept(logits, **{ours: _all(4, value)}), _processed(warper, logits))


def test_the_whole_chain_in_transformers_order() -> None:
    tf = transformers()
    logits, history = _logits(3), torch.randint(0, V, (3, 40), generator=torch.Generator().manual_seed(5))
    chain = tf.LogitsProcessorList()
    chain += [tf.RepetitionPenaltyLogitsProcessor(1.3), tf.TemperatureLogitsWarper(0.7), tf.TopKLogitsWarper(60)]
    chain += [tf.TopPLogitsWarper(0.9), tf.MinPLogitsWarper(0.02), tf.TypicalLogitsWarper(0.8)]
    given: dict[str, Any] = {"repetition": 1.3, "temperature": 0.7, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8}
    given = {name: _all(3, value) for name, value in given.items()} | {"top_k": torch.full((3,), 60)}
    _agree(_kept(logits, history=history, **given), _processed(chain, logits, history))


def test_frequency_and_presence_are_openai_s() -> None:
    """mu[j] - c[j] alpha_frequency - (c[j] > 0) alpha_presence, over what was generated, the prompt left out."""
    logits, history = _logits(1, 50), torch.tensor([[3, 3, 9, 9, 9, 4, 77, -1, 9]])
    given = {"prompt_lengths": torch.tensor([2]), "history_lengths": torch.tensor([8])}
    _, table = _kept(logits, history=history, frequency=_all(1, 0.4), presence=_all(1, 0.9), **given)
    mu = logits[0].clone()
    mu[9] -= 3 * 0.4 + 0.9
    mu[4] -= 0.4 + 0.9
    assert (table[0] - mu.log_softmax(0)).abs().max() < 1e-5


def test_bias_mask_and_model_probabilities() -> None:
    logits, bias = _logits(2, 70), torch.zeros(70)
    bias[5] = 2.0
    allowed = torch.ones(2, 70, dtype=torch.bool)
    allowed[0, 10:40] = False
    words = torch.zeros(2, 3, dtype=torch.int64)
    for i in range(70):
        words[:, i // 32] |= allowed[:, i].long() << (i % 32)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    pairs = {"bias_ids": torch.tensor([5, 20, 69]), "bias_values": torch.tensor([1.0, 50.0, -torch.inf])}
    want = (logits + bias).masked_fill(~allowed, -torch.inf)
    want[:, 5] += 1.0
    want[1, 20] += 50.0
    want[:, 69] = -torch.inf
    for mask in (allowed, words):
        kept, table = _kept(logits, bias=bias, mask=mask, **pairs)
        assert torch.equal(kept, want > -torch.inf)
        assert (table - want.log_softmax(-1))[kept].abs().max() < 1e-5
    token, logprob, ids, logprobs = _sample(logits, mask=allowed, top=5, model=True)
    given = logits.log_softmax(-1)
    assert torch.equal(ids, given.topk(5).indices) and (logprobs - given.topk(5).values).abs().max() < 1e-5
    assert (logprob - given.gather(1, token[:, None])[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("given", [{}, {"top_p": 0.8}, {"typical_p": 0.7, "temperature": 1.7}, {"min_p": 0.05}])
def test_draws_follow_the_distribution(given: dict[str, float]) -> None:
    """20,000 positions of one row: Pearson's chi-square of the counts against the stated probabilities."""
    count = 20_000
    row = _logits(1, 97, seed=3) / 2
    logits = row.expand(count, -1).contiguous()
    options = {name: _all(count, value) for name, value in given.items()}
    tokens, logprobs, *_ = _sample(logits, seed=9, **options)
    kept, table = _kept(row, **{name: value[:1] for name, value in options.items()})
    assert torch.equal(logprobs, table[0][tokens])
    p = table[0].double().exp().numpy()
    assert abs(p.sum() - 1) < 1e-5
    seen = np.bincount(tokens.numpy(), minlength=97)
    assert seen[~kept[0].numpy()].sum() == 0
    often = p * count >= 5
    rare = np.array([seen[~often].sum(), p[~often].sum() * count])
    observed, expected = np.append(seen[often], rare[0]), np.append(p[often] * count, rare[1])
    keep = expected > 0
    expected = expected[keep] / expected[keep].sum() * observed.sum()
    assert stats.chisquare(observed[keep], expected).pvalue > 1e-3


def test_seed_request_and_position_each_change_the_draw() -> None:
    logits = _logits(1).expand(400, -1).contiguous()
    zero, count = torch.zeros(400, dtype=torch.int64), torch.arange(400)
    draws = [
        _sample(logits, seeds=seeds, positions=positions, requests=requests)[0]
        for seeds, requests, positions in (
            (count, zero, zero),
            (zero, count, zero),
            (zero, zero, count),
            (zero, zero, zero),
        )
    ]
    assert all(len(set(d.tolist())) > 60 for d in draws[:3]) and len(set(draws[3].tolist())) == 1
    assert not any(torch.equal(draws[i], draws[j]) for i in range(3) for j in range(i))
    high = _sample(logits, seeds=zero, positions=zero, requests=count << 32)[0]
    assert len(set(high.tolist())) > 60  # all 64 bits of a request count


@pytest.mark.skipif(not library.available(), reason=library.missing() or "")
@pytest.mark.parametrize("vocabulary", [1, 2, 1023, 1024, 1025, 4099])
def test_every_level_draws_the_reference_s_token(vocabulary: int) -> None:
    logits = _logits(24, vocabulary, seed=vocabulary).bfloat16()
    given: dict[str, Any] = {"temperature": _all(24, 0.9), "top_p": torch.linspace(0, 1, 24)}
    given |= {"typical_p": torch.linspace(1, 0.1, 24), "top_k": torch.arange(24) * 9}
    args = tuple(op.Arguments(logits, torch.arange(24) * 2**40, torch.arange(24) - 5, **given))
    want = op.reference(*args)[0]
    for level in library.levels():
        with library.forced(level):
            assert torch.equal(registry.run(op.OP, args)[0], want), level


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 70)
    logits[1, [40, 41, 69]] = 2.0
    logits[2] = -torch.inf
    logits[2, 33] = -1e30
    for temperature in (0.0, -1.0, math.nan, 1e-44):
        token, logprob, *_ = _sample(logits, temperature=_all(3, temperature))
        assert token.tolist() == [0, 40, 33] and logprob.tolist() == [0.0, 0.0, 0.0]


def test_logits_that_are_no_numbers() -> None:
    logits = _logits(4, 40)
    logits[0], logits[1] = math.nan, -torch.inf
    logits[2, 3:6], logits[3, ::2] = torch.inf, math.nan
    for options in ({}, {"temperature": _all(4, 0.0)}, {"top_p": _all(4, 0.5), "temperature": _all(4, 1e30)}):
        token, logprob, ids, logprobs = _sample(logits, top=2, **options)
        assert token[:2].tolist() == [-1, -1] and logprob[:2].tolist() == [-torch.inf, -torch.inf]
        assert bool((ids[:2] == -1).all()) and bool((logprobs[:2] == -torch.inf).all())
        assert int(token[2]) in (3, 4, 5) and int(token[3]) % 2 == 1 and bool(logprob[2:].isfinite().all())


def test_ties_at_a_threshold_stay_together() -> None:
    logits = torch.zeros(1, 50)
    logits[0, :3] = 5.0
    for options in ({"top_k": torch.tensor([2])}, {"top_p": _all(1, 0.0)}, {"min_p": _all(1, 1.0)}):
        assert _kept(logits, **options)[0][0].nonzero().flatten().tolist() == [0, 1, 2]


def test_the_mean_over_an_infinite_temperature_is_uniform() -> None:
    _, table = _kept(_logits(1, 64), temperature=_all(1, math.inf))
    assert (table + math.log(64)).abs().max() < 1e-6


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    logits = _logits(2, 30)
    for given, message in (
        ({"top_p": torch.ones(3)}, "top_p"),
        ({"top_k": torch.ones(2)}, "top_k is torch.float32"),
        ({"mask": torch.ones(2, 29, dtype=torch.bool)}, "mask"),
        ({"repetition": torch.ones(2)}, "history is None"),
        ({"bias_ids": torch.zeros(3, dtype=torch.int64)}, "bias_ids and bias_values"),
        ({"top": -1}, "top is -1"),
    ):
        with pytest.raises(ValueError, match=f"sample_token: .*{message}"):
            _sample(logits, **given)
    with pytest.raises(ValueError, match="logits"):
        _sample(torch.zeros(2, 0))
    wide = tuple(op.Arguments(logits[:, ::2], torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)))
    assert all("strided" in d.reason for d in pick(op.OP, "cpu", wide).declined)
