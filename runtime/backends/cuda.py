"""NVIDIA GPUs: our Triton kernels for fused ops, ATen for the rest, a CUDA graph for each set of shapes."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.backends import plain
from fusegen.runtime.backends.base import Backend
from fusegen.runtime.backends.binding import Binding, Call
from fusegen.runtime.derived import Moved
from fusegen.runtime.errors import RequestError
from fusegen.runtime.few_rows import Few
from fusegen.runtime.plan import Plan, metas_of
from fusegen.runtime.program import Node, Program, Ref, substitute
from fusegen.runtime.rewrite import biases
from fusegen.runtime.rewrite.epilogue import merge_linears
from fusegen.runtime.specialize import propagate
from fusegen.runtime.weights import Weights


def _without_tf32(function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function`` with cuDNN held to float32: its TF32, PyTorch's default, would make other pictures of a seed."""
    cudnn = torch.backends.cudnn
    kept = dict(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic)
    with cudnn.flags(**kept, allow_tf32=False):  # type: ignore[attr-defined]
        return function(*args)


def _last(program: Program) -> Program:
    """The weights of convolutions channels-last; what else reads them reads them as they are."""
    weights, nodes = dict(program.weights), []
    for node in program.nodes:
        given = node.args.get("weight") if node.op == "runtime.conv2d" else None
        if isinstance(given, Ref) and given.name in program.weights:
            name = f"{given.name}.last"
            weights[name] = Moved(_channels_last, program.weights[given.name])
            node = replace(node, args={**node.args, "weight": Ref(name)})
        nodes.append(node)
    return replace(program, nodes=tuple(nodes), weights=weights)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def jobs(plan: Plan) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(op, its arguments as meta tensors, configuration) of each launch that is like no other of the plan."""
    choose = importlib.import_module("fusegen.kernels.gpu.tune").choose
    device, metas, seen = torch.device("cuda", torch.cuda.current_device()), metas_of(plan.program), set()
    for step in plan.steps:
        if step.binding.how != "kernel":
            continue
        name = step.node.op.split(".")[1]
        args = tuple(substitute(value, metas) for value in step.node.args.values())
        key = name, str([(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args])
        if key not in seen:
            seen.add(key)
            module = importlib.import_module(f"fusegen.kernels.gpu.{name}")
            yield name, args, choose(module.TUNABLE, args, device) if hasattr(module, "TUNABLE") else None


class Cuda(Backend):
    """Weights are moved once, convolutions run channels-last, and a captured run is replayed as one graph."""

    name = "cuda"
    device = "cuda"
    graph = True
    few_rows = Few(16)  # 1.05 to 2.0 times cuBLAS's speed on an H200 in bfloat16, to 11008 x 4096; float32 untimed

    def check(self) -> None:
        """Raise :class:`RequestError` where there is no GPU."""
        if not torch.cuda.is_available():
            raise RequestError("there is no CUDA device here", mend="pass device='cpu'")

    def lower(self, program: Program) -> Program:
        """Biases go where they cost no launch, products of one input are merged, convolutions read and give
        channels-last, as cuDNN wants them."""
        return propagate(_last(plain.convolutions(merge_linears(biases.moved(program)))))

    def bind(self, node: Node, program: Program, metas: Mapping[str, Any], deterministic: bool) -> Binding:
        """ATen, and our form of convolutions."""
        if node.op in plain.CALLS:
            return self.hold(Binding("aten", node.op), node.op, metas, deterministic)
        return super().bind(node, program, metas, deterministic)

    def call(self, node: Node, binding: Binding, program: Program, weights: Weights) -> Call:
        """The call of a bound node; convolutions of float32 are float32's, as on a CPU, and not TF32's."""
        if node.op not in plain.CALLS:
            return super().call(node, binding, program, weights)
        found = plain.call(node)
        return replace(found, function=partial(_without_tf32, found.function))

    def place(self, weight: Tensor) -> Tensor:
        """The weight on the GPU, its strides those of the plan."""
        return weight.to(self.device)

    def prepare(self, plan: Plan) -> None:
        """Compile the kernels of the plan's launches side by side, those that are not on disk from another time."""
        if not any(step.binding.how == "kernel" for step in plan.steps):
            return
        try:
            errors = importlib.import_module("fusegen.kernels.gpu.warm").warm(jobs(plan))
        except Exception as error:  # a Triton that has other parts inside, say: launches need none of this
            errors = [f"{type(error).__name__}: {error}"]
        if bad := [error for error in errors if error]:
            warnings.warn(
                f"{len(bad)} of {len(errors)} GPU kernels were not compiled side by side, but will be at their first "
                f"launches, which takes longer: {bad[0]}",
                RuntimeWarning,
                stacklevel=2,
            )

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of ``run``, which has run before, so that every kernel is compiled and every library warm."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


BACKEND = Cuda()
