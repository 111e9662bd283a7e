"""Zip archives whose members are stored, mapped into memory; every offset and length is checked before it is used.

Only stored members are accepted, so nothing in an archive can grow when read; a reader works on the file's own pages.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.errors import FileError

MAX_MEMBERS = 65_536
MAX_DIRECTORY = 32 << 20  # bytes of the central directory
MAX_NAME = 512
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED, _STORED, _ZIP64 = 1, 0, 1
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_BAD_NAME = re.compile(r"(^|/)\.{1,2}(/|$)|^/|//|[\\:\x00-\x1f\x7f]")
_MEND = "get the file again, or write it again"
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which this Python does not name


@dataclass(frozen=True)
class _Mapped:
    """A mapped file: where its pages begin, and what it was when it was mapped."""

    start: int
    path: Path
    size: int
    time: int  # of its last change, nanoseconds


@dataclass(frozen=True)
class Origin:
    """The byte of a file at which a tensor begins; of the file its absolute path, size and time (nanoseconds)."""

    path: Path
    size: int
    time: int
    offset: int


_MAPPED: weakref.WeakKeyDictionary[mmap.mmap, _Mapped] = weakref.WeakKeyDictionary()


def map_file(path: Path) -> mmap.mmap:
    """The file's pages, mapped privately: nothing that writes to them reaches the file."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            known = os.fstat(file.fileno())
        start = torch.frombuffer(data, dtype=torch.uint8, count=1).data_ptr()
        _MAPPED[data] = _Mapped(start, path.absolute(), known.st_size, known.st_mtime_ns)
        return data
    except FileNotFoundError:
        raise FileError("there is no such file", where=str(path)) from None
    except ValueError:
        raise FileError("the file is empty", where=str(path), mend=_MEND) from None
    except OSError as error:
        raise FileError(f"the file cannot be read: {error.strerror}", where=str(path)) from None


def check_name(name: str, path: Path) -> str:
    """A member's name that stays inside its archive, in one spelling; else :class:`FileError`."""
    if not name or len(name) > MAX_NAME or _BAD_NAME.search(name):
        raise FileError(f"the member name {name[:80]!r} is not allowed", where=str(path))
    return name


def release(tensor: Tensor) -> None:
    """Give the whole pages of a mapped file under ``tensor`` back to the system, which reads them again when they are
    asked for.  Nothing for a tensor that lies elsewhere.  What was written to the pages would be lost; nobody may."""
    for data, _, begin, end in _under(tensor):
        low, high = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
        if low < high and hasattr(mmap, "MADV_DONTNEED"):
            data.madvise(mmap.MADV_DONTNEED, low * mmap.PAGESIZE, (high - low) * mmap.PAGESIZE)


def ask(tensor: Tensor) -> None:
    """Map the pages of a file under ``tensor``, all of which will be read, in one call: met one by one they take four
    times as long.  Nothing for a tensor that lies elsewhere, or where the system has no such call."""
    for data, _, begin, end in _under(tensor):
        low = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an older kernel's
                data.madvise(_POPULATE_READ, low, end - low)


def origin(tensor: Tensor) -> Origin | None:
    """Where in which mapped file ``tensor`` begins; None where it lies elsewhere."""
    for _, file, _, _ in _under(tensor):
        return Origin(file.path, file.size, file.time, tensor.data_ptr() - file.start)
    return None


def _under(tensor: Tensor) -> list[tuple[mmap.mmap, _Mapped, int, int]]:
    """The mapped file in which a tensor's storage lies, its first byte there and the one past its last; or none."""
    begin = tensor.untyped_storage().data_ptr()
    end = begin + tensor.untyped_storage().nbytes()
    return [
        (data, file, begin - file.start, end - file.start)
        for data, file in list(_MAPPED.items())
        if file.start <= begin and end <= file.start + len(data)
    ]


def pages(data: Any, offset: int, size: int, alignment: int) -> Tensor:
    """``size`` bytes of a mapped file from ``offset``, uint8: a view, or a copy where they are not aligned."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    if offset % alignment:
        data, offset = bytearray(memoryview(data)[offset : offset + size]), 0
    return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=offset)


@dataclass(frozen=True)
class Member:
    """Where a member's bytes stand in the file."""

    offset: int
    size: int


