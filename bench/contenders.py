"""Who is measured: one entry a contender.

A kernel contender turns an op and its arguments into a call that returns the op's outputs, or None where it has no form
of that op.  The eager forms are PyTorch's own fast spellings, not our float32 references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op

Call = Callable[[], Any]


def eager_form(op: Op) -> Callable[..., Any]:
    """The op as a user of eager PyTorch would write it; where there is no such form, its reference."""
    return op.eager or op.reference


def eager(op: Op, args: tuple[Any, ...]) -> Call:
    """Eager PyTorch."""
    form = eager_form(op)
    return lambda: form(*args)


def compiled(op: Op, args: tuple[Any, ...]) -> Call:
    """``torch.compile`` of the eager form, tuned as far as it goes, static shapes."""
    torch._dynamo.reset()
    form = torch.compile(eager_form(op), dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda: form(*args)


def fusegen(op: Op, args: tuple[Any, ...]) -> Call | None:
    """The kernel that ``pick`` binds, through its bound launch, as the engine runs it."""
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    kernel = registry.pick(op, device, args).kernel
    if kernel is None:
        return None
    outs = op.allocate(*args)
    launch = kernel.bind(outs, args)

    def call() -> tuple[Tensor, ...]:
        launch.run()
        return outs

    return call


KERNELS: Mapping[str, Callable[[Op, tuple[Any, ...]], Call | None]] = {
    "eager": eager,
    "compile": compiled,
    "fusegen": fusegen,
}
