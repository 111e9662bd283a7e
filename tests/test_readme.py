"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fusegen.cli import parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


@pytest.mark.parametrize("number", range(sum(kind == "python" for kind, _ in BLOCKS)))
def test_the_python_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec([text for kind, text in BLOCKS if kind == "python"][number], {})


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("fusegen ") and " bench " not in c])
def test_the_commands_are_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parser().parse_args(shlex.split(line)[1:]).run


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make ")])
def test_the_targets_exist(line: str) -> None:
    assert re.search(rf"^{re.escape(line.split()[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_files_it_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
