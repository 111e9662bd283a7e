"""The CPU: our C++ kernels for fused ops, oneDNN for large products and convolutions, ATen for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu import library
from fusegen.runtime import residual
from fusegen.runtime.backends import onednn, onednn_int8, plain
from fusegen.runtime.backends.base import Backend
from fusegen.runtime.backends.binding import Binding, Call
from fusegen.runtime.backends.lower import gates_first
from fusegen.runtime.few_rows import Few
from fusegen.runtime.program import Node, Program
from fusegen.runtime.rewrite.epilogue import fuse_epilogues, merge_linears
from fusegen.runtime.specialize import propagate
from fusegen.runtime.weights import Weights

FEW_QUERIES, FEW_SCORES = 1024, 1 << 20  # of a head, for attention in int8 on AMX tiles


def _level() -> str:
    """The level in force, "none" without our library."""
    return library.level() if library.available() else "none"


class Cpu(Backend):
    """Epilogues are fused into products, products of one input are merged, and outputs lie in one arena."""

    name = "cpu"
    # On a Zen 5 against oneDNN with packed weights one row is faster at every size (3.3 times at 512 x 256, 1.1 at
    # 11008 x 4096, in bfloat16), more rows are as long as what a call costs counts.
    few_rows = Few(64, 12 << 20)

    def lower(self, program: Program) -> Program:
        """Fuse and merge, find the strides that the bound forms give, then fuse what these allow."""
        fused = merge_linears(gates_first(fuse_epilogues(program)))
        return residual.through_views(propagate(onednn_int8.opened(plain.convolutions(fused))))

    def unpacked(self, dtype: torch.dtype) -> str | None:
        """Ours are of AVX512-BF16 and of AMX; in float32 of AVX2, where oneDNN has half to three quarters of the peak
        (Zen 3), with AVX-512 all of it (Zen 5)."""
        served = ("avx2",) if dtype == torch.float32 else ("avx512_bf16", "amx")
        return None if _level() in served else f"at level {_level()} they are oneDNN's"

    def unpacked_convolutions(self) -> str | None:
        """Ours are of AMX.  With AVX512-BF16 Winograd's algorithm has fewer products."""
        if _level() == "amx":
            return None
        rest = "are Winograd's or" if _level() == "avx512_bf16" else "are"
        return f"at level {_level()} they {rest} oneDNN's"

    def unserved_int8(self) -> str | None:
        """These forms, Winograd's and 1x1 convolutions as rows, are faster than oneDNN with AVX512-VNNI (Zen 5); tiles
        have forms of their own."""
        return None if _level() == "avx512_bf16" else f"at level {_level()} they are oneDNN's"

    def unserved_int8_rows(self) -> str | None:
        """As a layer by a packed weight they are faster than oneDNN with AMX too."""
        return None if self.unpacked_int8() is None else self.unserved_int8()

    def unpacked_int8(self) -> str | None:
        """Ours are of AMX; the others read the weight as it lies."""
        return None if _level() == "amx" else f"at level {_level()} the weight is read as it lies"

    def unserved_int8_attention(self, q: Tensor, k: Tensor) -> str | None:
        """With AVX512-VNNI alone it is faster than attention in any dtype.  On AMX tiles bfloat16 makes up for what its
        weights take by keys that need no codes, where queries or scores are few (docs/performance.md)."""
        level, queries, keys = _level(), q.shape[-2], k.shape[-2]
        if level == "avx512_bf16":
            return None
        if level != "amx":
            return f"at level {level} it is faster in the compute dtype"
        if q.dtype != torch.bfloat16 or (queries >= FEW_QUERIES and queries * keys >= FEW_SCORES):
            return None
        return f"at level amx {queries} queries over {keys} keys are faster in bfloat16"

    def no_int8_convolutions(self) -> str | None:
        """oneDNN has them with AVX512-VNNI; without, sums of its products of int8 saturate."""
        return None if onednn_int8.served() else "this CPU has no AVX512-VNNI"

    def bind(self, node: Node, program: Program, metas: Mapping[str, Any], deterministic: bool) -> Binding:
        """oneDNN where it serves, else ATen."""
        if node.op == onednn_int8.CONV:
            return onednn_int8.bind(node, program)
        if node.op in onednn.LINEAR + onednn.CONV:
            bound = onednn.bind(node, program, metas) if torch.backends.mkldnn.is_available() else None
            if bound is None and node.op in plain.CALLS:
                bound = Binding("aten", node.op)
            if bound is not None:
                return self.hold(bound, node.op, metas, deterministic)
        return super().bind(node, program, metas, deterministic)

    def call(self, node: Node, binding: Binding, program: Program, weights: Weights) -> Call:
        """The call of a bound node."""
        if node.op == onednn_int8.CONV:
            return onednn_int8.call(node, binding, program, weights)
        if binding.how == "library":
            return onednn.call(node, binding, program, weights)
        if node.op in plain.CALLS:
            return plain.call(node)
        return super().call(node, binding, program, weights)


BACKEND = Cpu()
