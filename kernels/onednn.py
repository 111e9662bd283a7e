"""What oneDNN, as PyTorch ships it, multiplies on this CPU."""

from __future__ import annotations

import functools

import torch


def serves(dtype: torch.dtype) -> bool:
    """Whether it has products of a floating ``dtype``: of bfloat16 on x86 from AVX-512 on, of float16 on few CPUs."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or (dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()))


@functools.cache
def saturates() -> bool:
    """Whether sums of its int8 products saturate, pair by pair in int16: as on x86 without VNNI."""
    codes, weight = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((8, 64), 127, dtype=torch.int8)
    packed, zero = torch.ops.onednn.qlinear_prepack(weight, [4, 64]), torch.zeros(8, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, torch.ones(8), zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y != 64 * 255 * 127).any())
