"""The pycode training: windows depend on their number alone, a stopped run goes on with the same bits, and exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fusegen
from fusegen.models.gpt import GPTConfig
from fusegen.models.zoo.pycode import data, export, measure, train

SIX = train.Settings(steps=6, tail=0.5, batch=2, length=32, save=0.0)
TEXT = '"""Ä module."""\n\n\ndef add(a, b):\n    return a + b  # 日本\n\n\nclass Point:\n    x = 0\n'
SOURCES = data.Sources({f"{i}.py": TEXT.replace("add", f"add{i}") * 4 for i in range(3)}, {"h.py": TEXT})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(context=64, width=32, layers=1, heads=2, kv_heads=1, hidden=48)
    monkeypatch.setattr(train, "network", lambda vocabulary: GPTConfig(vocabulary, **sizes))


def test_a_stopped_run_goes_on_with_the_same_bits_and_exports(tmp_path: Path) -> None:
    train.train(tmp_path / "whole", SIX, SOURCES)
    assert train.train(tmp_path / "stopped", SIX, SOURCES, until=3).step == 3
    assert train.train(tmp_path / "stopped", SIX, SOURCES).step == 6
    whole, stopped = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all(torch.equal(v, stopped[k]) for k, v in whole.items())
    manifest = export.export(tmp_path / "whole", tmp_path / "tiny.fg", SOURCES, lines=3, functions=1)
    assert "6 steps of 2 windows of 32 tokens" in manifest.card and "{" not in manifest.card
    assert manifest.quality["held_out"]["tokens"] > 20 and manifest.quality["held_out"]["loss"] > 0
    assert isinstance(fusegen.load(tmp_path / "tiny.fg").generate("def ", max_tokens=4)[0], str)


def test_the_rate_rises_stays_and_falls() -> None:
    settings = train.Settings(steps=1000, tail=0.2, peak=1.0)
    rates = [train.learning_rate(s, settings) for s in (0, 99, 500, 800, 900, 999)]
    assert rates[0] == 0.01 and rates[1:4] == [1, 1, 1] and 0.49 < rates[4] < 0.51 and rates[5] < 0.001


def test_a_run_by_the_clock_decides_its_steps_when_the_rate_begins_to_fall(tmp_path: Path) -> None:
    clock = train.Settings(steps=None, tail=0.5, batch=2, length=32, save=0.0, minutes=0.0)
    assert clock.at(40, -1.0).steps is None and clock.at(40, 1.0).steps == 80
    assert train.learning_rate(10**6, clock) == clock.peak
    assert train.train(tmp_path, clock, SOURCES).step == 2, "one step, then the cosine over as many"
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 2
    assert train.train(tmp_path, clock, SOURCES).step == 2, "a run that is done stays so"


def test_windows_depend_on_their_number_and_fill_in_the_middle() -> None:
    texts = list(SOURCES.train.values())
    tok = data.tokenizer(texts, 300)
    windows = data.Windows(texts, tok, 64)
    once, again, other = (windows.batch(step, 8) for step in (7, 7, 8))
    assert (once == again).all() and (once != other).any()
    end, prefix, *_ = data.special(tok)
    rows = [row[row >= 0].tolist() for step in range(8) for row in windows.batch(step, 8)]
    assert {row[0] for row in rows} == {end, prefix} and all(len(row) > 32 for row in rows)
    pieces = [tok.decode(row, skip_special_tokens=False) for row in rows]
    form = re.compile(r"<.prefix.><.suffix.>(.*?)<.middle.>(.*?)<.end.>", re.DOTALL)
    found = [m for piece in pieces for m in form.finditer(piece)]
    assert len(found) > 8 and all(any(m[2] + m[1] in text for text in texts) for m in found if "\ufffd" not in m[0])


def test_lines_to_fill_in_are_whole_and_have_what_is_around_them() -> None:
    found = measure.holes([TEXT], 100)
    assert {h.line for h in found} == {line.strip() for line in TEXT.splitlines() if line.strip()}
    assert all(h.before + h.line + h.after == TEXT for h in found)
    rests = measure.holes([TEXT], 100, within=True)
    assert {h.line for h in rests} >= {"add(a, b):", "a + b  # 日本", "Point:"}
    assert not {h.line for h in rests} & {h.line for h in found}
    assert all(h.before + h.line + h.after == TEXT for h in rests)
    long = "".join(f"    value{i} = {i}\n" for i in range(200))
    (one,) = measure.holes([long], 1)
    assert one.before.startswith("    value") and one.after.startswith("\n    value") and one.after.endswith("\n")
    assert [measure.edits(*p) for p in (("kitten", "sitting"), ("", "abc"), ("same", "same"))] == [3, 3, 0]


def test_a_tokenizer_gives_every_text_back() -> None:
    tok = data.tokenizer(list(SOURCES.train.values()), 300)
    for text in (TEXT, "\tx\r\n  y\x00 ü 👋🏽\n\n\n    z"):
        assert tok.decode(tok.encode(text).ids) == text
    assert "\n    " in {tok.decode([i]) for i in tok.encode(TEXT).ids}, "a line's end and its indentation are one token"


def test_files_are_held_out_by_name_and_tests_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for name in ("test/x.py", "_sysconfigdata_x.py", *(f"m{i}.py" for i in range(60))):
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    found = data.load(tmp_path)
    assert len(found.train) + len(found.held_out) == 60 and 0 < len(found.held_out) < 12
    assert data.load(tmp_path) == found
