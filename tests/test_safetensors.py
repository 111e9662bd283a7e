"""The safetensors reader: what others write it reads, what is malformed it refuses."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch

from fusegen.runtime.errors import FileError
from fusegen.runtime.read import safetensors


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(name: str, shape: Any, *offsets: int, dtype: str = "U8") -> str:
    return f'"{name}": {json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})}'


def entries(*parts: str) -> bytes:
    return ("{" + ", ".join(parts) + "}").encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(b"{}", length=2**63), "header claims 9223372036854775808 bytes"),
        (header(b"{}", length=2**26), "header claims"),
        (b"1234", "header claims"),
        (header(entries(entry("a", [4], 0, 4)), b"123"), "do not fit"),
        (header(entries(entry("a", [2**40, 2**40], 0, 4)), b"1234"), "do not fit"),
        (header(entries(entry("a", [4], 0, 4), entry("b", [4], 2, 6)), b"123456"), "overlaps another or leaves a hole"),
        (header(entries(entry("a", [2], 0, 2), entry("b", [2], 4, 6)), b"123456"), "overlaps another or leaves a hole"),
        (header(entries(entry("a", [2], 0, 2)), b"123"), "belong to no tensor"),
        (header(entries(entry("a", [1], 0, 1), entry("a", [1], 1, 2)), b"12"), "a key stands twice"),
        (header(entries(entry("a", [-1], 0, 1)), b"1"), "not whole numbers"),
        (header(entries(entry("a", [1], 0, 1, dtype="I3")), b"1"), "dtype 'I3'"),
        (header(b'{"a": {"dtype": "U8"}}'), "not of the safetensors format"),
        (header(b"{" * 99), "JSON is damaged"),
    ],
)
def test_malformed_safetensors(data: bytes, message: str) -> None:
    with pytest.raises(FileError, match=message) as error:
        safetensors.read(data, 0, len(data), "some.file")
    assert "some.file" in str(error.value)


def test_safetensors_as_others_read_and_write_them() -> None:
    torch_form = pytest.importorskip("safetensors.torch")
    tensors = {
        "a": torch.randn(3, 5),
        "é": torch.arange(7, dtype=torch.uint8),
        "n": torch.empty(0, 2),
        "s": torch.tensor(2.0),
    }
    ours = b"".join(memoryview(p).cast("B") for p in safetensors.chunks(tensors))
    theirs = torch_form.save(tensors, metadata={"format": "pt"})
    for got in (torch_form.load(ours), safetensors.read(theirs, 0, len(theirs), "theirs")):
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tensors.items())
