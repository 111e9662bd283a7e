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
from fusegen.kernels.op import Op, Tolerance

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


def onednn(op: Op, args: tuple[Any, ...]) -> Call | None:
    """oneDNN's int8 product as statically quantized models call it: x is in codes before the call, with one scale and
    zero point for all of it; bias and activation are fused, a residual is added in place."""
    if op.name != "linear_int8" or args[0].device.type != "cpu":
        return None
    x, weight, scale, bias, residual, activation = args
    rows = x.reshape(-1, x.shape[-1])
    step = float(rows.float().abs().max()) / 127
    codes = (rows.float() / step).round().add(128).to(torch.uint8)  # signed ones take it seconds without AMX
    packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
    zero, bias = torch.zeros(weight.shape[0], dtype=torch.int64), None if bias is None else bias.float()
    post, how = {"silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}.get(
        activation, (activation, "")
    )
    shape = (*x.shape[:-1], weight.shape[0])

    def call() -> Tensor:
        y = torch.ops.onednn.qlinear_pointwise(
            codes, step, 128, packed, scale, zero, bias, 1.0, 0, x.dtype, post, [], how
        ).view(shape)
        return y if residual is None else y.add_(residual)

    return call


# (op, contender): the error bound of a form that computes something else.  oneDNN's code for all of x is 1/127 of its
# largest magnitude, of a row's in the op; 1.5 % of normal inputs lie between, as between attention and its codes.
BOUNDS: Mapping[tuple[str, str], Tolerance] = {
    ("linear_int8", "onednn"): Tolerance(rms=0.03, peak=0.03),
    ("attention_int8", "eager"): Tolerance(rms=0.03, peak=0.06),
}

KERNELS: Mapping[str, Callable[[Op, tuple[Any, ...]], Call | None]] = {
    "eager": eager,
    "compile": compiled,
    "onednn": onednn,
    "fusegen": fusegen,
}
