"""``fusegen doctor``: what this machine has, what is missing, and what that costs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import sys
from pathlib import Path

HELP = "say what this machine has, what is missing, and what that costs"
DESCRIPTION = "Say what this machine has, what is missing, and what that costs. Include its output in fault reports."
EXAMPLES = "  fusegen doctor\n  fusegen doctor --json\n"
PACKAGES = (
    "torch", "numpy", "triton", "safetensors", "tokenizers", "pillow", "av", "onnx", "onnxruntime-gpu", "onnxruntime",
)  # fmt: skip
PEERS = ("diffusers", "transformers", "openvino")


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print the same as JSON: section -> lines")


def run(args: argparse.Namespace) -> int:
    sections = {
        "versions": versions(),
        "machine": machine(),
        "cpu kernels": cpu_kernels(),
        "gpu": gpu(),
        "onnx runtime": onnx_runtime(),
        "models": zoo(),
    }
    if args.json:
        print(json.dumps(sections))
        return 0
    for title, lines in sections.items():
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> list[str]:
    """fusegen's version and folder, Python's, and those of the packages that are installed."""
    import fusegen

    lines = [f"fusegen {fusegen.__version__} in {Path(fusegen.__file__).parent}"]
    lines.append(f"python {platform.python_version()} in {sys.prefix}")
    found = {name: _version(name) for name in (*PACKAGES, *PEERS)}
    lines.append(", ".join(f"{name} {version}" for name, version in found.items() if version))
    absent = [name for name in PEERS if not found[name]]
    if absent:
        lines.append(f"not installed, needed by benchmarks and tests alone: {', '.join(absent)}")
    return lines


def machine() -> list[str]:
    """The operating system, the processor's cores and the threads that PyTorch uses."""
    import torch

    return [platform.platform(), f"{os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads"]


def cpu_kernels() -> list[str]:
    """The C++ library, the instruction set in force, and whether it shares PyTorch's threads."""
    from fusegen.kernels.cpu import library

    lines = library.report()
    if not library.available():
        lines.append("cost: on the CPU every fused op runs as its eager reference, which gains nothing over PyTorch")
    return lines


def gpu() -> list[str]:
    """The CUDA devices that PyTorch sees, and Triton."""
    import torch

    version = _version("triton")
    lines = [f"triton {version}" if version else "triton is not installed: no kernel can run on a GPU"]
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return [*lines, f"no CUDA device: PyTorch {torch.__version__} is {built}; models run on the CPU"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        lines.append(f"cuda:{i} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return lines


def onnx_runtime() -> list[str]:
    """The providers that a session gets; ``get_available_providers`` lists what was compiled in, GPU or not."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as error:
        return [f"cannot be imported: {error}"]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "doctor", value[:1], value[1:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnxruntime.set_default_logger_severity(4)
    lines = []
    for provider in onnxruntime.get_available_providers():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that it falls back
                got = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider]).get_providers()
        except Exception as error:
            lines.append(f"{provider}: fails: {str(error).splitlines()[0]}")
        else:
            lines.append(f"{provider}: {'works' if provider in got else 'compiled in, does not work here'}")
    return lines


def zoo() -> list[str]:
    """The models that can be loaded by name."""
    from fusegen.models import load

    lines = [f"{name}: {path}, {path.stat().st_size / 1e6:.1f} MB" for name, path in load.zoo().items()]
    return lines or [f"none in {load.ZOO}: make zoo trains and exports one"]
