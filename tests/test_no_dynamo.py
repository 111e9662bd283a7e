"""Shape functions import neither PyTorch's compiler nor sympy, and who asks for these gets the real ones."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SHAPES = """
    import sys
    import torch
    from fusegen.runtime.no_dynamo import no_dynamo
    x = torch.empty(3, 1, device="meta")
    """


def run(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_element_wise_shapes_need_neither() -> None:
    code = (
        SHAPES
        + """
    with no_dynamo():
        made = torch.ops.aten.add.Tensor(x, torch.ops.aten.arange.default(5, device="meta"))
    print(tuple(made.shape), made.stride(), {"sympy", "torch._dynamo"} & set(sys.modules))
    """
    )
    assert run(code).strip() == "(3, 5) (5, 1) set()"


@pytest.mark.parametrize(
    "first", ["sympy", "sympy.core.basic", "torch.fx.experimental.symbolic_shapes", "torch._dynamo"]
)
def test_the_real_ones_are_there_for_who_asks(first: str) -> None:
    code = (
        SHAPES
        + f"""
    import importlib
    with no_dynamo():
        torch.ops.aten.mul.Tensor(x, x)
        importlib.import_module("{first}")
        from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false, sym_eq
    size = ShapeEnv().create_unbacked_symint()
    assert guard_or_false(size == 3) is False and guard_or_false(True) is True and sym_eq((1, 2), (1, 2)) is True
    exported = torch.export.export(torch.nn.ReLU(), (torch.ones(2, 3),), dynamic_shapes=({{0: torch.export.Dim("n")}},))
    print(len(exported.range_constraints))
    """
    )
    assert run(code).strip() == "1"
