"""Every case that is no benchmark goes through Triton's front end as it would at a launch.

The interpreter sees plain numbers; a launch makes a constant of every size that is 1, and what a kernel does with such
a constant (``size.to(...)``, say) may not exist.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from fusegen.kernels import catalogue
from fusegen.kernels import op as registry
from fusegen.kernels.gpu import compile as compiler
from fusegen.kernels.op import Case, Op


def _args(op: Op, case: Case) -> tuple[Any, ...]:
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
    made = registry.complete(op, case.build(torch.Generator().manual_seed(0), dtype))
    return tuple(a.to("meta") if isinstance(a, Tensor) else a for a in made)


@pytest.mark.parametrize("name", catalogue.triton_names())
def test_every_case_passes_the_front_end(name: str) -> None:
    op, module = registry.ops()[name], importlib.import_module(f"fusegen.kernels.gpu.{name}")
    lowered = 0
    for case in (c for c in op.cases if not c.bench):
        args = _args(op, case)
        if module.KERNELS[0].decline(*args) is not None:
            continue
        choice = [module.TUNABLE.default(*args)] if hasattr(module, "TUNABLE") else []
        for stage in module.stages(op.allocate(*args), args, *choice):
            if all(stage.grid):
                compiler.lower(stage, args, 90)
                lowered += 1
    assert lowered
