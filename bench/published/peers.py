"""How each contender loads a network from its file: one entry a contender.

A loader takes (network's name, its files' folder, dtype, example inputs) and returns the network as a function of such
inputs; what is slow to begin is done before it returns.  Each runs in its strongest form that we know of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusegen.bench.published import files, networks
from fusegen.bench.timing import once
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.engine import Session

Forward = Callable[[Sequence[Tensor]], Tensor]
Load = Callable[[str, Path, str, list[Tensor]], Forward]


@dataclass(frozen=True)
class Peer:
    """``kind``: the file it loads; ``dtypes``: those it computes in; ``asked``: it runs only where it is named."""

    kind: str
    load: Load
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    asked: bool = False


def _module(name: str, folder: Path, dtype: str) -> nn.Module:
    """The network in ``dtype``, its weights from the file."""
    from safetensors import safe_open

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        net = networks.NETWORKS[name].build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    with safe_open(folder / files.WEIGHTS, "pt") as f:
        for key, p in net.named_parameters():
            p.copy_(f.get_tensor(key))
    return net.to(getattr(torch, dtype))


def _cast(inputs: Sequence[Tensor], dtype: str) -> list[Tensor]:
    return [x.to(getattr(torch, dtype)) if x.is_floating_point() else x for x in inputs]


def eager(name: str, folder: Path, dtype: str, inputs: list[Tensor]) -> Forward:
    """Eager PyTorch, in the faster of its two layouts."""
    net, took = _module(name, folder, dtype), {}

    def call(given: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode():
            out: Tensor = net(*_cast(given, dtype))
        return out

    for layout in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=layout)  # type: ignore[call-overload]
        call(inputs)
        took[layout] = once(lambda: call(inputs), 1)
    net.to(memory_format=min(took, key=lambda k: took[k]))  # type: ignore[call-overload]
    return call


def compiled(name: str, folder: Path, dtype: str, inputs: list[Tensor]) -> Forward:
    """``torch.compile``, tuned as far as it goes, its weights frozen."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    mode = "max-autotune-no-cudagraphs"
    net = torch.compile(_module(name, folder, dtype), dynamic=False, mode=mode)

    def call(given: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            out: Tensor = net(*_cast(given, dtype))
        return out

    return call


def aotinductor(name: str, folder: Path, dtype: str, inputs: list[Tensor]) -> Forward:
    """What ``torch.compile`` makes, compiled ahead of time to a package and loaded from that."""
    with torch.no_grad():
        program = torch.export.export(_module(name, folder, dtype), tuple(_cast(inputs, dtype)))
        options = {"freezing": True, "max_autotune": True}
        package = str(folder / f"aotinductor-{dtype}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    del program
    net = torch._inductor.aoti_load_package(package)

    def call(given: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            out: Tensor = net(*_cast(given, dtype))
        return out

    return call


def onnxruntime(name: str, folder: Path, dtype: str, inputs: list[Tensor]) -> Forward:
    """ONNX Runtime on the CPU, all of its graph optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(folder / files.ONNX, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def call(given: Sequence[Tensor]) -> Tensor:
        named = dict(zip(names, (x.numpy() for x in given), strict=True))
        return torch.from_numpy(session.run(None, named)[0])

    return call


def openvino(name: str, folder: Path, dtype: str, inputs: list[Tensor]) -> Forward:
    """OpenVINO, told its precision, for latency."""
    import openvino as ov

    hints: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled_model = ov.Core().compile_model(folder / files.OPENVINO, "CPU", hints)
    request = compiled_model.create_infer_request()
    return lambda given: torch.from_numpy(request.infer([x.numpy() for x in given])[0].copy())


def fusegen(name: str, folder: Path, dtype: str, inputs: list[Tensor]) -> Forward:
    """This runtime, from the bundle."""
    session = opened(folder, dtype)
    return lambda given: session(*given)


def opened(folder: Path, dtype: str) -> Session:
    """The session of a network's bundle; of ``"int8"`` quantized as it loads, the rest in bfloat16."""
    program = Bundle.open(folder / files.BUNDLE).program("network")
    if dtype == "int8":
        return compile_program(program, "cpu", "bfloat16", quantize="int8")
    return compile_program(program, "cpu", dtype)


PEERS: Mapping[str, Peer] = {
    "eager": Peer(files.WEIGHTS, eager),
    "compile": Peer(files.WEIGHTS, compiled),
    "aotinductor": Peer(files.WEIGHTS, aotinductor, asked=True),  # minutes more, for what compile's code does too
    "onnxruntime": Peer(files.ONNX, onnxruntime, ("float32",)),
    "openvino": Peer(files.OPENVINO, openvino),
    "fusegen": Peer(files.BUNDLE, fusegen, ("float32", "bfloat16", "int8")),
}
