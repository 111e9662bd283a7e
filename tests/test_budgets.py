"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fusegen", "kernels", "runtime", "models", "bench", "tests")
PYTHON_LINES, CPP_LINES, FUNCTION_LINES, TRITON_LINES = 300, 400, 40, 120


def files(*suffixes: str) -> list[Path]:
    return sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def functions_over_budget(source: str) -> Iterator[str]:
    """Each function that is too long; a Triton kernel (decorated with ``...jit``) may be longer than others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            triton = any("jit" in ast.unparse(d) for d in node.decorator_list)
            if lines > (TRITON_LINES if triton else FUNCTION_LINES):
                yield f"{node.name} at line {node.lineno} has {lines} lines"


@pytest.mark.parametrize("path", files(".py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_stays_within_budget(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= PYTHON_LINES
    assert list(functions_over_budget(source)) == []


@pytest.mark.parametrize("path", files(".cpp", ".h"), ids=lambda p: str(p.relative_to(ROOT)))
def test_cpp_stays_within_budget(path: Path) -> None:
    assert path.read_text().count("\n") <= CPP_LINES


def test_the_budget_can_be_broken() -> None:
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert list(functions_over_budget(f"def long():\n{body}")) == ["long at line 1 has 41 lines"]
    assert list(functions_over_budget(f"@triton.jit\ndef long():\n{body}")) == []
