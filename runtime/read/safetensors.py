"""The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes without holes.

The header is checked whole before a tensor is made of it.  Source: the format's description in its README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.errors import FileError
from fusegen.runtime.read import archive, json_text

MAX_HEADER = 64 << 20
ALIGNMENT = 64  # bytes: a cache line, and the widest vector
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {v: k for k, v in DTYPES.items()}


def read(data: Any, start: int, size: int, where: str) -> dict[str, Tensor]:
    """The tensors in ``size`` bytes of the mapped file ``data`` from ``start``: views of its pages.

    Raises :class:`FileError` for a header that is too large, is not JSON, repeats a key, or whose offsets overlap,
    leave holes or lead outside the file.
    """
    header_size = int.from_bytes(data[start : start + 8], "little") if size >= 8 else -1
    if not 2 <= header_size <= min(MAX_HEADER, size - 8):
        raise FileError(
            f"the safetensors header claims {header_size} bytes of {size}", where=where, mend="get the file again"
        )
    header = json_text.load_object(data[start + 8 : start + 8 + header_size], where)
    header.pop("__metadata__", None)
    begin, left = start + 8 + header_size, size - 8 - header_size
    entries = {name: _entry(entry, left, f"{where}: {name[:120]}") for name, entry in header.items()}
    reached = 0
    for name, (_, _, low, high) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if low != reached:
            raise FileError("the tensor overlaps another or leaves a hole", where=f"{where}: {name[:120]}")
        reached = high
    if reached != left:
        raise FileError(f"{left - reached} bytes belong to no tensor", where=where, mend="get the file again")
    out: dict[str, Tensor] = {}
    for name, (dtype, shape, low, high) in entries.items():
        flat = archive.pages(data, begin + low, high - low, alignment=dtype.itemsize)
        out[name] = flat.view(dtype).reshape(shape)
    return out


def _entry(entry: Any, left: int, where: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first and last byte of a tensor whose header is sound."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError("the tensor's header is not of the safetensors format", where=where)
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise FileError(f"the dtype {str(name)[:20]!r} is not one that can be read", where=where)
    numbers = isinstance(shape, list) and isinstance(offsets, list) and all(_whole(v) for v in (*shape, *offsets))
    if not numbers or len(offsets) != 2 or len(shape) > 64:
        raise FileError("the tensor's shape or offsets are not whole numbers", where=where)
    low, high = offsets
    if not low <= high <= left or high - low != math.prod(shape) * DTYPES[name].itemsize:
        raise FileError(f"the tensor's offsets {offsets} do not fit its shape or the file"[:200], where=where)
    return DTYPES[name], tuple(shape), low, high


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def chunks(tensors: Mapping[str, Tensor]) -> Iterable[Any]:
    """The file's bytes in pieces: the header, then each tensor; the same tensors give the same bytes.

    Tensors whose size is a multiple of :data:`ALIGNMENT` come first, so that each of them is aligned.
    """
    order = sorted(tensors, key=lambda n: (tensors[n].nbytes % ALIGNMENT != 0, -tensors[n].itemsize, n))
    header: dict[str, Any] = {}
    reached = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise FileError(f"{tensor.dtype} cannot be stored", where=name)
        span = [reached, reached + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        reached = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    pieces: list[Any] = [len(text).to_bytes(8, "little") + text]
    for name in order:
        if tensors[name].numel():
            pieces.append(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return pieces
