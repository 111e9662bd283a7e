"""Launcher of attention_int8.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.attention import Args, plain_struct
from fusegen.kernels.cpu.attention import decline as undone
from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.op import Kernel, Launch

__all__ = ["Args"]


def decline(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str | None:
    return undone(q, k, v)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> Launch:
    q, k, v, scale = args
    return CpuLaunch("attention_int8", plain_struct(outs[0], q, k, v, scale), dict(enumerate("qkv")), outs, args)


KERNELS = [Kernel("attention_int8 C++", "cpu", decline, bind)]