class Archive:
    """The members of a zip file, by name, in the order of its directory.

    Raises :class:`FileError` for what is not a zip, is truncated, or has members that are compressed, encrypted,
    overlapping, duplicated, or named so as to lead out of it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data = map_file(path)
        self.members: Mapping[str, Member] = self._members()

    def content(self, name: str, limit: int) -> bytes:
        """A copy of a member of at most ``limit`` bytes."""
        member = self.member(name)
        if member.size > limit:
            raise FileError(f"{member.size} bytes where at most {limit} are read", where=f"{self.path}: {name}")
        return self.data[member.offset : member.offset + member.size]

    def member(self, name: str) -> Member:
        """The member called ``name``; :class:`FileError` where there is none."""
        if name not in self.members:
            raise FileError("a member is missing", where=f"{self.path}: {name}", mend=_MEND)
        return self.members[name]

    def span(self, name: str) -> tuple[mmap.mmap, int, int]:
        """A member's mapping, first byte and size."""
        member = self.member(name)
        return self.data, member.offset, member.size

    def head(self, name: str) -> bytes:
        """A member's first bytes."""
        member = self.member(name)
        return self.data[member.offset : member.offset + min(16, member.size)]

    def sizes(self) -> dict[str, int]:
        """Member name -> bytes."""
        return {name: member.size for name, member in self.members.items()}

    def _fail(self, what: str) -> FileError:
        return FileError(what, where=str(self.path), mend=_MEND)

    def _unpack(self, form: struct.Struct, offset: int, magic: bytes) -> tuple[Any, ...]:
        if not 0 <= offset <= len(self.data) - form.size:
            raise self._fail("the zip is truncated or damaged: a record lies outside it")
        fields = form.unpack_from(self.data, offset)
        if fields[0] != magic:
            raise self._fail("the zip is damaged: a record is not where it should be")
        return fields

    def _directory(self) -> tuple[int, int, int]:
        """Offset, length and number of entries of the central directory."""
        at = self.data.rfind(b"PK\5\6", max(0, len(self.data) - _END.size - _FULL16))
        if at < 0:
            raise self._fail("this is not a zip file, or it is truncated: it has no directory")
        *_, entries, length, offset, comment = self._unpack(_END, at, b"PK\5\6")
        if at + _END.size + comment != len(self.data):
            raise self._fail("the zip is damaged: its end is not where its directory says")
        if entries == _FULL16 or _FULL32 in (length, offset):
            _, _, start, _ = self._unpack(_LOCATOR64, at - _LOCATOR64.size, b"PK\6\7")
            *_, entries, length, offset = self._unpack(_END64, start, b"PK\6\6")
        if entries > MAX_MEMBERS or length > MAX_DIRECTORY:
            raise self._fail(f"the zip claims {entries} members in a directory of {length} bytes, more than are read")
        if offset + length > at:
            raise self._fail("the zip is damaged: its directory lies outside it")
        return offset, length, entries

    def _members(self) -> dict[str, Member]:
        start, length, entries = self._directory()
        found: dict[str, Member] = {}
        at, reached = start, 0
        for _ in range(entries):
            fields = self._unpack(_CENTRAL, at, b"PK\1\2")
            names = at + _CENTRAL.size
            at = names + sum(fields[10:13])
            if at > start + length:
                raise self._fail("the zip is damaged: its directory is longer than it says")
            raw = self.data[names : names + fields[10]]
            name, member = self._entry(fields, raw, self.data[names + fields[10] : names + fields[10] + fields[11]])
            if name in found:
                raise self._fail(f"the member {name!r} stands in the zip twice")
            found[name] = member
        for name, member in sorted(found.items(), key=lambda item: (item[1].offset, item[1].size)):
            if member.offset < reached or member.offset + member.size > start:
                raise self._fail(f"the member {name!r} overlaps another or lies outside the file")
            reached = member.offset + member.size
        return {name: member for name, member in found.items() if not name.endswith("/")}

    def _entry(self, fields: tuple[Any, ...], raw: bytes, extra: bytes) -> tuple[str, Member]:
        flags, method = fields[3], fields[4]
        try:
            name = check_name(raw.decode("utf-8"), self.path)
        except UnicodeDecodeError:
            raise self._fail("a member's name is not UTF-8") from None
        packed, size, offset = self._wide(fields, extra)
        if flags & _ENCRYPTED or method != _STORED or packed != size:
            raise FileError("the member is compressed or encrypted", f"{self.path}: {name}", "store it: zip -0")
        local = self._unpack(_LOCAL, offset, b"PK\3\4")
        begin = offset + _LOCAL.size
        if self.data[begin : begin + local[9]] != raw:
            raise self._fail(f"the zip gives the member {name!r} two names")
        return name, Member(begin + local[9] + local[10], size)

    def _wide(self, fields: tuple[Any, ...], extra: bytes) -> tuple[int, int, int]:
        """Packed size, size and offset; in a large archive an extra field holds those that are all ones."""
        packed, size, offset = fields[8], fields[9], fields[16]
        wide = iter(_zip64(extra))
        try:
            size = next(wide) if size == _FULL32 else size
            packed = next(wide) if packed == _FULL32 else packed
            offset = next(wide) if offset == _FULL32 else offset
        except StopIteration:
            raise self._fail("the zip is damaged: a large member lacks its size") from None
        return packed, size, offset


def _zip64(extra: bytes) -> Iterator[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + size]
        if kind == _ZIP64:
            yield from (v for (v,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8]))
        at += 4 + size
