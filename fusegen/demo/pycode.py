"""Text that goes on from a prompt."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING

import fusegen
from fusegen.demo.beside import Beside, compare, say, show_plan

if TYPE_CHECKING:
    from fusegen.models.text_generation import TextGeneration

MODEL = "pycode"
PROMPT, TOKENS = "def read_json(path):\n", 64
SECONDS = 3.0  # about how long each side is timed


def show() -> list[Beside]:
    """Write a text, then as much as is compared."""
    say(f"{MODEL}: Python that goes on from a prompt")
    start = time.perf_counter()
    model: TextGeneration = fusegen.load(MODEL)
    print(f"   loaded in {time.perf_counter() - start:.1f} s")
    start, pieces, first = time.perf_counter(), [], 0.0
    for piece in model.stream(PROMPT, max_tokens=TOKENS, temperature=0.0):
        first = first or time.perf_counter() - start
        pieces.append(piece)
    seconds = time.perf_counter() - start
    print(textwrap.indent(PROMPT + "".join(pieces).rstrip(), "   | ", lambda _: True))
    print(f"   the first token after {first:.2f} s, with planning; {TOKENS} at most, greedy, in {seconds:.2f} s")
    lane = model.loop.take(1)
    show_plan(lane.form(1).capture.plan, "a decoding step")
    model.loop.give(lane)
    return [beside(model)]


def beside(model: TextGeneration) -> Beside:
    """The same network in eager PyTorch, in the same dtype, with a static cache."""
    from fusegen.bench import text_models, verify

    dtype = str(model.dtype).removeprefix("torch.")
    say(f"{MODEL} beside eager PyTorch: {TOKENS} tokens a call, each side's logits of a given text compared")
    both = {"eager": text_models.contender("eager", dtype), "fusegen": text_models.Fusegen(model)}
    text, prompt = text_models.ids(text_models.TEXT), text_models.ids(PROMPT)
    bound = text_models.BOUNDS[dtype]
    verdict = verify.check([both["fusegen"].follow(text)], [both["eager"].follow(text)], bound)
    calls = {name: (lambda one=one: one.write(prompt, 1, TOKENS)) for name, one in both.items()}
    return compare(MODEL, dtype, TOKENS, "tokens", calls, verdict, bound, SECONDS)
