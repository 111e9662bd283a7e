"""``.fg`` bundles: a model as data, in a zip of stored and aligned members or in a folder of the same tree.

``manifest.json`` says what the model is and lists every other member with its size and SHA-256;
``components/<name>/graph.json`` and ``weights.safetensors`` are its programs; other files (a tokenizer, a card) stand
beside them.  Weights are views of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusegen.runtime import manifest as manifest_json
from fusegen.runtime import write
from fusegen.runtime.derived import Weight, converted, values
from fusegen.runtime.errors import FileError, RequestError, UnsafeFileError
from fusegen.runtime.manifest import COMPONENT_NAME, MANIFEST, STORAGE, Component, Manifest, Stored
from fusegen.runtime.program import Program
from fusegen.runtime.read import archive, graph_json, json_text, safetensors
from fusegen.runtime.read.folder import Folder
from fusegen.runtime.rewrite.cast import tables

MAX_FILE = 256 << 20  # bytes of a member that is read whole
_CODE = (
    ".pkl",
    ".pickle",
    ".bin",
    ".ckpt",
    ".pt",
    ".pth",
    ".joblib",
    ".npy",
    ".npz",
    ".so",
    ".dll",
    ".dylib",
    ".py",
    ".pyc",
)
_MAGIC = (*(bytes((0x80, protocol)) for protocol in range(2, 6)), b"PK\3\4", b"\x7fELF", b"MZ")


class Bundle:
    """An open bundle: ``manifest``, its programs and its files.  Nothing but the manifest is read until asked for."""

    def __init__(self, path: Path, source: archive.Archive | Folder, verify: bool = True):
        self.path, self._source, self._verify = path, source, verify
        text = source.content(MANIFEST, json_text.MAX_CONFIG)
        self.manifest = manifest_json.loads(text, f"{path}: {MANIFEST}")
        self._check_members()

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Open a ``.fg`` file or folder.

        Every member is checked against the manifest's SHA-256 when it is read, the weights only with ``verify``.
        Raises :class:`FileError` for a bundle that is damaged, naming the member, and :class:`UnsafeFileError` for one
        that holds a pickle or a library.
        """
        path = Path(path)
        return cls(path, Folder(path) if path.is_dir() else archive.Archive(path), verify)

    def only(self) -> Program:
        """The program of a bundle that has one."""
        if len(self.manifest.components) != 1:
            names = ", ".join(self.manifest.components)
            raise FileError(
                f"the bundle is a model of {names}, not one program", str(self.path), "open it with fusegen.load"
            )
        return self.program(next(iter(self.manifest.components)))

    def program(self, name: str) -> Program:
        """A component's program, its weights mapped from the file (converted where stored in half precision)."""
        component = self.manifest.components.get(name)
        if component is None:
            known = ", ".join(self.manifest.components)
            raise RequestError(f"the bundle has no component {name!r}; it has {known}", where=str(self.path))
        graph = f"components/{name}/graph.json"
        text = self.file(graph)
        program = graph_json.loads(text, self._weights(name, component, text), f"{self.path}: {graph}")
        if Component.of(program, component.storage_dtype) != component:
            raise FileError("the manifest and the graph disagree on inputs or outputs", where=f"{self.path}: {graph}")
        return program

    def file(self, name: str) -> bytes:
        """The bytes of a member, checked."""
        if name not in self.manifest.members:
            raise RequestError(f"the bundle has no file {name!r}", where=str(self.path))
        text = self._source.content(name, max(MAX_FILE, json_text.MAX_GRAPH))
        self._check(name, text)
        return text

    def _weights(self, name: str, component: Component, graph: bytes) -> dict[str, Weight]:
        member = f"components/{name}/weights.safetensors"
        data, start, size = self._source.span(member)
        if self._verify:
            self._check_pages(member, data, start, size)
        found: dict[str, Weight] = dict(safetensors.read(data, start, size, f"{self.path}: {member}"))
        if component.storage_dtype:
            stored = STORAGE[component.storage_dtype]
            wanted = graph_json.weight_specs(graph, f"{self.path}: components/{name}/graph.json")
            for key, tensor in found.items():
                if tensor.dtype == stored and key in wanted and wanted[key].dtype == torch.float32:
                    found[key] = converted(tensor, torch.float32)
        return found

    def _check_pages(self, name: str, data: Any, start: int, size: int) -> None:
        """Check a mapped member, whose pages need not be in memory all at once; its parts side by side."""
        stored, whole, part_size = self.manifest.members[name], hashlib.sha256(), manifest_json.PART

        def check(index: int) -> None:
            digest = hashlib.sha256() if stored.parts else whole
            at = start + index * part_size
            end = min(at + part_size, start + size)
            archive.ask(archive.pages(data, at, end - at, 1))
            with memoryview(data) as view, view[at:end] as part:
                digest.update(part)
            archive.release(archive.pages(data, at, end - at, 1))
            if stored.parts and digest.hexdigest() != stored.parts[index]:
                raise self._damaged(name)

        every = range(-(-size // part_size))
        with ThreadPoolExecutor(torch.get_num_threads() if stored.parts else 1) as pool:
            for _ in pool.map(check, every):  # raises what the first of them raised
                pass
        if not stored.parts:
            self._compare(name, whole.hexdigest())

    def _check(self, name: str, data: bytes) -> None:
        self._compare(name, hashlib.sha256(data).hexdigest())

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.manifest.members[name].sha256:
            raise self._damaged(name)

    def _damaged(self, name: str) -> FileError:
        return FileError(
            "the member is not what the manifest says: its SHA-256 differs", f"{self.path}: {name}", _AGAIN
        )

    def _check_members(self) -> None:
        """That the members are those of the manifest, of its sizes, and none of them is code."""
        sizes = self._source.sizes()
        for name in sizes:
            where = f"{self.path}: {name}"
            if name.lower().endswith(_CODE) or (
                self._source.head(name).startswith(_MAGIC) and not name.endswith(".safetensors")
            ):
                raise UnsafeFileError("the bundle holds a pickle or a program", where, "a bundle is data only")
            if name != MANIFEST and name not in self.manifest.members:
                raise FileError("the manifest does not list this member", where)
        for name, stored in self.manifest.members.items():
            if sizes.get(name) != stored.size:
                what = (
                    f"the member has {sizes[name]} bytes, not {stored.size}" if name in sizes else "a member is missing"
                )
                raise FileError(what, f"{self.path}: {name}", _AGAIN)

    @staticmethod
    def write(
        path: str | Path,
        manifest: Manifest,
        programs: Mapping[str, Program],
        files: Mapping[str, bytes] | None = None,
        storage_dtype: str = "",
    ) -> Manifest:
        """Write a bundle and return its manifest, completed.

        ``programs`` by component name, ``files`` by member name.  ``storage_dtype`` ``"float16"`` or ``"bfloat16"``
        stores float32 weights in half the bytes, rounded; tables of rotary positions stay.  The same arguments give the
        same bytes.  The file appears whole or not at all; raises :class:`FileError` where it cannot be written,
        :class:`RequestError` for a name that cannot be a member's.
        """
        path = Path(path)
        if storage_dtype and storage_dtype not in STORAGE:
            raise RequestError(
                f"weights cannot be stored as {storage_dtype!r}", "storage_dtype", f"use {' or '.join(STORAGE)}"
            )
        members = _members(path, programs, files or {}, storage_dtype)
        components = {name: Component.of(programs[name], storage_dtype) for name in sorted(programs)}
        full = replace(manifest, components=components, members={k: _stored(v) for k, v in sorted(members.items())})
        with write.atomic(path) as file:
            write.write_zip(file, {MANIFEST: [manifest_json.dumps(full)], **dict(sorted(members.items()))})
        return full


_AGAIN = "get the file again"


def _members(
    path: Path, programs: Mapping[str, Program], files: Mapping[str, bytes], storage_dtype: str
) -> dict[str, list[Any]]:
    members: dict[str, list[Any]] = {}
    for name, program in programs.items():
        if not COMPONENT_NAME.fullmatch(name):
            raise RequestError(f"{name!r} cannot be a component's name", mend="use lower-case letters, digits and _")
        weights = dict(program.weights)
        if storage_dtype:
            short = {k for k, v in weights.items() if v.dtype == torch.float32} - tables(program)
            weights = {k: converted(v, STORAGE[storage_dtype]) if k in short else v for k, v in weights.items()}
        members[f"components/{name}/graph.json"] = [graph_json.dumps(program)]
        members[f"components/{name}/weights.safetensors"] = list(safetensors.chunks(values(weights)))
    for name, data in files.items():
        archive.check_name(name, path)
        if (
            name.startswith("components/")
            or name == MANIFEST
            or name.lower().endswith(_CODE)
            or data.startswith(_MAGIC)
        ):
            raise RequestError(f"{name!r} cannot be a file of a bundle", where=str(path))
        members[name] = [data]
    return members


def _stored(pieces: Iterable[Any]) -> Stored:
    whole, parts, size = hashlib.sha256(), [hashlib.sha256()], 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        whole.update(view)
        while len(view):
            if size and size % manifest_json.PART == 0:
                parts.append(hashlib.sha256())
            now = view[: manifest_json.PART - size % manifest_json.PART]
            parts[-1].update(now)
            size, view = size + len(now), view[len(now) :]
    return Stored(size, whole.hexdigest(), tuple(p.hexdigest() for p in parts) if len(parts) > 1 else ())
