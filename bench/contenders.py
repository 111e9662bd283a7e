"""Who is measured: one entry a contender.

A kernel contender turns an op and its arguments into a call that returns the op's outputs, or None where it has no form
of that op.  The eager forms are PyTorch's own fast spellings, not our float32 references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op

Call = Callable[[], Any]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, key_lengths: Any, causal: bool, scale: Any) -> Tensor:
    if key_lengths is not None:
        keep = torch.arange(k.shape[2], device=k.device)[None, None, None] < key_lengths[:, None, None, None]
        if mask is None:
            mask = keep
        else:
            mask = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _group_norm(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, activation: str) -> Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def _layer_norm(x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _own_reference(name: str) -> Callable[..., Any]:
    """For an op that eager PyTorch has no spelling of, its reference is the eager form."""
    return lambda *args: registry.get(name).reference(*args)


EAGER: Mapping[str, Callable[..., Any]] = {
    "attention": _attention,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
}


def eager_form(op: Op) -> Callable[..., Any]:
    """The op as a user of eager PyTorch would write it."""
    return EAGER.get(op.name) or _own_reference(op.name)


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
