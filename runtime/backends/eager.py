"""The reference: the graph as exported, node by node through PyTorch, nothing fused and nothing planned."""

from __future__ import annotations

from fusegen.runtime.backends.base import Backend


class Eager(Backend):
    """ATen on the CPU; a value is freed after its last use."""

    name = "eager"
    fuses = False
    plans = False


BACKEND = Eager()
