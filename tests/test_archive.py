"""The zip reader against archives made to harm: bounded, and refused in one line."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusegen.runtime.errors import FileError
from fusegen.runtime.read import archive
from fusegen.runtime.read.archive import Archive
from fusegen.runtime.write import write_zip


def zipped(*names: str, data: bytes = b"data") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicates
        for name in names:
            file.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def end(entries: int, length: int, offset: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, entries, entries, length, offset, 0)


def overlapping() -> bytes:
    """Two directory entries for one member's bytes, as in Fifield's bomb."""
    raw = bytearray(zipped("aa", "bb"))
    second = raw.rfind(b"PK\1\2")
    raw[second + 42 : second + 46] = bytes(4)
    raw[second + 46 : second + 48] = b"aa"
    return bytes(raw)


def other_local_name() -> bytes:
    raw = bytearray(zipped("aa"))
    raw[30:32] = b"zz"
    return bytes(raw)


def member_past_the_end() -> bytes:
    raw = bytearray(zipped("aa"))
    at = raw.rfind(b"PK\1\2")
    raw[at + 20 : at + 28] = struct.pack("<2L", 10**6, 10**6)
    return bytes(raw)


def encrypted() -> bytes:
    raw = bytearray(zipped("aa"))
    raw[raw.rfind(b"PK\1\2") + 8] |= 1
    return bytes(raw)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"PK\3\4" + bytes(100), "not a zip file, or it is truncated"),
        (zipped("a")[:-1], "truncated or damaged"),
        (zipped("a") + b"more", "its end is not where its directory says"),
        (b"PK\3\4" + end(1, 46, 10**6), "its directory lies outside it"),
        (b"PK\3\4" + end(1, 2**31, 0), "more than are read"),
        (b"PK\3\4" + end(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), "a record lies outside it"),
        (bytes(50) + end(3, 46, 4), "a record is not where it should be"),
        (zipped("a", "a"), "'a' stands in the zip twice"),
        (zipped("../a"), r"'\.\./a' is not allowed"),
        (zipped("a/../../b"), "is not allowed"),
        (zipped("/etc/passwd"), "is not allowed"),
        (zipped("C:\\x"), "is not allowed"),
        (zipped("a\x01b"), "is not allowed"),
        (zipped("x" * 600), "is not allowed"),
        (overlapping(), "stands in the zip twice|overlaps another"),
        (other_local_name(), "two names"),
        (member_past_the_end(), "lies outside the file"),
        (encrypted(), "compressed or encrypted"),
    ],
)
def test_harmful_archives(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    with pytest.raises(FileError, match=message) as error:
        Archive(path)
    assert str(path) in str(error.value)


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        write_zip(file, {f"{i}": [] for i in range(11)})
    with pytest.raises(FileError, match="claims 11 members"):
        Archive(path)


def test_a_member_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped("a", data=bytes(100)))
    with pytest.raises(FileError, match="100 bytes where at most 99 are read"):
        Archive(path).content("a", 99)


@given(st.data())
def test_damaged_archives_raise_only_our_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(zipped("manifest.json", "b/c"))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.zip"
    path.write_bytes(raw)
    try:
        opened = Archive(path)
        for name, size in opened.sizes().items():
            assert len(opened.content(name, 10**6)) == size
    except FileError:
        pass


def test_a_tensor_knows_its_place_in_a_file_and_can_ask_for_its_pages(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    data = archive.map_file(path)
    tensor = archive.pages(data, 4096, 8192, 1)
    archive.ask(tensor)
    found = archive.origin(tensor[100:])
    assert found is not None and (found.path, found.size, found.offset) == (path, 256 * 64, 4196)
    assert found.time == path.stat().st_mtime_ns and tensor[5] == 5
    elsewhere = torch.zeros(4)
    archive.ask(elsewhere)
    assert archive.origin(elsewhere) is None
