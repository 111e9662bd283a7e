"""The text family from a bundle to text, with a tiny network; the same tokens whatever the batch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpts
import pytest
import torch

import fusegen
from fusegen.models.text_generation import TextGeneration
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.derived import values
from fusegen.runtime.errors import Cancelled, FileError, RequestError
from fusegen.runtime.loop.decode import Continuation, Running, Sampling

PROMPTS = ["def add(a, b):", "x", "class Café:\n    naïve = '日本'\n" * 3, "import os\n\n"]
SAMPLED: dict[str, Any] = dict(max_tokens=24, temperature=1.5, top_k=60, top_p=0.98, min_p=0.01, repeat_penalty=1.2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpts.bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def model(file: Path) -> TextGeneration:
    return fusegen.load(file, dtype="float32")  # type: ignore[no-any-return]


def tokens_of(model: TextGeneration, requests: list[Continuation]) -> list[list[int]]:
    running = Running(model.loop, requests)
    out: list[list[int]] = [[] for _ in requests]
    while running.going:
        for row, token in running.next().items():
            out[row].append(token)
    running.close()
    return out


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 65, 100])
def test_greedy_tokens_are_those_of_the_network_run_whole(model: TextGeneration, length: int) -> None:
    prompt = torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    (ours,) = tokens_of(model, [Continuation(prompt, Sampling(temperature=0), 0, 20)])
    theirs = gpts.greedy(prompt, 20)
    allowed = next((i for i, t in enumerate(theirs) if t < 4), 20)  # special tokens end a text or are not drawn
    assert ours[:allowed] == theirs[:allowed] and allowed > 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_depends_on_its_own_request_alone(file: Path, dtype: str) -> None:
    model = fusegen.load(file, dtype=dtype)
    together = model.generate(PROMPTS, seeds=[5, 6, 7, 8], **SAMPLED)
    alone = [model.generate(p, seeds=[s], **SAMPLED)[0] for p, s in zip(PROMPTS, (5, 6, 7, 8), strict=True)]
    assert together == alone
    assert model.generate(PROMPTS[2:0:-1], seeds=[7, 6], **SAMPLED) == alone[2:0:-1]
    assert len(set(model.generate("x", seeds=range(6), **SAMPLED))) == 6


def test_a_stream_gives_what_generate_gives(model: TextGeneration) -> None:
    for prompt in PROMPTS:
        pieces = list(model.stream(prompt, seed=3, **SAMPLED))
        assert "".join(pieces) == model.generate(prompt, seeds=[3], **SAMPLED)[0]
        assert all(pieces)


def test_streams_may_run_side_by_side(model: TextGeneration) -> None:
    want = [model.generate(p, **SAMPLED)[0] for p in PROMPTS]
    streams, got = [model.stream(p, **SAMPLED) for p in PROMPTS], [""] * 4
    while any(pieces := [next(s, None) for s in streams]):
        got = [g + (p or "") for g, p in zip(got, pieces, strict=True)]
    assert got == want
    results: dict[int, list[str]] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: model.generate(PROMPTS[i], **SAMPLED)}))
        for i in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [results[i][0] for i in range(4)] == want


def test_nothing_is_captured_and_nothing_grows_while_tokens_come(model: TextGeneration, monkeypatch: Any) -> None:
    list(model.stream("x", **SAMPLED))
    monkeypatch.setattr("fusegen.runtime.engine.Capture", None)
    lane = model.loop.spare[-1]
    held = [t.data_ptr() for t in (*lane.caches.values(), *lane.rows.values(), *lane.tokens.values())]
    list(model.stream("x", **SAMPLED | {"max_tokens": 100}))
    assert model.loop.spare[-1] is lane
    assert held == [t.data_ptr() for t in (*lane.caches.values(), *lane.rows.values(), *lane.tokens.values())]


def test_a_text_ends_at_its_stop_string_and_at_the_context(model: TextGeneration) -> None:
    whole = model.generate("x", seeds=[1], **SAMPLED | {"max_tokens": 60})[0]
    stop = whole[len(whole) // 2 :][:4]
    assert model.generate("x", seeds=[1], stop=stop, **SAMPLED | {"max_tokens": 60})[0] == whole[: whole.index(stop)]
    assert model.generate("x", **SAMPLED | {"max_tokens": 0}) == [""]
    prompt = "y" * (model.text.context - 3)
    used = model.text.context - len(model.encode(prompt))
    (made,) = tokens_of(model, model._requests([prompt], [None], [0], (), {"max_tokens": 50})[0])
    assert used <= 2 and len(made) <= used + 1  # the prompt's last token is drawn again


def test_the_middle_is_asked_for_with_the_parts_in_order(model: TextGeneration) -> None:
    ids = {name: model.tokenizer.token_to_id(f"<|{name}|>") for name in ("prefix", "suffix", "middle", "end")}
    plain = [model.tokenizer.encode(t, add_special_tokens=False).ids for t in ("a =", "\nprint(a)")]
    wanted = [ids["prefix"], *plain[0], ids["suffix"], *plain[1], ids["middle"]]
    assert model.encode("a =", "\nprint(a)") == wanted
    assert model.encode("a =") == [ids["end"], *plain[0]]
    assert not set(ids.values()) & set(model.encode("<|middle|><|end|>")[1:]), "a prompt's text is no special token"
    (made,) = tokens_of(model, [Continuation(wanted, Sampling(temperature=5.0, top_k=0, top_p=1, min_p=0), 1, 100)])
    assert not set(made) & set(ids.values())


def test_the_middle_may_come_right_behind_its_prefix(file: Path) -> None:
    model = fusegen.load(file, dtype="float32")
    model.text = replace(model.text, fill="spm")
    special = model.special
    a, c = (model.tokenizer.encode(t, add_special_tokens=False).ids for t in ("def f():\n", "\nprint(a)"))
    wanted = [special["prefix"], special["suffix"], *c, special["middle"], *a]
    assert model.encode("def f():\n", "\nprint(a)") == wanted
    tokens, first = model._healed("def f():\n", "\nprint(a)")
    assert tokens == wanted[:-1] and first[0] == a[-1] and len(first) > 1
    assert model._healed("", "\nprint(a)") == ([special["prefix"], special["suffix"], *c, special["middle"]], ())
    texts = [model.generate("def f():\n", suffix, [3], **SAMPLED) for suffix in ("\nprint(a)", "x")]
    assert texts[0] != texts[1]


def test_cancelling_stops_before_the_next_token(model: TextGeneration) -> None:
    event, seen = threading.Event(), list[str]()
    with pytest.raises(Cancelled, match=r"after [45] tokens"):
        for piece in model.stream("x", cancel=event, **SAMPLED):
            seen.append(piece)
            if len(seen) == 4:
                event.set()
    assert len(seen) == 4
    assert model.generate("x", **SAMPLED)


def test_progress_counts_tokens(model: TextGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusegen.models.text_generation.BATCH", 2)
    told: list[tuple[int, int]] = []
    model.generate(PROMPTS, progress=lambda *a: told.append(a), **SAMPLED)
    assert told == sorted(told) and 4 * 24 <= told[-1][1] <= 4 * 25 and told[-1][0] <= told[-1][1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(prompts=3), "prompts is not a text"),
        (dict(prompts=["a", None]), "prompts is not a text"),
        (dict(prompts="\ud800"), "lone surrogates"),
        (dict(prompts="y" * 500), "the prompt has 501 tokens .*at most 127"),
        (dict(max_tokens=-1), "max_tokens is not an integer from 0"),
        (dict(max_tokens=10**9), "max_tokens is not an integer"),
        (dict(temperature=-1), "temperature is not a number from 0 to 100"),
        (dict(temperature=float("nan")), "temperature is not a number"),
        (dict(temperature="hot"), "temperature is not a number"),
        (dict(top_p=1.5), "top_p is not a number from 0 to 1"),
        (dict(top_k=2.5), "top_k is not an integer"),
        (dict(repeat_penalty=0), "repeat_penalty is not a number"),
        (dict(seeds=[2**64]), "a seed is not an integer"),
        (dict(seeds=[1, 2], prompts=["a", "b", "c"]), "2 seeds for 3 texts"),
        (dict(stop=[1]), "stop is not a text"),
        (dict(steps=20), "there is no setting 'steps': there are max_tokens, temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(model: TextGeneration, given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        model.generate(**{"prompts": "x", **given})
    assert "\n" not in str(caught.value)


def test_a_bundle_of_another_kind_is_refused(tmp_path: Path) -> None:
    loop = {"context": 128, "end": "<|end|>"}
    own = {"tokenizer.json": gpts.tokenizer_json().encode()}
    for change, words in (
        (dict(loop={"context": 128}), "TextConfig is incomplete"),
        (dict(loop=loop | {"context": 100}), "context is 100 .*multiple of 64"),
        (dict(loop=loop | {"fill": "mps"}), "fill is 'mps'.*psm, spm"),
        (dict(loop=loop | {"speed": 1}), "no 'speed'"),
        (dict(loop=loop | {"end": "<|fin|>"}), "the tokenizer has no token '<|fin|>'"),
        (dict(sampler={"temperature": "hot"}), "temperature is not a number"),
    ):
        manifest = Manifest(name="x", family="text-generation", **{"loop": loop, "sampler": {}} | change)
        Bundle.write(tmp_path / "x.fg", manifest, {"decoder": gpts.program()}, own)
        with pytest.raises(FileError, match=words.replace("|", r"\|")):
            fusegen.load(tmp_path / "x.fg")


def test_it_runs_with_no_model_code_imported(file: Path, tmp_path: Path) -> None:
    again = str(tmp_path / "again.fg")
    code = f"""
        import sys, fusegen
        model = fusegen.load({str(file)!r}, dtype="float32")
        text = model.generate("x", max_tokens=5, seeds=[1])
        assert not {{"fusegen.models.gpt", "transformers", "torch._dynamo"}} & set(sys.modules)
        fusegen.save(model, {again!r})
        assert fusegen.load({again!r}, dtype="float32").generate("x", max_tokens=5, seeds=[1]) == text
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_stream_gives_its_memory_back(model: TextGeneration) -> None:
    def first(stream: Iterator[str]) -> str:
        return next(stream)

    stream = model.stream("x", **SAMPLED)
    assert first(stream)
    count = len(model.loop.spare)
    stream.close()  # type: ignore[attr-defined]
    assert len(model.loop.spare) == count + 1


