"""``fusegen info``: what a model file holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusegen import components

if TYPE_CHECKING:
    from fusegen.runtime.bundle import Bundle
    from fusegen.runtime.program import Program, TensorSpec

HELP = "say what a model file holds"
DESCRIPTION = """Say what a model file holds: family, components with their inputs, sizes, licence, quality, hashes.

--verify also reads every byte and checks it against the SHA-256 that the file states."""
EXAMPLES = """  fusegen info emoji
  fusegen info emoji --verify
  fusegen info unet.pt2 --json
"""


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a .fg or .pt2 file, or the name of a model in the zoo")
    p.add_argument("--verify", action="store_true", help="check every member of a bundle")
    p.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    from fusegen.models.load import locate
    from fusegen.runtime.read import read

    path = locate(args.model)
    bundle = components.open_bundle(path)
    if bundle is None:
        document = {"path": str(path), "kind": "graph", **of_program(read(path))}
    else:
        document = of_bundle(path, bundle)
        if args.verify:
            verify(bundle)
            document["verified"] = True
    if args.json:
        print(json.dumps(document))
    else:
        print(*lines(document), sep="\n")
    return 0


def of_bundle(path: Path, bundle: Bundle) -> dict[str, Any]:
    """What the manifest states, as plain data."""
    from fusegen.runtime import manifest

    stated = json.loads(manifest.dumps(bundle.manifest))
    for name, component in bundle.manifest.components.items():
        stated["components"][name]["inputs"] = specs(component.inputs)
    return {"path": str(path), "kind": "bundle", **stated}


def of_program(program: Program) -> dict[str, Any]:
    """What a bare graph holds, as plain data."""
    return {
        "name": program.name,
        "inputs": specs(program.inputs),
        "outputs": list(program.outputs),
        "symbols": {k: list(v) for k, v in program.symbols.items()},
        "weights": len(program.weights),
        "weight_bytes": sum(w.nbytes for w in program.weights.values()),
        "nodes": len(program.nodes),
        "ops": program.counts(),
    }


def specs(inputs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Input name -> its dtype and sizes, as ``float32 (batch, 3, 32, 32)``."""
    return {k: f"{str(v.dtype).removeprefix('torch.')} ({', '.join(map(str, v.shape))})" for k, v in inputs.items()}


def verify(bundle: Bundle) -> None:
    """Read every member; a difference raises FileError."""
    for name in bundle.manifest.components:
        bundle.program(name)
    for name in bundle.manifest.members:
        if not name.startswith("components/"):
            bundle.file(name)


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The document as indented lines; what is empty is left out."""
    for key, value in document.items():
        if key == "card":
            continue
        yield from _lines(key, value, 0)
    if document.get("card"):
        yield from ("", document["card"].strip())


def _lines(key: str, value: Any, depth: int) -> Iterator[str]:
    margin = "  " * depth
    if key == "members":
        yield f"{margin}members"
        for name, stored in value.items():
            yield f"{margin}  {stored['size']:>12,} bytes  {stored['sha256'][:16]}  {name}"
    elif isinstance(value, dict) and value:
        yield f"{margin}{key}"
        for inner, one in value.items():
            yield from _lines(inner, one, depth + 1)
    elif value not in ("", {}, [], None):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        yield f"{margin}{key}: {shown:,}" if key.endswith("bytes") else f"{margin}{key}: {shown}"
