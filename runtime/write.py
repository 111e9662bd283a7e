"""Writing files that are whole or not there: a temporary file beside the target, flushed, then renamed over it."""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fusegen.runtime.errors import FileError

ALIGNMENT = 64
_VERSION, _VERSION64 = 20, 45
_DATE = 33  # 1 January 1980, the first day a zip can say: bytes must not depend on the clock
_UTF8 = 0x800
_PADDING = 0xD935  # the extra field that Android's zipalign pads with
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``path`` on leaving without an error.

    Otherwise what stood at ``path`` stays.  A process that is killed may leave a hidden ``*.part`` beside it.  Raises
    :class:`FileError` where the folder is missing or the disk is full.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"the file cannot be written: {error.strerror}", where=str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself last; some systems cannot open a folder, and need not."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_zip(file: BinaryIO, members: Mapping[str, Iterable[Any]]) -> None:
    """Write a zip of stored members, each given in pieces (buffers); every member's bytes begin at a multiple of 64.

    Large files (members or offsets over 4 GiB) get zip64 fields.
    """
    directory, offset = [], 0
    for name, pieces in members.items():
        pieces = [memoryview(p).cast("B") for p in pieces]
        size, check = sum(len(p) for p in pieces), 0
        for piece in pieces:
            check = zlib.crc32(piece, check)
        head = _local(name.encode(), size, check, offset)
        file.write(head)
        for piece in pieces:
            file.write(piece)
        directory.append(_central(name.encode(), size, check, offset))
        offset += len(head) + size
    listing = b"".join(directory)
    file.write(listing + _end(len(directory), len(listing), offset))


def _local(name: bytes, size: int, check: int, offset: int) -> bytes:
    wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _FULL32 else b""
    fixed = 30 + len(name) + len(wide) + 4
    padding = -(offset + fixed) % ALIGNMENT
    extra = wide + struct.pack("<2H", _PADDING, padding) + bytes(padding)
    shown = _FULL32 if wide else size
    version = _VERSION64 if wide else _VERSION
    return struct.pack(
        "<4s5H3L2H", b"PK\3\4", version, _UTF8, 0, 0, _DATE, check, shown, shown, len(name), len(extra)
    ) + (name + extra)


def _central(name: bytes, size: int, check: int, offset: int) -> bytes:
    numbers = [*([size, size] if size >= _FULL32 else []), *([offset] if offset >= _FULL32 else [])]
    extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    version = _VERSION64 if numbers else _VERSION
    shown, place = min(size, _FULL32), min(offset, _FULL32)
    fields = (version, version, _UTF8, 0, 0, _DATE, check, shown, shown, len(name), len(extra), 0, 0, 0, 0, place)
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name + extra


def _end(entries: int, length: int, offset: int) -> bytes:
    wide = b""
    if entries >= _FULL16 or length >= _FULL32 or offset >= _FULL32:
        at = offset + length
        wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, _VERSION64, _VERSION64, 0, 0, entries, entries, length, offset)
        wide += struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        entries, length, offset = min(entries, _FULL16), min(length, _FULL32), min(offset, _FULL32)
    return wide + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, entries, entries, length, offset, 0)
