"""Compile every Triton kernel for GPUs that need not be there, and read what it takes of them.

    python -m fusegen.kernels.gpu.compile [--arch 90] [--op attention] [--json FILE]

The specialisations are those of the real launches: each specimen's arguments are meta tensors given to the op's own
``stages``.  Registers, stack and instructions are read from the machine code with the tools in Triton's wheel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from fusegen.kernels import catalogue
from fusegen.kernels import op as registry
from fusegen.kernels.gpu.launch import ALIGNMENT, Stage
from fusegen.kernels.gpu.machine_code import unset
from fusegen.kernels.gpu.tune import SHARED_BYTES

ARCHITECTURES = {80: 163 * 1024, 90: SHARED_BYTES, 100: SHARED_BYTES}  # sm -> shared memory of a block
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+(?:/\*.*?\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_COLUMNS = (
    "op",
    "specimen",
    "kernel",
    "sm",
    "warps",
    "registers",
    "shared",
    "stack",
    "spills",
    "matrix",
    "16-byte loads",
    "serialized",
    "unset",
)
_MATRIX = ("HGMMA", "HMMA", "IGMMA", "IMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Specimen:
    """One set of arguments, as meta tensors in schema order."""

    op: str
    name: str
    args: Callable[[], tuple[Any, ...]]

    def stages(self, limit: int) -> tuple[Stage, ...]:
        """The launches of the configuration that serves without tuning, with ``limit`` bytes of shared memory."""
        module = importlib.import_module(f"fusegen.kernels.gpu.{self.op}")
        spec = importlib.import_module(f"fusegen.kernels.{self.op}")
        args = self.args()
        if reason := module.KERNELS[0].decline(*args):
            raise ValueError(f"{self.op} declines {self.name}: {reason}")
        outs = spec.OP.allocate(*args)
        if hasattr(module, "TUNABLE"):
            return tuple(module.stages(outs, args, module.TUNABLE.default(*args, limit=limit)))
        return tuple(module.stages(outs, args))


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.  ``shared`` and ``stack`` are bytes, ``spills`` loads and stores of local memory
    in the code, ``matrix`` and ``wide`` the instructions that multiply matrices and that load 16 bytes a thread.
    ``serialized``: the assembler waits for each asynchronous product of sm_90 before anything else goes on.  ``unset``:
    instructions that may read a register before it is written (:mod:`.machine_code`)."""

    op: str
    specimen: str
    kernel: str
    arch: int
    warps: int
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: str
    wide: int
    serialized: bool = False
    unset: int = 0
    triton: str = triton.__version__


def specimens(ops: Sequence[str] = ()) -> Iterator[Specimen]:
    """What each op's file names in ``specimens()``: dtypes, sizes, layouts and paths; every op where none is named."""
    for op in ops or catalogue.triton_names():
        module = importlib.import_module(f"fusegen.kernels.gpu.{op}")
        yield from (Specimen(op, name, build) for name, build in module.specimens())


def source(stage: Stage, args: Sequence[Any]) -> ASTSource:
    """The stage as Triton would specialise it at a launch: 16-byte aligned pointers, ones and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, (param, value) in enumerate(zip(stage.fn.params, stage.positional(args), strict=True)):
        one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or one:
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[param.name], attributes[(i,)] = "*" + _TYPES[value.dtype], [["tt.divisibility", ALIGNMENT]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % ALIGNMENT == 0 and not param.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(stage.fn, signature, constants, attributes)


def lower(stage: Stage, args: Sequence[Any], arch: int) -> None:
    """Take a launch through Triton's front end alone: milliseconds, and what its specialisation breaks shows here."""
    target, given = GPUTarget("cuda", arch, 32), source(stage, args)
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options(dict(stage.options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    given.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(_BIN / name), *args], capture_output=True, text=True, check=True).stdout


def _serialized(ptx: str) -> bool:
    """Whether the assembler gives up the overlap of ``wgmma`` with other work, of which it only warns."""
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        return "serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def compile_for(specimen: Specimen, arch: int) -> Iterator[Usage]:
    """Compile each launch of a specimen; raises what Triton or its assembler raises."""
    args = specimen.args()
    for stage in specimen.stages(ARCHITECTURES[arch]):
        made = triton.compile(source(stage, args), GPUTarget("cuda", arch, 32), options=dict(stage.options))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(made.asm["cubin"])
            usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
            text = _tool("nvdisasm", "-c", str(path))
        code = Counter(_INSTRUCTION.findall(text))
        find = lambda field: int(re.search(rf"{field}:(\d+)", usage)[1])  # type: ignore[index]  # noqa: B023, E731
        count = lambda *starts: sum(n for name, n in code.items() if name.startswith(starts))  # noqa: B023, E731
        matrix = [f"{n} {name}" for name in _MATRIX if (n := count(name))]
        yield Usage(
            op=specimen.op,
            specimen=specimen.name,
            kernel=stage.fn.__name__,
            arch=arch,
            warps=stage.options["num_warps"],
            registers=find("REG"),
            shared=made.metadata.shared,
            stack=find("STACK"),
            spills=count("LDL", "STL"),
            matrix=", ".join(matrix),
            wide=sum(n for name, n in code.items() if name.startswith(("LDG", "LDGSTS")) and ".128" in name),
            serialized=_serialized(made.asm["ptx"]),
            unset=sum(1 for _ in unset(text)) if arch <= 90 else 0,  # it does not know the instructions of sm_100
        )


def run(ops: Sequence[str], archs: Sequence[int]) -> list[Usage]:
    """Every specimen for every architecture, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    jobs = [(s, a) for s in specimens(ops) for a in archs]
    steps = track(jobs, "compiling", console=Console(stderr=True), transient=True)
    return [usage for specimen, arch in steps for usage in compile_for(specimen, arch)]


def show(usages: Sequence[Usage]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"What each Triton kernel takes of a GPU (Triton {triton.__version__})")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("op", "specimen", "kernel", "matrix") else "right")
    for u in usages:
        cells = (
            u.arch,
            u.warps,
            u.registers,
            u.shared,
            u.stack,
            u.spills,
            u.matrix,
            u.wide,
            "yes" * u.serialized,
            u.unset,
        )
        style = "red" if u.spills or u.serialized or u.unset else ""
        table.add_row(u.op, u.specimen, u.kernel, *map(str, cells), style=style)
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a kernel spills registers, reads one unset, or has serialized products."""
    parser = argparse.ArgumentParser(prog="python -m fusegen.kernels.gpu.compile", description=__doc__)
    parser.add_argument(
        "--arch", type=int, action="append", choices=tuple(ARCHITECTURES), help="only this one (80, 90, 100)"
    )
    parser.add_argument(
        "--op", action="append", choices=catalogue.triton_names(), help="only this op (may be repeated)"
    )
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    args = parser.parse_args(argv)
    registry.ops()
    usages = run(args.op or (), args.arch or tuple(ARCHITECTURES))
    show(usages)
    if args.json:
        args.json.write_text("[\n" + ",\n".join(json.dumps(asdict(u)) for u in usages) + "\n]\n")
    return int(any(u.spills or u.serialized or u.unset for u in usages))


if __name__ == "__main__":
    sys.exit(main())
