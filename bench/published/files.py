"""What the contenders load: a network as a bundle, an OpenVINO model, an ONNX model and a state dict, and its inputs
with the float32 output that everybody is held to.

``python -m fusegen.bench.published.files NETWORK FOLDER KIND...`` makes the files of these kinds that the folder lacks,
in a process that then gives its memory back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusegen.bench.published import networks
from fusegen.bench.published.networks import Network
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest

EXPECTED, BUNDLE, WEIGHTS = "expected.safetensors", "network.fg", "weights.safetensors"
ONNX, OPENVINO = "network.onnx", "network.xml"


def make(name: str, folder: Path, kinds: Sequence[str]) -> None:
    """Make what is missing in another process; raises RuntimeError with what it said last if it fails."""
    missing = [k for k in dict.fromkeys([EXPECTED, *kinds]) if not (folder / k).exists()]
    if missing:
        command = [sys.executable, "-m", "fusegen.bench.published.files", name, str(folder), *missing]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the files of {name} could not be made: {done.stderr.strip().splitlines()[-1:]}")


def expected(folder: Path) -> tuple[list[Tensor], Tensor, dict[str, float]]:
    """The inputs, the output of eager float32, and ``flops`` (PyTorch's own count) and ``seconds`` of that one run."""
    with safe_open(folder / EXPECTED, "pt") as f:
        facts = json.loads(f.metadata()["facts"])
        inputs = [f.get_tensor(f"input{i}") for i in range(sum(k.startswith("input") for k in f.keys()))]  # noqa: SIM118
        return inputs, f.get_tensor("output"), facts


def _expected(path: Path, net: nn.Module, inputs: list[Tensor], network: Network) -> None:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        start = time.perf_counter()
        out = net(*inputs)
        facts = {"flops": float(counter.get_total_flops()), "seconds": time.perf_counter() - start}
    tensors = {f"input{i}": x.contiguous() for i, x in enumerate(inputs)}
    save_file(tensors | {"output": out.contiguous()}, path, {"facts": json.dumps(facts)})


def _weights(path: Path, net: nn.Module, inputs: list[Tensor], network: Network) -> None:
    save_file({k: v.to(getattr(torch, network.stored)) for k, v in net.named_parameters()}, path)


def _bundle(path: Path, net: nn.Module, inputs: list[Tensor], network: Network) -> None:
    program = capture(net, inputs, name="network")
    short = "" if network.stored == "float32" else network.stored
    Bundle.write(path, Manifest(name=path.parent.name), {"network": program}, storage_dtype=short)


def _openvino(path: Path, net: nn.Module, inputs: list[Tensor], network: Network) -> None:
    import openvino

    smaller = network.traced(torch.Generator().manual_seed(1)) if network.traced else inputs
    model = openvino.convert_model(net, example_input=tuple(smaller))  # of sizes that it leaves open
    for port, x in zip(model.inputs, inputs, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(x.shape)))
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, path, compress_to_fp16=network.stored != "float32")


def _onnx(path: Path, net: nn.Module, inputs: list[Tensor], network: Network) -> None:
    torch.onnx.export(net, tuple(inputs), path, dynamo=True, external_data=True, optimize=True, verbose=False)


_MAKERS: dict[str, Any] = {
    EXPECTED: _expected, WEIGHTS: _weights, BUNDLE: _bundle, OPENVINO: _openvino, ONNX: _onnx,
}  # fmt: skip


def main(name: str, folder: str, *kinds: str) -> None:
    """Make ``kinds`` of files."""
    net, inputs = networks.made(name), networks.example(name)
    for kind in kinds:
        _MAKERS[kind](Path(folder) / kind, net, inputs, networks.NETWORKS[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