def test_a_prompt_may_end_in_the_midst_of_a_token(model: TextGeneration) -> None:
    """A line's end and the indentation after it are one token: the prompt's last token is drawn again."""
    ids = {text: model.tokenizer.encode(text, add_special_tokens=False).ids for text in ("\n", "\n    ")}
    assert [len(i) for i in ids.values()] == [1, 1]
    for suffix in (None, "\n"):
        tokens, first = model._healed("def f():\n", suffix)
        end = tokens.index(model.special["suffix"]) if suffix else len(tokens)
        assert ids["\n"][0] not in tokens[:end] and first[0] == ids["\n"][0] and ids["\n    "][0] in first
        assert all(model.bytes[i].startswith(b"\n") for i in first)
        requests, _ = model._requests(["def f():\n"], [suffix], [3], (), SAMPLED)
        (made,) = tokens_of(model, requests)
        text = b"".join(model.bytes[t] for t in made).decode("utf-8", "replace")
        assert made[0] in first and text.removeprefix("\n") == model.generate("def f():\n", suffix, [3], **SAMPLED)[0]
    assert model._healed("")[1] == () and model._healed("", "x")[1] == ()


def test_rotary_tables_are_stored_as_they_are(tmp_path: Path) -> None:
    Bundle.write(tmp_path / "x.fg", Manifest(name="x"), {"decoder": gpts.program()}, {}, "bfloat16")
    weights = values(Bundle.open(tmp_path / "x.fg").program("decoder").weights)
    assert torch.equal(weights["gpt.cos"], gpts.gpt().cos) and torch.equal(weights["gpt.sin"], gpts.gpt().sin)
    rounded = gpts.gpt().embed_tokens.weight.bfloat16().float()
    assert torch.equal(weights["gpt.embed_tokens.weight"], rounded)
