"""``.pt2`` archives as ``torch.export.save`` writes them (PyTorch 2.11 to 2.13), read without unpickling anything.

Members: ``models/<name>.json`` (the graph), ``data/weights/<name>_weights_config.json`` and raw ``weight_<i>`` bytes,
``data/constants/`` likewise, ``data/sample_inputs/<name>.pt`` (a pickle, never opened).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.errors import Error, FileError, UnsafeFileError
from fusegen.runtime.program import Program
from fusegen.runtime.read import archive, exported, json_text, values

MAX_LOGICAL = 1 << 40  # bytes a tensor may seem to have, however few stand behind it (a stride may be zero)
_MODELS, _WEIGHTS, _CONSTANTS = "models/", "data/weights/", "data/constants/"
_DATA = (_MODELS, _WEIGHTS, _CONSTANTS, "data/sample_inputs/", "extra/", ".data/")
_FILES = ("archive_format", "archive_version", "byteorder", "version")
_OLD = "serialized_exported_program.json"
_AGAIN = "export again with torch.export.save of PyTorch 2.11 to 2.13"


def read(file: archive.Archive, trust: bool = False) -> Program:
    """The one program in the archive; its weights are views of the file.

    Raises :class:`FileError` where the archive is damaged or not of this kind, :class:`UnsafeFileError` where it holds
    compiled code, custom objects or pickled weights, and :class:`GraphError` where the graph cannot be read.  With
    ``trust``, compiled code and custom objects that the graph does not use are left unopened, and operators of other
    libraries are looked up; pickles are never opened.
    """
    reader = _Pt2(file, trust)
    reader.check_members()
    name = reader.model()
    document = reader.json(f"{_MODELS}{name}.json", json_text.MAX_GRAPH)
    weights = reader.tensors(_WEIGHTS, f"{name}_weights_config.json")
    weights.update(reader.tensors(_CONSTANTS, f"{name}_constants_config.json"))
    try:
        return exported.program(document, weights, file.path.stem, trust)
    except Error as error:
        raise type(error)(error.what, f"{file.path}: {error.where}", error.mend) from None


class _Pt2:
    def __init__(self, file: archive.Archive, trust: bool):
        self.file, self.trust = file, trust
        roots = {name.split("/", 1)[0] for name in file.members}
        if any(name.endswith(_OLD) for name in file.members):
            raise UnsafeFileError("this .pt2 is of the old kind, whose weights are pickled", str(file.path), _AGAIN)
        if any(name.endswith("/data.pkl") for name in file.members):
            raise UnsafeFileError(
                "this is a pickle in a zip, as torch.save writes, and is not opened", str(file.path), _AGAIN
            )
        if len(roots) != 1 or f"{min(roots)}/archive_format" not in file.members:
            raise FileError("this zip is not what torch.export.save writes", where=str(file.path))
        self.root = f"{roots.pop()}/"

    def where(self, name: str) -> str:
        return f"{self.file.path}: {name}"

    def text(self, name: str, limit: int) -> bytes:
        return self.file.content(self.root + name, limit)

    def json(self, name: str, limit: int) -> dict[str, Any]:
        return json_text.load_object(self.text(name, limit), self.where(name))

    def names(self) -> list[str]:
        return [n.removeprefix(self.root) for n in self.file.members]

    def check_members(self) -> None:
        """The archive's kind, version and byte order; and that no member is code."""
        for name, wanted in (("archive_format", b"pt2"), ("archive_version", b"0"), ("byteorder", b"little")):
            if self.root + name in self.file.members and self.text(name, 64).strip() != wanted:
                raise FileError(f"{name} is not {wanted.decode()!r}", where=self.where(name), mend=_AGAIN)
        for name in self.names():
            if name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith(".pt"):
                raise UnsafeFileError("the weights are pickled, and no pickle is opened", self.where(name), _AGAIN)
            custom = name.startswith((_CONSTANTS + "custom_obj_", _CONSTANTS + "opaque_obj_"))
            if (custom or (not name.startswith(_DATA) and name not in _FILES)) and not self.trust:
                kind = "a custom object" if custom else "what may be code"
                raise UnsafeFileError(
                    f"the archive holds {kind}", self.where(name), "pass trust=True to leave it unopened"
                )

    def model(self) -> str:
        """The name of the one model."""
        found = [n.removeprefix(_MODELS).removesuffix(".json") for n in self.names() if n.startswith(_MODELS)]
        if len(found) != 1:
            raise FileError(f"the archive holds {len(found)} programs where one is read", where=str(self.file.path))
        return found[0]

    def tensors(self, folder: str, config: str) -> dict[str, Tensor]:
        """The tensors that a configuration member describes; those of one member share its memory."""
        where = folder + config
        table = self.json(where, json_text.MAX_CONFIG).get("config")
        if not isinstance(table, dict):
            raise FileError("the weights are not described as torch.export.save does", where=self.where(where))
        out: dict[str, Tensor] = {}
        bases: dict[str, Tensor] = {}
        for name, meta in table.items():
            try:
                found = self._tensor(folder, meta, bases)
            except Error as error:
                raise type(error)(error.what, error.where or self.where(f"{where}, {name}"), error.mend) from None
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
                raise FileError(
                    f"the tensor is not described as torch.export.save does: {error!r}"[:200],
                    self.where(f"{where}, {name}"),
                ) from None
            if found is not None:
                out[name] = found
        return out

    def _tensor(self, folder: str, meta: Mapping[str, Any], bases: dict[str, Tensor]) -> Tensor | None:
        path = meta["path_name"]
        if meta["use_pickle"] is not False:
            if self.trust and meta["tensor_meta"] is None:
                return None  # a custom object: the graph is refused if it uses one
            raise UnsafeFileError("the tensor is pickled, and no pickle is opened", mend=_AGAIN)
        detail = meta["tensor_meta"]
        dtype = values.dtype(detail["dtype"])
        values.layout(detail["layout"])
        sizes, strides = ([_whole(v) for v in detail[key]] for key in ("sizes", "strides"))
        offset = _whole(detail["storage_offset"])
        member = self.file.member(self.root + folder + path)
        numel = math.prod(sizes)
        if len(sizes) != len(strides) or len(sizes) > 64 or numel * dtype.itemsize > MAX_LOGICAL:
            raise FileError(f"a tensor of sizes {sizes} and strides {strides} is not possible"[:200])
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) if numel else -1
        if (last + 1) * dtype.itemsize > member.size:
            raise FileError(
                f"the tensor needs {(last + 1) * dtype.itemsize} bytes of {folder}{path}, which has {member.size}"
            )
        if numel == 0:
            return torch.empty(sizes, dtype=dtype)
        if path not in bases:
            bases[path] = archive.pages(self.file.data, member.offset, member.size, alignment=16)
        usable = member.size // dtype.itemsize * dtype.itemsize
        return bases[path][:usable].view(dtype).as_strided(sizes, strides, offset)


def _whole(value: Mapping[str, Any]) -> int:
    tag, number = values.union(value)
    if tag != "as_int" or type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a whole number")
    return number
