"""``fusegen plan``: which kernel runs where, and why."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusegen import components
from fusegen.arguments import add_device, integer, set_threads

if TYPE_CHECKING:
    from fusegen.runtime.engine import Session
    from fusegen.runtime.measure import Share
    from fusegen.runtime.program import Program, TensorSpec

HELP = "say which kernel runs where, and why"
DESCRIPTION = """Print the plan of a model: each node, the kernel bound to it, its bytes and FLOPs, and for each fast
kernel that declined, its reason. Nothing is run, except with --profile or --plot."""
EXAMPLES = """  fusegen plan emoji
  fusegen plan emoji --component denoiser --batch 2 --profile
  fusegen plan emoji --component denoiser --batch 2 --plot roofline.png
  fusegen plan emoji --component denoiser --fixed context --per-step t
  fusegen plan unet.pt2 --size height=64 --size width=64 --dtype bfloat16 --json
"""


def size(text: str) -> tuple[str, int]:
    """An argument type: NAME=NUMBER."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=NUMBER")
    return name, integer(0, 2**31)(value)


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a .fg or .pt2 file, or the name of a model in the zoo")
    p.add_argument("--component", metavar="NAME", help="only this component, for example denoiser (default: all)")
    p.add_argument("--batch", type=integer(1, 2**20), metavar="N", help="how many samples at once")
    p.add_argument("--size", type=size, action="append", default=[], metavar="NAME=N",
                   help="a size that the graph leaves open (default: 1, or the least that it allows)")  # fmt: skip
    p.add_argument("--fixed", action="append", default=[], metavar="INPUT",
                   help="plan a run of many steps over which this input stays the same")  # fmt: skip
    p.add_argument("--per-step", action="append", default=[], metavar="INPUT",
                   help="plan a run of many steps for each of which this input is known ahead")  # fmt: skip
    p.add_argument("--deterministic", action="store_true", help="no result may depend on the batch it was made in")
    p.add_argument("--without", action="append", default=[], metavar="OP",
                   help="leave the kernels of this op alone, such as winograd_conv2d (may be repeated)")  # fmt: skip
    p.add_argument("--profile", action="store_true", help="run it on noise and print each kernel's share of the time")
    p.add_argument("--plot", type=Path, metavar="FILE",
                   help="profile it and draw every call against the ceilings of this machine, as PNG")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print a list of the components' plans as JSON")
    add_device(p)


def run(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from fusegen.runtime.specialize import concrete

    if args.plot:
        drawable(args.plot)
    options = {"device": args.device, "dtype": args.dtype, "deterministic": args.deterministic, "without": args.without}
    sessions = components.open_sessions(args.model, args.component, **options)
    programs, wanted, documents = [s.program for s in sessions.values()], dict(args.size), []
    measured: dict[str, list[Share]] = {}
    for program in programs:
        wanted |= {batch_of(program): args.batch} if args.batch else {}
    components.refuse_unknown(wanted, {s for p in programs for s in p.symbols}, "size")
    components.refuse_unknown(args.fixed + args.per_step, {i for p in programs for i in p.inputs}, "input")
    for name, session in sessions.items():
        specs = concrete(session.program, wanted)
        plan = session.planned(specs, *([n for n in names if n in specs] for names in (args.fixed, args.per_step)))
        shares = profile(session, specs) if args.profile or args.plot else []
        measured[f"{name}, {plan.device}"] = shares
        if args.json:
            documents.append(plan.to_json() | {"profile": [s.to_json() for s in shares]})
        else:
            print(plan, *(_line(s) for s in shares), "", sep="\n")
    if args.json:
        print(json.dumps(documents))
    if args.plot:
        draw(measured, args.plot, args.device or "cpu")
    return 0


def drawable(path: Path) -> None:
    """Raises RequestError where a plot cannot be drawn, before anything is measured."""
    import importlib.util

    from fusegen.runtime.errors import RequestError

    if path.suffix != ".png":
        raise RequestError("a plot is a PNG", str(path), "give it a name that ends with .png")
    if not path.absolute().parent.is_dir():
        raise RequestError("there is no such folder", str(path.parent), "make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib", mend="pip install matplotlib")


def draw(measured: Mapping[str, list[Share]], path: Path, device: str) -> None:
    """Every call of the profiles in one roofline plot, whose ceilings are measured now."""
    from fusegen.bench import roofline, roofline_plot
    from fusegen.runtime import write

    ceilings = roofline.measure(device)
    with write.atomic(path) as file:
        roofline_plot.draw(measured, ceilings, file)


def batch_of(program: Program) -> str:
    """The symbol of the first input's first size."""
    from fusegen.runtime.errors import RequestError

    name, spec = next(iter(program.inputs.items()))
    if not spec.shape or spec.shape[0] not in program.symbols:
        raise RequestError(f"the batch of {program.name} is fixed: {name} is {spec.shape}", mend="leave out --batch")
    return str(spec.shape[0])


def profile(session: Session, specs: Mapping[str, TensorSpec]) -> list[Share]:
    """The session's measured shares, for standard normal inputs and integers of zero."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = []
    for spec in specs.values():
        shape = tuple(int(d) for d in spec.shape)
        full = torch.randn(shape, generator=generator) if spec.dtype.is_floating_point else torch.zeros(shape)
        inputs.append(full.to(spec.dtype))
    return session.profile(*inputs)


def _line(share: Share) -> str:
    bar = "#" * math.ceil(share.part * 30)
    calls = f"{len(share.calls):>4} calls" if share.calls else ""
    flops, moved = (n / max(share.seconds, 1e-9) / 1e9 for n in (share.flops, share.bytes))
    rates = f"{flops:>7.1f} GFLOP/s {moved:>6.1f} GB/s" if share.calls else ""
    return f"{share.part:>6.1%} {share.seconds * 1e3:>9.3f} ms {calls:<10} {rates:<27} {share.name:<44} {bar}"
