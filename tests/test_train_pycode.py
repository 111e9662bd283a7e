"""The pycode training: windows depend on their number alone, a stopped run goes on with the same bits, and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fusegen
from fusegen.models.gpt import GPTConfig
from fusegen.models.zoo.pycode import data, export, train

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
    manifest = export.export(tmp_path / "whole", tmp_path / "tiny.fg", SOURCES)
    assert "6 steps of 2 windows of 32 tokens" in manifest.card and "{" not in manifest.card
    assert manifest.quality["held_out"]["tokens"] > 20 and manifest.quality["held_out"]["loss"] > 0
    assert isinstance(fusegen.load(tmp_path / "tiny.fg").generate("def ", max_tokens=4)[0], str)


def test_the_rate_rises_stays_and_falls() -> None:
    settings = train.Settings(steps=1000, tail=0.2, peak=1.0)
    rates = [train.learning_rate(s, settings) for s in (0, 99, 500, 800, 900, 999)]
    assert rates[0] == 0.01 and rates[1:4] == [1, 1, 1] and 0.49 < rates[4] < 0.51 and rates[5] < 0.001


def test_windows_depend_on_their_number_and_fill_in_the_middle() -> None:
    tok = data.tokenizer(list(SOURCES.train.values()), 300)
    windows = data.Windows(list(SOURCES.train.values()), tok, 64)
    once, again, other = (windows.batch(step, 8) for step in (7, 7, 8))
    assert (once == again).all() and (once != other).any()
    end, prefix, suffix, middle = data.special(tok)
    firsts = {int(row[0]) for step in range(8) for row in windows.batch(step, 8)}
    assert firsts == {end, prefix}
    filled = next(row for step in range(8) for row in windows.batch(step, 8) if row[0] == prefix and end in row)
    parts = [int((filled == t).nonzero()[0][0]) for t in (prefix, suffix, middle, end)]
    a, c, b = (tok.decode(filled[i + 1 : j].tolist()) for i, j in zip(parts, parts[1:], strict=False))
    assert any(a + b + c in text for text in SOURCES.train.values())


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
