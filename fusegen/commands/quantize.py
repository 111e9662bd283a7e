"""``fusegen quantize``: a model's weights to int8, with the proof of what that costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from fusegen import components
from fusegen.arguments import finite, integer, set_threads
from fusegen.commands.export import bundle_file
from fusegen.commands.plan import size

HELP = "write a model with int8 weights, and the proof of what that costs"
DESCRIPTION = """Write a model with int8 weights: a scale for each output channel, inputs quantized as they come.

Linear layers over rows and convolutions of 32 channels and more are quantized; first and last layers and the embeddings
of time stay. Then both models run on stated inputs, a text-to-image model through whole trajectories of its sampler,
and what differs goes into the file as its quality (fusegen info shows it). Where the cosine between the two is below
--least-cosine, nothing is written."""
EXAMPLES = """  fusegen quantize emoji -o emoji-int8.fg
  fusegen generate -m emoji-int8.fg -p "pig face"
  fusegen quantize unet.pt2 --size batch=2 --keep down_blocks.0 --storage bfloat16 -o unet-int8.fg
"""


def between(low: float, high: float) -> Callable[[str], float]:
    """An argument type: a number within bounds."""

    def parse(text: str) -> float:
        value = finite(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value:g} is out of range, which is {low:g} to {high:g}")
        return value

    return parse


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a .fg or .pt2 file, or the name of a model in the zoo")
    p.add_argument("-o", "--output", type=bundle_file, required=True, metavar="FILE", help="the .fg file to write")
    p.add_argument("--bits", default="int8", choices=("int8",), help="of the weights (default: int8)")
    p.add_argument("--keep", action="append", default=[], metavar="NAME",
                   help="a layer, weight or module that stays as it is; may be repeated")  # fmt: skip
    p.add_argument("--most-error", type=between(0, 1), metavar="X",
                   help="keep layers whose own relative error on seeded inputs is larger (default: none)")  # fmt: skip
    p.add_argument("--least-cosine", type=between(-1, 1), default=0.999, metavar="X",
                   help="refuse where the cosine to the original's outputs is lower (default: 0.999)")  # fmt: skip
    p.add_argument("--steps", type=integer(1, 1000), default=20, metavar="N",
                   help="steps of the trajectories that are compared (default: 20)")  # fmt: skip
    p.add_argument("--size", type=size, action="append", default=[], metavar="NAME=N",
                   help="for the comparison: a size that a bare graph leaves open (default: the least)")  # fmt: skip
    p.add_argument("--storage", choices=("float16", "bfloat16"),
                   help="store the weights that stay in half the bytes (default: as the model does)")  # fmt: skip
    p.add_argument("-t", "--threads", type=integer(1, 1024), metavar="N", help="CPU threads (default: all cores)")
    p.add_argument("--json", action="store_true", help="print the quality report as JSON")


def run(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from fusegen.models.load import locate
    from fusegen.models.quantize import Options, quantize_bundle, quantize_program
    from fusegen.runtime.read import read

    options = Options(
        args.bits, args.keep, args.most_error, args.least_cosine, args.steps, args.storage, dict(args.size)
    )
    path = locate(args.model)
    bundle = components.open_bundle(path)
    if bundle is None:
        program = read(path)
        components.refuse_unknown(options.sizes, program.symbols, "size")
        written = quantize_program(program, args.output, options)
    else:
        parts = bundle.manifest.components.values()
        components.refuse_unknown(options.sizes, {s for c in parts for s in c.symbols}, "size")
        written = quantize_bundle(bundle, args.output, options)
    quality = written.quality["components"]
    facts = {"file": str(args.output), "bytes": args.output.stat().st_size, "quality": quality,
             "quantization": written.quantization["components"]}  # fmt: skip
    print(json.dumps(facts) if args.json else "\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    out = []
    for name, found in facts["quality"].items():
        part = facts["quantization"][name]
        counts = " and ".join(f"{part[k]} {k}" for k in ("linear layers", "convolutions") if k in part)
        out.append(
            f"{name}: {counts or 'nothing'} in int8, {sum(part['kept'].values())} kept; cosine {found['cosine']:.6f}, "
            f"relative error {found['relative_rms']:.4f}, {min(o['psnr'] for o in found['outputs'].values()):.1f} dB "
            f"(in {found['dtype']}, to {found['against']})"
        )
    return [*out, f"{facts['file']}: {facts['bytes']:,} bytes"]
