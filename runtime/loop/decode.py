"""The decoding loop: a prompt's tokens into the caches, then one token at a time, sampled inside the planned graph.

What the loop runs is a program with the inputs ``tokens`` (B, n) int64, ``positions`` (B,) int64, ``last`` (B,) int64
and then the caches it writes in place, and one output, the logits (B, V) of row ``last``.  :func:`with_sampler` puts
the sampler behind it.  A :class:`Lane` holds the memory of B requests: for a prompt the program is captured for one
sequence of 8 or of 64 tokens, for decoding for B sequences of one token, all on the same weights.  Nothing grows and
nothing is captured again while tokens come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.engine import Pinned, Session
from fusegen.runtime.program import Node, Program, Ref, TensorSpec
from fusegen.runtime.read.operators import complete, resolve

CHUNKS = (8, 64)  # tokens of a prompt taken at once; the last ones are padded to one of these
SAMPLER = "fusegen.sample_token.default"
FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
WHOLE = ("seeds", "top_k")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: the options of the op ``sample_token``, one request's.

    ``temperature`` 0 is greedy.  ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep all; ``repetition`` 1, ``frequency`` 0
    and ``presence`` 0 penalise nothing, else the last ``window`` tokens, those of the prompt among them.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    window: int = 64


@dataclass(frozen=True)
class Continuation:
    """A prompt to go on from: its tokens (at least one), how, from which seed, for at most so many tokens.

    ``first``: what may be drawn as the first token; empty for all that may be drawn later.
    """

    tokens: Sequence[int]
    sampling: Sampling
    seed: int
    most: int
    first: Sequence[int] = ()


def with_sampler(program: Program, context: int) -> Program:
    """``program`` and the sampler behind its logits: outputs (token (B,) int64, log-probability (B,), logits).

    New inputs, all (B,): ``seeds``, ``top_k`` int64, and float32 ones; ``history`` (B, context) int64, -1 where
    empty; ``allowed`` (V,) bool: what may be drawn.
    """
    (logits,) = program.outputs
    batch, vocabulary = program.specs[logits].shape
    given: dict[str, TensorSpec] = {name: TensorSpec((batch,), torch.int64) for name in WHOLE}
    given |= {name: TensorSpec((batch,), torch.float32) for name in FLOATS}
    given["history"] = TensorSpec((batch, context), torch.int64)
    given["allowed"] = TensorSpec((vocabulary,), torch.bool)
    refs: dict[str, Any] = {name: Ref(name) for name in given if name != "allowed"}
    refs |= {"logits": Ref(logits), "positions": Ref("positions"), "mask": Ref("allowed")}
    made = ("token", "logprob", "sampler.tokens", "sampler.logprobs")
    node = Node("sample_token", SAMPLER, complete(resolve(SAMPLER), refs, "sample_token"), made)
    kinds = (torch.int64, torch.float32)  # of a token and of its log-probability
    one, top = [TensorSpec((batch,), k) for k in kinds], [TensorSpec((batch, 0), k) for k in kinds]
    specs = dict(zip(made, (*one, *top), strict=True))
    return replace(
        program,
        nodes=(*program.nodes, node),
        inputs={**program.inputs, **given},
        outputs=("token", "logprob", logits),
        specs={**program.specs, **specs},
    )


class Lane:
    """The memory of a batch of requests, and the program captured on it: :meth:`begin` a row, then :meth:`step`.

    ``allowed``: (V,) bool.  A row's tokens depend on its own request alone: prompts go in one by one, in chunks that
    depend on their lengths, and a session that is compiled ``deterministic`` keeps rows apart.
    """

    def __init__(self, session: Session, batch: int, context: int, allowed: Tensor):
        self.session, self.batch, self.context = session, batch, context
        device = session.backend.device
        self.caches = session.zeros({"batch": batch})
        self.rows = {"positions": torch.zeros(batch, dtype=torch.int64, device=device)}
        self.rows |= {k: torch.zeros(batch, dtype=torch.int64, device=device) for k in ("last", *WHOLE)}
        self.rows |= {k: torch.zeros(batch, device=device) for k in FLOATS}
        self.rows["history"] = torch.full((batch, context), -1, dtype=torch.int64, device=device)
        self.usual, self.allowed = allowed.to(device), allowed.to(device, copy=True)
        self.moving = torch.zeros(batch, dtype=torch.int64, device=device)  # 1 where a row goes on
        self.windows = torch.ones(batch, dtype=torch.int64, device=device)
        self.tokens: dict[int, Tensor] = {}
        self.forms: dict[int, Pinned] = {}

    def form(self, length: int) -> Pinned:
        """The program captured for ``length`` tokens a row."""
        if length not in self.forms:
            shape = (self.batch, length)
            self.tokens[length] = torch.zeros(shape, dtype=torch.int64, device=self.session.backend.device)
            inputs = {**self.rows, **self.caches, "tokens": self.tokens[length], "allowed": self.allowed}
            self.forms[length] = self.session.pinned({k: inputs[k] for k in self.session.program.inputs})
        return self.forms[length]

    def begin(self, row: int, request: Continuation, one: Lane) -> int:
        """Take a prompt into the caches of ``row``, by way of the lane ``one`` of a single request (this one, where
        it is such); returns the first token after it."""
        one._ask(0, request)
        token = one._prefill(request.tokens, request.first)
        if one is not self:
            self._ask(row, request)
            for mine, filled in zip(self.caches.values(), one.caches.values(), strict=True):
                mine[row].copy_(filled[0])
        self._take(row, len(request.tokens), token)
        return token

    def _ask(self, row: int, request: Continuation) -> None:
        """Write what a request asks into the sampler's inputs."""
        sampling, rows = request.sampling, self.rows
        for name in (*FLOATS, "top_k"):
            rows[name][row] = getattr(sampling, name)
        rows["seeds"][row] = request.seed
        rows["history"][row] = -1
        self.windows[row] = window = max(1, min(sampling.window, self.context))
        seen = torch.tensor(request.tokens[-window:], device=self.moving.device)
        place = torch.arange(len(request.tokens) - len(seen), len(request.tokens), device=seen.device) % window
        rows["history"][row, place] = seen

    def _prefill(self, tokens: Sequence[int], first: Sequence[int]) -> int:
        at = 0
        out = None
        if first:
            self.allowed.fill_(False)[list(first)] = True
        while at < len(tokens):
            part = tokens[at : at + CHUNKS[-1]]
            length = next(c for c in CHUNKS if c >= len(part))
            run = self.form(length)
            self.tokens[length][0] = torch.tensor([*part, *[0] * (length - len(part))])
            self.rows["positions"][0] = at
            self.rows["last"][0] = len(part) - 1
            out = run()
            at += len(part)
        assert out is not None
        token = int(out[0])
        self.rows["last"][0] = 0
        self.allowed.copy_(self.usual)
        return token

    def _take(self, row: int, position: int, token: int) -> None:
        """Make ``token``, which stands at ``position``, what the next step is fed."""
        self.form(1)
        self.tokens[1][row, 0] = token
        self.rows["positions"][row] = position
        self.rows["history"][row, position % int(self.windows[row])] = token
        self.moving[row] = 1

    def step(self) -> list[int]:
        """One token more of every row; what a row that was stopped gives means nothing."""
        rows, fed = self.rows, self.tokens[1]
        token: Tensor = self.form(1)()[0]
        tokens: list[int] = token.tolist()
        fed[:, 0] = token.clamp(min=0)
        rows["positions"].add_(self.moving)
        place = rows["positions"].remainder(self.windows)
        rows["history"].scatter_(1, place[:, None], fed)
        return tokens


