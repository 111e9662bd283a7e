"""What a bundle says of itself: ``manifest.json`` <-> :class:`Manifest`.  Unknown keys raise."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fusegen.runtime.errors import FileError
from fusegen.runtime.program import Program, TensorSpec
from fusegen.runtime.read import graph_json, json_text

FORMAT, VERSION = "fusegen.bundle", 1
MANIFEST = "manifest.json"
STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16}
COMPONENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

_TEXTS, _OBJECTS = ("name", "family", "licence", "card"), ("loop", "sampler", "quantization", "quality")
_KEYS = {"format", "version", "components", "members", *_TEXTS, *_OBJECTS}
PART = 64 << 20  # bytes of a part of a member that is hashed by itself
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Component:
    """What a program takes and gives: specs by name, in call and return order.

    ``storage_dtype`` is the dtype that its float32 weights are stored in (``"float16"``, ``"bfloat16"``), or empty
    where they are stored as they are; they come back as the float32 that the graph is written for.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: tuple[str, ...]
    symbols: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    storage_dtype: str = ""

    @classmethod
    def of(cls, program: Program, storage_dtype: str = "") -> Component:
        """The description of a program."""
        return cls(dict(program.inputs), program.outputs, dict(program.symbols), storage_dtype)


@dataclass(frozen=True)
class Stored:
    """A member's size in bytes and its SHA-256 in hexadecimal; of one larger than ``PART`` also that of each part, so
    that they can be checked side by side."""

    size: int
    sha256: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What a model is.

    ``family`` names the file of ``models/`` that runs it (empty for a bare program); ``loop``, ``sampler``,
    ``quantization`` and ``quality`` are that family's to read; ``card`` and ``licence`` are texts.  ``components`` and
    ``members`` are filled in by :meth:`~fusegen.runtime.bundle.Bundle.write`.
    """

    name: str
    family: str = ""
    loop: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    card: str = ""
    components: Mapping[str, Component] = field(default_factory=dict)
    members: Mapping[str, Stored] = field(default_factory=dict)


def dumps(manifest: Manifest) -> bytes:
    """The manifest as UTF-8 JSON, readable."""
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    document |= {key: getattr(manifest, key) for key in _TEXTS}
    document |= {key: dict(getattr(manifest, key)) for key in _OBJECTS}
    document["components"] = {
        name: {
            "inputs": {k: graph_json.spec_to_json(v) for k, v in c.inputs.items()},
            "outputs": list(c.outputs),
            "symbols": {k: list(v) for k, v in c.symbols.items()},
            "storage_dtype": c.storage_dtype,
        }
        for name, c in manifest.components.items()
    }
    document["members"] = {k: _member_to_json(v) for k, v in manifest.members.items()}
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def loads(text: bytes, where: str) -> Manifest:
    """The manifest in ``text``; :class:`FileError` where it is damaged, of another version, or has unknown keys."""
    document = json_text.load_object(text, where)
    if document.get("format") != FORMAT:
        raise FileError("this is not a fusegen bundle's manifest", where=where)
    if document.get("version") != VERSION:
        version = str(document.get("version"))[:20]
        raise FileError(f"the bundle's format is version {version}, and {VERSION} is read", where, "update fusegen")
    try:
        return _manifest(graph_json.only(document, _KEYS))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"the manifest is not as it should be: {error}"[:200], where=where) from None


def _manifest(document: Mapping[str, Any]) -> Manifest:
    for key in _TEXTS:
        if not isinstance(document[key], str):
            raise TypeError(f"{key} is not a text")
    for key in _OBJECTS:
        if not isinstance(document[key], dict):
            raise TypeError(f"{key} is not an object")
    components = {k: _component(k, v) for k, v in document["components"].items()}
    members = {k: _member(k, v) for k, v in document["members"].items()}
    for name in components:
        for member in ("graph.json", "weights.safetensors"):
            if f"components/{name}/{member}" not in members:
                raise ValueError(f"the component {name} has no {member}")
    plain = {key: document[key] for key in (*_TEXTS, *_OBJECTS)}
    return Manifest(**plain, components=components, members=members)


def _component(name: str, value: Any) -> Component:
    found = graph_json.only(value, ("inputs", "outputs", "symbols", "storage_dtype"))
    if not COMPONENT_NAME.fullmatch(name) or found["storage_dtype"] not in ("", *STORAGE):
        raise ValueError(f"the component {name[:80]!r} or its storage_dtype")
    symbols = {k: graph_json.symbol_from_json(k, v) for k, v in found["symbols"].items()}
    inputs: dict[str, TensorSpec] = {
        k: graph_json.spec_from_json(v, frozenset(symbols)) for k, v in found["inputs"].items()
    }
    return Component(inputs, graph_json.names(found["outputs"]), symbols, found["storage_dtype"])


def _member_to_json(stored: Stored) -> dict[str, Any]:
    parts = {"parts": list(stored.parts)} if stored.parts else {}
    return {"size": stored.size, "sha256": stored.sha256, **parts}


def _member(name: str, value: Any) -> Stored:
    found = graph_json.only({"parts": [], **value}, ("size", "sha256", "parts"))
    size, parts = found["size"], tuple(found["parts"])
    if (
        name == MANIFEST
        or type(size) is not int
        or size < 0
        or not all(map(_HASH.fullmatch, (found["sha256"], *parts)))
    ):
        raise ValueError(f"the member {name[:80]!r}")
    if parts and len(parts) != -(-size // PART):
        raise ValueError(f"the parts of the member {name[:80]!r}")
    return Stored(size, found["sha256"], parts)
