"""Triton's interpreter as a stand-in for a GPU: what it does otherwise, mended."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def mend() -> None:
    """Make the interpreter treat bfloat16 as GPUs do: by itself it cuts the low bits off where it should round to the
    nearest, and multiplies matrices of bfloat16 as if their bits were integers.  And Triton 3.6's cannot loop over a
    range of tensors with a recent numpy, which makes no integer of an array of one."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    cut, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return cut(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def index(tensor: Any, *rest: Any) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    patch, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, index
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
