"""What sessions make of a file's weights, kept in a folder: panels, taps, filters in Winograd's domain.

Making them takes longer than an evaluation; the next start maps them (docs/performance.md), and processes share the
pages.  Each is one raw file, written beside its place, synced and renamed: it is there as a whole or not at all.

    FOLDER / the model file's name and the hash of its path / a hash of what it depends on / a hash of what it is .bin

It depends on the model file's size and time, fusegen's sources and library, PyTorch's version and the CPU level:
whatever else a model's folder holds is out of date, and is removed when something is kept.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu import library
from fusegen.runtime.derived import Derived, Weight, sources
from fusegen.runtime.errors import FileError
from fusegen.runtime.read import archive
from fusegen.runtime.specialize import Strided, strided

_OURS = re.compile("[0-9a-f]{16}")  # a folder of ours, inside of a model's
_SOURCES = ("kernels", "runtime")
_MEND = "choose a folder that can be written, or leave it out"


class Prepared:
    """The folder.  Raises :class:`FileError` where it cannot be made."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"the folder cannot be made: {error.strerror}", str(folder), _MEND) from None

    def find(self, request: str, given: Mapping[str, Weight], made: Sequence[Strided]) -> list[Tensor] | None:
        """What was made of the weights ``given``, as ``request`` and the specs ``made`` have it; None where it is not
        kept, or is not of the size it should be."""
        paths = self._paths(request, given, made)
        if not paths or not all(p.is_file() and p.stat().st_size == s.nbytes for p, s in zip(paths, made, strict=True)):
            return None
        found = []
        for path, spec in zip(paths, made, strict=True):
            flat = archive.pages(archive.map_file(path), 0, spec.nbytes, alignment=1)
            archive.ask(flat)
            found.append(flat.view(spec.dtype).as_strided(spec.sizes, spec.strides))
        return found

    def keep(self, request: str, given: Mapping[str, Weight], values: Sequence[Tensor]) -> None:
        """Keep what was made, but for what comes of weights that are in no file.  Raises :class:`FileError` where it
        cannot be written."""
        made = [strided(v) for v in values]
        for path, value in zip(self._paths(request, given, made), values, strict=False):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                for other in path.parent.parent.iterdir():
                    if other != path.parent and _OURS.fullmatch(other.name):
                        shutil.rmtree(other, ignore_errors=True)
                _write(path, value)
            except OSError as error:
                raise FileError(
                    f"what was made of the weights cannot be kept: {error.strerror}", str(path), _MEND
                ) from None

    def _paths(self, request: str, given: Mapping[str, Weight], made: Sequence[Strided]) -> list[Path]:
        """Where each lies; none where a weight is in no file, or a value is empty or has gaps."""
        origins = [archive.origin(t) for w in given.values() for t in sources(w)]
        if not origins or None in origins or not all(_whole(spec) for spec in made):
            return []
        first = origins[0]
        assert first is not None
        model = f"{first.path.name}-{_hash(str(first.path))[:8]}"
        files = dict.fromkeys(f"{o.path} {o.size} {o.time}" for o in origins if o)
        depends = _hash(_build(), library.level(), *files)
        what = _hash(request, *(_described(w) for w in given.values()), *(str(spec.dense()) for spec in made))
        return [self.folder / model / depends / f"{what}{i}.bin" for i in range(len(made))]


def _write(path: Path, value: Tensor) -> None:
    """All of the file, or none of it."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.as_strided(value, (value.numel(),), (1,)).view(torch.uint8).numpy().tofile(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _whole(spec: Strided) -> bool:
    """Whether its elements fill its memory, without gaps, in some order."""
    reach = 1
    for stride, size in sorted((st, s) for s, st in zip(spec.sizes, spec.strides, strict=True) if s != 1):
        if stride != reach:
            return False
        reach *= size
    return reach > 0


def _described(weight: Weight) -> str:
    """Which bytes of its files a weight is, and what is made of them."""
    if isinstance(weight, Derived):
        return f"{_function(weight.function)}({', '.join(map(_described, weight.of))})"
    at = archive.origin(weight)
    return f"{at and at.offset} {weight.dtype} {tuple(weight.shape)} {weight.stride()}"


def _function(function: Any) -> str:
    """A function's place in the sources, and the values that it is bound to."""
    if isinstance(function, functools.partial):
        return f"{_function(function.func)} {function.args} {sorted(function.keywords.items())}"
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    where = f"{function.__module__} {function.__qualname__} {code.co_firstlineno if code else ''}"
    return f"{where} {[cell.cell_contents for cell in cells]}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _build() -> str:
    """The hash of what makes the values: our sources and library, and PyTorch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).parent.parent
    for path in sorted(p for name in _SOURCES for p in (root / name).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    if library.available():
        digest.update(library.path().read_bytes())
    return digest.hexdigest()
