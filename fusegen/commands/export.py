"""``fusegen export``: an exported graph or a bundle to a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusegen import components
from fusegen.arguments import output

HELP = "write a model or an exported graph as a .fg file"
DESCRIPTION = """Write a model or an exported graph as a .fg file: data only, its weights laid out to be mapped.

SOURCE is a .pt2 file of torch.export.save, or a .fg file to write anew. A .pt2 is read without opening its pickles."""
EXAMPLES = """  fusegen export unet.pt2 -o unet.fg
  fusegen export unet.pt2 --storage bfloat16 -o unet-small.fg
"""


def bundle_file(text: str) -> Path:
    """An argument type: a .fg file to write."""
    path = output(text)
    if path.suffix != ".fg":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .fg")
    return path


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SOURCE", help="a .pt2 or .fg file, or the name of a model in the zoo")
    p.add_argument("-o", "--output", type=bundle_file, required=True, metavar="FILE", help="the .fg file to write")
    p.add_argument("--storage", choices=("float16", "bfloat16"),
                   help="store float32 weights in half the bytes, rounded (default: as they are)")  # fmt: skip
    p.add_argument("--trust", action="store_true", help="read a .pt2 though it holds members that could run code")


def run(args: argparse.Namespace) -> int:
    from fusegen.models.load import locate
    from fusegen.runtime.bundle import Bundle
    from fusegen.runtime.manifest import Manifest
    from fusegen.runtime.read import read

    path = locate(args.source)
    bundle = components.open_bundle(path)
    if bundle is None:
        program = read(path, trust=args.trust)
        written = Bundle.write(args.output, Manifest(path.stem), {"graph": program}, storage_dtype=args.storage or "")
    else:
        old = bundle.manifest
        files = {name: bundle.file(name) for name in old.members if not name.startswith("components/")}
        programs = {name: bundle.program(name) for name in old.components}
        stored = next((c.storage_dtype for c in old.components.values()), "")
        written = Bundle.write(args.output, old, programs, files, args.storage or stored)
    size = args.output.stat().st_size
    print(f"{args.output}: {', '.join(written.components)}; {len(written.members)} members, {size:,} bytes")
    return 0
