"""Whether an operator's bits for one sample depend on the batch, and how to make it so that they do not.

Element-wise work, data movement and reductions along rows do every sample alike.  Matrix products and convolutions in
libraries choose their blocking, and so the order of their sums, by the whole problem: cut into one call a sample, they
see the same problem whatever the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.rewrite.graph import overload

_MOVES = set(
    "cat stack index_select index gather embedding constant_pad_nd pad repeat repeat_interleave expand flip roll "
    "clone copy "
    "contiguous reshape upsample_nearest2d upsample_nearest1d upsample_nearest3d one_hot masked_fill arange full "
    "zeros ones "
    "scalar_tensor full_like zeros_like ones_like new_zeros new_ones new_full tril triu max_pool2d avg_pool2d "
    "pixel_shuffle "
    "pixel_unshuffle scatter eye linspace flatten unflatten lift_fresh_copy to _to_copy type_as float".split()
)
# Sums whose order is fixed by the sample's own sizes: one row or one group at a time.
_ROWS = set("layer_norm native_layer_norm rms_norm group_norm softmax _softmax log_softmax batch_norm".split())
# Operators that are cut along dimension 0: their arguments that carry the batch there.
_CUT = {
    "linear": ("input", "residual", "multiplier"),
    "conv1d": ("input",),
    "conv2d": ("input", "residual", "multiplier"),
    "conv3d": ("input",),
    "conv_transpose2d": ("input",),
    "mm": ("self",),
    "addmm": ("mat1",),
    "bmm": ("self", "mat2"),
    "baddbmm": ("self", "batch1", "batch2"),
    "matmul": ("self", "other"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask"),
    "attention": ("q", "k", "v", "mask", "key_lengths"),
    "attention_int8": ("q", "k", "v"),
    "upsample_bilinear2d": ("input",),
}
_OURS = ("attention", "attention_int8")  # ops of ours whose references multiply a batch at once
_REDUCTIONS = set(
    "mean sum var std amax amin argmax argmin prod norm linalg_vector_norm cumsum max min any all".split()
)


def cut(op: str, metas: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The arguments to cut along dimension 0, ``()`` where nothing needs to be done, None where nothing is known."""
    base = op.split(".")[1]
    if base in _MOVES or base in _ROWS or (op.startswith("fusegen.") and base not in _OURS):
        return ()
    if base in _CUT:
        return _batched(base, metas)
    if base in _REDUCTIONS:
        dims = metas.get("dim")
        first = metas["self"]
        dims = (dims,) if isinstance(dims, int) else dims
        keeps = first.ndim > 1 and dims and all(d % first.ndim != 0 for d in dims)
        return ("self",) if keeps else None
    pointwise = op.startswith("aten.") and torch.Tag.pointwise in overload(op).tags
    return () if pointwise else None


def _batched(base: str, metas: Mapping[str, Any]) -> tuple[str, ...] | None:
    tensors = {k: v for k, v in metas.items() if k in _CUT[base] and isinstance(v, Tensor)}
    first = tensors[_CUT[base][0]]
    if first.ndim == 1:
        return None if base == "matmul" else ()
    if base == "matmul" and tensors["other"].ndim == 2:
        return ("self",)
    if base == "matmul" and first.ndim != tensors["other"].ndim:
        return None
    batch = max(v.shape[0] for v in tensors.values() if v.ndim == first.ndim)
    return tuple(k for k, v in tensors.items() if (v.ndim == first.ndim or k == "key_lengths") and v.shape[0] == batch)
