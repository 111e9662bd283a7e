"""Who is measured on a GPU, op by op: eager, ``torch.compile``, SDPA's backends by force, fusegen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusegen.bench import contenders
from fusegen.bench.gpu_stages import Setting, bound
from fusegen.kernels.op import Op

Build = Callable[[Op, tuple[Any, ...]], Callable[[], Any]]


def fusegen(op: Op, args: tuple[Any, ...]) -> Callable[[], Any]:
    """The bound launch, as the engine runs it."""
    outs, launch = bound(op, args)

    def call() -> Any:
        launch.run()
        return outs

    return call


def compiled(op: Op, args: tuple[Any, ...]) -> Callable[[], Any]:
    """``torch.compile`` of the eager form with static shapes and the widest search it has for kernels.  What it found
    fastest beside other processes is not believed: only compiled kernels are taken from the disk."""
    form = torch.compile(contenders.eager_form(op), dynamic=False, mode="max-autotune-no-cudagraphs")
    with inductor.patch(fx_graph_cache=False, autotune_local_cache=False):
        form(*args)
    return lambda: form(*args)


def forced(backend: SDPBackend) -> Build:
    """SDPA with that backend or an error: left alone, PyTorch picks FlashAttention-2 before cuDNN."""

    def build(op: Op, args: tuple[Any, ...]) -> Callable[[], Any]:
        form = contenders.eager_form(op)

        def call() -> Any:
            with sdpa_kernel(backend):
                return form(*args)

        return call

    return build


def flash_varlen(op: Op, args: tuple[Any, ...]) -> Callable[[], Any]:
    """FlashAttention-2 on packed sequences, as PyTorch ships it; the longest is known before the call."""
    q, k, v, cu_q, cu_k, _, causal, scale, _, _ = args
    starts = [cu_q, cu_q if cu_k is None else cu_k]
    longest = [int(cu.diff().max()) for cu in starts]

    def call() -> Any:
        forward = torch.ops.aten._flash_attention_forward
        return forward(q, k, v, *starts, *longest, 0.0, causal, False, scale=scale)[0]

    return call


def of(op: Op, dtype: torch.dtype, setting: Setting, slow: bool) -> Mapping[str, Build]:
    """The contenders of an op, the baseline first.  ``torch.compile`` leaves SDPA as it is, so attention has none;
    elsewhere it stands where ``slow`` contenders, which take seconds a case, are wanted."""
    if setting.rehearse and op.eager:
        return {"eager": contenders.eager, "fusegen": fusegen}
    if op.name == "attention":
        peers = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
        if dtype == torch.float32:
            peers = {"sdpa efficient": SDPBackend.EFFICIENT_ATTENTION}
        return {"eager": contenders.eager, **{who: forced(b) for who, b in peers.items()}, "fusegen": fusegen}
    if op.name == "attention_varlen":  # its eager form goes from sequence to sequence, by numbers read from the GPU
        return {"flash varlen": flash_varlen, "fusegen": fusegen}
    if op.eager:
        compiler = {"compile": compiled} if slow else {}
        return {"eager": contenders.eager, **compiler, "fusegen": fusegen}
    return {"fusegen": fusegen}  # eager PyTorch has no form of it that draws the same noise on a GPU
