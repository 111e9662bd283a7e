"""Files -> Programs.  What a file is, its first bytes say, not its name."""

from __future__ import annotations

import os
from pathlib import Path

from fusegen.runtime.errors import FileError, UnsafeFileError
from fusegen.runtime.program import Program

_READ = "fusegen reads .pt2 (torch.export.save of PyTorch 2.11 to 2.13) and .fg"
_PICKLES = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"}


def read(path: str | os.PathLike[str], trust: bool = False) -> Program:
    """The program in a ``.pt2`` archive, or in a ``.fg`` bundle (file or folder) that holds just one.

    Raises :class:`FileError` for a file that is missing, damaged or of another kind, :class:`UnsafeFileError` for one
    that may hold code, :class:`GraphError` for a graph that cannot be read.  ``trust`` opens a ``.pt2`` that also
    holds compiled code or custom objects (they stay unopened) and lets its graph call operators of other libraries.
    """
    from fusegen.runtime.bundle import Bundle
    from fusegen.runtime.read import pt2
    from fusegen.runtime.read.archive import Archive

    path = Path(path)
    if path.is_dir():
        return Bundle.open(path).only()
    head = _head(path)
    if head.startswith(b"PK\3\4"):
        file = Archive(path)
        return Bundle(path, file).only() if "manifest.json" in file.members else pt2.read(file, trust)
    if head.startswith(b"\x80") or path.suffix.lower() in _PICKLES:
        raise UnsafeFileError("this is a pickle, which can run code, and is not opened", str(path), _READ)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        raise FileError(
            "this is a safetensors file: weights without a graph", str(path), "load the model's folder instead"
        )
    if path.suffix.lower() == ".onnx":
        raise FileError("ONNX graphs are not read yet", str(path), _READ)
    raise FileError("this is not a kind of file that is read", str(path), _READ)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except FileNotFoundError:
        raise FileError("there is no such file", where=str(path)) from None
    except OSError as error:
        raise FileError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
