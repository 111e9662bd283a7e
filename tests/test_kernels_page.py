"""docs/kernels.md is what the registry and the committed rows say; every op says what it means."""

from __future__ import annotations

from pathlib import Path

from fusegen.bench import kernels_page
from fusegen.kernels import op as registry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"


def test_the_committed_page_is_fresh() -> None:
    assert PAGE.read_text() == kernels_page.page(), "run python -m fusegen.bench.kernels_page > docs/kernels.md"


def test_every_op_has_a_formula_a_source_and_random_arguments() -> None:
    for name, op in registry.ops().items():
        assert op.formula and "\n" not in op.formula, f"{name} has no formula of one line"
        assert op.source and "\n" not in op.source, f"{name} has no source of one line"
        assert op.draw is not None, f"{name} draws no random arguments"