class Decoder:
    """Runs requests on one session, each batch in a lane of its own; lanes are used again.

    ``forbidden``: tokens that are never drawn; ``ends``: tokens that end a text, and are not part of it.
    """

    SPARE = 4  # lanes kept when they are free

    def __init__(self, session: Session, context: int, forbidden: Sequence[int], ends: Sequence[int]):
        self.session, self.context, self.ends = session, context, frozenset(ends)
        self.allowed = torch.ones(int(session.program.inputs["allowed"].shape[0]), dtype=torch.bool)
        self.allowed[list(forbidden)] = False
        self.spare: list[Lane] = []

    def take(self, batch: int) -> Lane:
        """A lane for ``batch`` requests, the caller's until :meth:`give`."""
        for lane in self.spare[::-1]:
            if lane.batch == batch:
                try:
                    self.spare.remove(lane)
                except ValueError:  # another thread took it
                    continue
                return lane
        return Lane(self.session, batch, self.context, self.allowed)

    def give(self, lane: Lane) -> None:
        """Give a lane back."""
        self.spare = [*self.spare, lane][-self.SPARE :]


class Running:
    """Requests under way: :meth:`next` gives each one's next token, :meth:`finish` ends one before its time.

    :meth:`close` gives the lane back, and must be called.
    """

    def __init__(self, decoder: Decoder, requests: Sequence[Continuation]):
        self.decoder, self.requests = decoder, requests
        self.lane: Lane | None = decoder.take(len(requests))
        self.given = [0] * len(requests)
        self.going = {row for row, r in enumerate(requests) if r.most > 0}

    def next(self) -> dict[int, int]:
        """Row -> its next token, of those that go on; a row that ends with this call may have none."""
        assert self.lane is not None
        rows = sorted(self.going)
        if any(self.given):
            tokens = self.lane.step()
            made = {row: tokens[row] for row in rows}
        else:
            made = self._begin(self.lane, rows)
        for row, token in list(made.items()):
            self.given[row] += 1
            ended = token < 0 or token in self.decoder.ends
            if ended:
                del made[row]
            if ended or self.given[row] >= self.requests[row].most:
                self.finish(row)
        return made

    def _begin(self, lane: Lane, rows: Sequence[int]) -> dict[int, int]:
        if lane.batch == 1:
            return {row: lane.begin(row, self.requests[row], lane) for row in rows}
        one = self.decoder.take(1)
        try:
            return {row: lane.begin(row, self.requests[row], one) for row in rows}
        finally:
            self.decoder.give(one)

    def finish(self, row: int) -> None:
        """End a request."""
        self.going.discard(row)
        if self.lane is not None:
            self.lane.moving[row] = 0

    def close(self) -> None:
        """Give the lane back."""
        if self.lane is not None:
            self.lane.moving.zero_()
            self.decoder.give(self.lane)
            self.lane = None
