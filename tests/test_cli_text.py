"""``fusegen generate`` for text: what it prints, which options apply to which family, one-line errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import gpts
import pytest

import fusegen
from fusegen.cli import main

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(gpts.bundle(tmp_path_factory.mktemp("bundle")))


def generate(file: str, *more: str) -> int:
    return main(["generate", "-m", file, "-p", PROMPT, "--dtype", "float32", *more])


def test_text_comes_after_the_prompt(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    want = fusegen.load(file, dtype="float32").generate(PROMPT, seeds=[7], max_tokens=12, temperature=0.9)[0]
    flags = ["--seed", "7", "--temp", "0.9"]
    for count in (["-n", "12"], ["--max-tokens", "12"], ["--n-predict", "12"], ["--predict", "12", "-n", "3"]):
        assert generate(file, *flags, *count) == 0
        assert capsys.readouterr().out == PROMPT + want + "\n" * (not want.endswith("\n"))
    assert generate(file, *flags, "-n", "12", "--no-display-prompt") == 0
    assert capsys.readouterr().out.rstrip("\n") == want.rstrip("\n")


def test_json_says_what_was_asked_and_made(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(file, "--json", "-n", "5", "--top-k", "9", "--repeat-penalty", "1.3", "--stop", "zz") == 0
    made = json.loads(capsys.readouterr().out)
    wanted = {"prompt": PROMPT, "seed": 42, "max_tokens": 5, "top_k": 9, "repeat_penalty": 1.3, "stop": ["zz"]}
    assert {k: made[k] for k in wanted} == wanted and made["dtype"] == "float32"
    assert 0 < made["seconds_first"] <= made["seconds"] and made["text"]


def test_a_suffix_comes_after_the_middle_and_a_file_takes_it_all(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.py"
    assert generate(file, "-n", "6", "--suffix", "\n    return c", "-o", str(out)) == 0
    assert re.match(rf"{re.escape(str(out))}: \d+ characters, seed 42", capsys.readouterr().out)
    text = out.read_text()
    assert text.startswith(PROMPT) and text.endswith("\n    return c")
    assert os.listdir(tmp_path) == ["out.py"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--steps 3", "--steps is for text-to-image models, and .*tiny.fg is a text-generation model"),
        ("--deterministic", "--deterministic is for text-to-image and gan models"),
        ("-W 32", "--width is for text-to-image models"),
        ("--temp -1", "temperature is not a number from 0 to 100"),
        ("--top-k -1", "argument --top-k: -1 is out of range"),
        ("-n -2", "argument -n: -2 is out of range"),
        ("--max-tokens many", "argument --predict/--n-predict/--max-tokens: 'many' is not a whole number"),
    ],
)
def test_what_does_not_apply_is_one_line(file: str, more: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = generate(file, *more.split())
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert re.search(says, err), err


def test_text_options_are_refused_for_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for more, option in (
        ("--temp 0.5", "--temperature"),
        ("--suffix x", "--suffix"),
        ("--max-tokens 3", "--max-tokens"),
    ):
        assert main(["generate", "-m", "emoji", "-p", "cat", "-o", str(tmp_path / "x.png"), *more.split()]) == 2
        says = f"fusegen: error: {option} is for text-generation models, and emoji is a text-to-image model"
        assert capsys.readouterr().err.startswith(says)
    assert main(["generate", "-m", "emoji", "-p", "cat", "-n", "2000", "-o", str(tmp_path / "x.png")]) == 2
    assert "makes 1 to 1024 pictures" in capsys.readouterr().err


def test_as_many_as_fit(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(file, "-n", "-1", "--temp", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_tokens"] == gpts.gpt().cfg.context


def test_the_decode_step_s_overhead_is_shown(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", file, "--size", "n=1", "--profile", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"% +[\d.]+ ms +outside kernels", out) and "kernel sample_token" in out
