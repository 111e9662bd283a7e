"""What a backend is: it lowers a static program to its own forms, binds each node, and makes the call of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusegen.runtime.backends import aten, batch
from fusegen.runtime.backends.binding import Binding, Call
from fusegen.runtime.few_rows import Few
from fusegen.runtime.program import Node, Program
from fusegen.runtime.weights import Weights

if TYPE_CHECKING:
    from fusegen.runtime.plan import Plan


class Backend:
    """ATen on a device, with our kernels for fused ops; a backend overrides what it does otherwise."""

    name = ""
    device = "cpu"
    fuses = True  # whether the program is rewritten to fused ops first
    few_rows: Few | None = None  # which linear layers are the op ``linear``: where that was measured to be faster
    plans = True  # whether outputs go to planned buffers
    graph = False  # whether a captured run is recorded and replayed as a whole (CUDA graphs)

    def check(self) -> None:
        """Raise :class:`~fusegen.runtime.errors.RequestError` where this machine cannot run it."""

    def lower(self, program: Program) -> Program:
        """The static program in this backend's own forms, its specs propagated."""
        return program

    def bind(self, node: Node, program: Program, metas: Mapping[str, Any], deterministic: bool) -> Binding:
        """The binding of a node that is no fused op and no view; ``metas``: its arguments, tensors on ``meta``."""
        planned = self.plans and aten.has_out(node.op, self.device)
        return self.hold(Binding("aten", node.op, planned=planned), node.op, metas, deterministic)

    def unpacked(self, dtype: torch.dtype) -> str | None:
        """Why our kernels do not take layers of many rows in ``dtype``, or None where they do."""
        return None

    def unpacked_convolutions(self) -> str | None:
        """Why our kernels of packed taps do not take 3x3 convolutions in bfloat16 and int8, or None where they do."""
        return f"the backend {self.name} has no kernel for them"

    def unserved_int8(self) -> str | None:
        """Why our kernels do not take convolutions in int8, or None where they do."""
        return None

    def unserved_int8_attention(self, q: Tensor, k: Tensor) -> str | None:
        """Why our kernels do not take attention of q over k in int8, or None where they do."""
        return None

    def unserved_int8_rows(self) -> str | None:
        """Why 1x1 convolutions in int8 are not linear layers of ours, or None where they are."""
        return self.unserved_int8()

    def unpacked_int8(self) -> str | None:
        """Why our kernels of packed weights do not take int8 layers of many rows, or None where they do."""
        return f"the backend {self.name} has no kernel for them"

    def no_int8_convolutions(self) -> str | None:
        """Why convolutions that are not ours do not multiply in int8, or None where they do."""
        return f"the backend {self.name} has no products of int8 for them"

    def hold(self, binding: Binding, op: str, metas: Mapping[str, Any], deterministic: bool) -> Binding:
        """``binding`` with what is known of its batch invariance, and cut into samples where that must be made so."""
        cut = batch.cut(op, metas)
        if cut == ():
            return binding
        if cut is None or not deterministic:
            return replace(binding, invariant=False)
        if all(metas[name].shape[0] == 1 for name in cut):
            return binding  # one sample: the call that each of more would get
        return replace(binding, by_sample=cut, planned=False)

    def call(self, node: Node, binding: Binding, program: Program, weights: Weights) -> Call:
        """The call of a node that :meth:`bind` bound."""
        return aten.call(node, binding.planned, torch.device(self.device))

    def prepare(self, plan: Plan) -> None:
        """What is done for a plan as a whole before its nodes are bound to memory."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """``run`` as one replayable unit, where :attr:`graph` says there is such a thing."""
        return run

    def place(self, weight: Tensor) -> Tensor:
        """A weight where the kernels read it."""
        return weight
