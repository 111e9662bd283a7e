"""Reading .pt2 archives: the same program as the module's, and no pickle is ever opened."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpret import interpret
from torch import Tensor, nn

from fusegen.runtime.api import read
from fusegen.runtime.errors import Error, FileError, UnsafeFileError
from fusegen.runtime.write import write_zip


class Toy(nn.Module):
    """Shared and strided weights, an expanded buffer, an empty one, a constant."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(10, 6)
        self.a = nn.Parameter(base[2:6].t())
        self.register_buffer("b", base[1:5, 1:].half())
        self.register_buffer("whole", base)
        self.register_buffer("row", base[3])
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("none", torch.empty(0, 4), persistent=False)
        self.scale = torch.tensor([2.0, 3.0, 4.0, 5.0])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x @ self.a * self.scale + self.wide, self.none])
        return y @ self.b[:, :4].float() + self.whole[0, :4] + self.row[:4]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path, toy = tmp_path_factory.mktemp("pt2") / "toy.pt2", Toy()
    n = torch.export.Dim("n", min=1, max=9)
    torch.export.save(torch.export.export(toy, (torch.randn(3, 6),), dynamic_shapes={"x": {0: n}}), path)
    return path, toy


Members = dict[str, bytes]


def changed(saved: tuple[Path, nn.Module], tmp_path: Path, change: Callable[[Members], Any]) -> Path:
    """A copy of the archive whose members ``change`` has changed (names without the archive's root)."""
    with zipfile.ZipFile(saved[0]) as file:
        members = {n.removeprefix("toy/"): file.read(n) for n in file.namelist()}
    change(members)
    path = tmp_path / "changed.pt2"
    with path.open("wb") as out:
        write_zip(out, {f"toy/{k}": [v] for k, v in members.items()})
    return path


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Members], None]:
    """Change a JSON member."""

    def run(members: Members) -> None:
        document = json.loads(members[name])
        change(document)
        members[name] = json.dumps(document).encode()

    return run


WEIGHTS, CONSTANTS, MODEL = (
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
    "models/model.json",
)


def test_program_means_what_the_module_does(saved: tuple[Path, nn.Module]) -> None:
    program = read(saved[0])
    assert program.name == "toy"
    assert list(program.symbols.values()) == [(1, 9)]
    for n in (1, 4):
        x = torch.randn(n, 6)
        with torch.no_grad():
            assert torch.equal(interpret(program, x)[0], saved[1](x))
    assert program.weights["a"].stride() == (1, 6)
    assert program.weights["whole"].untyped_storage().data_ptr() == program.weights["row"].untyped_storage().data_ptr()
    assert program.weights["wide"].stride() == (0,)


def test_weights_are_the_file_s_own_pages(saved: tuple[Path, nn.Module]) -> None:
    before = saved[0].read_bytes()
    weight = read(saved[0]).weights["whole"]
    weight.zero_()  # a private page: the file stays
    assert saved[0].read_bytes() == before
    maps = Path("/proc/self/maps").read_text()
    ranges = [tuple(int(v, 16) for v in line.split()[0].split("-")) for line in maps.splitlines() if "toy.pt2" in line]
    assert any(low <= weight.data_ptr() < high for low, high in ranges)


class Planted:
    """A pickle that, once opened, leaves a file behind."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_planted_pickles_are_not_opened(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    planted = pickle.dumps(Planted(canary))
    pickle.loads(planted)
    assert canary.exists()  # the trap works
    canary.unlink()

    read(changed(saved, tmp_path, lambda m: m.update({"data/sample_inputs/model.pt": planted})))
    for name in (WEIGHTS, CONSTANTS, MODEL):
        with pytest.raises(FileError, match="JSON"):
            read(changed(saved, tmp_path, lambda m, name=name: m.update({name: planted})), trust=True)
    for name in ("data/weights/model.pt", "data/constants/model.pt"):
        with pytest.raises(UnsafeFileError, match="no pickle is opened"):
            read(changed(saved, tmp_path, lambda m, name=name: m.update({name: planted})), trust=True)

    def use_pickle(members: Members) -> None:
        def mark(document: Any) -> None:
            document["config"]["row"]["use_pickle"] = True

        edit(WEIGHTS, mark)(members)
        members["data/weights/weight_0"] = planted + bytes(4096)

    for trust in (False, True):
        with pytest.raises(UnsafeFileError, match="no pickle is opened"):
            read(changed(saved, tmp_path, use_pickle), trust=trust)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    ["data/aotinductor/model/x.so", "data/constants/custom_obj_0", "data/constants/opaque_obj_0", "x.cpp", "model.pkl"],
)
def test_what_may_be_code_needs_trust(saved: tuple[Path, nn.Module], tmp_path: Path, name: str) -> None:
    path = changed(saved, tmp_path, lambda m: m.update({name: b"\x7fELF"}))
    with pytest.raises(UnsafeFileError, match="pass trust=True") as error:
        read(path)
    assert name in str(error.value)
    assert read(path, trust=True).nodes


def set_meta(name: str, key: str, value: Any) -> Callable[[Members], None]:
    def change(document: Any) -> None:
        document["config"][name]["tensor_meta"][key] = value

    return edit(WEIGHTS, change)


def ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": v} for v in values]


def set_schema(major: int) -> Callable[[Members], None]:
    return edit(MODEL, lambda d: d["schema_version"].update(major=major))


FAULTS: dict[str, tuple[Callable[[Members], Any], str]] = {
    "missing weight bytes": (lambda m: m.pop("data/weights/weight_0"), "a member is missing"),
    "short weight bytes": (lambda m: m.update({"data/weights/weight_0": b"1234"}), "the tensor needs"),
    "size outside": (set_meta("whole", "sizes", ints(11, 6)), "the tensor needs"),
    "size overflows": (set_meta("whole", "sizes", ints(2**62, 2**62)), "is not possible"),
    "huge by stride zero": (set_meta("wide", "sizes", ints(2**50)), "is not possible"),
    "offset outside": (set_meta("whole", "storage_offset", {"as_int": 2**61}), "the tensor needs"),
    "negative stride": (set_meta("whole", "strides", ints(-6, 1)), "is not a whole number"),
    "negative size": (set_meta("whole", "sizes", ints(-1, 6)), "is not a whole number"),
    "strides of another rank": (set_meta("whole", "strides", ints(1)), "is not possible"),
    "alien dtype": (set_meta("whole", "dtype", 99), "dtype number 99"),
    "sparse": (set_meta("whole", "layout", 1), "sparse or opaque"),
    "symbolic size": (
        set_meta("whole", "sizes", [{"as_expr": {"expr_str": "__import__('os')"}}]),
        "is not a whole number",
    ),
    "member outside": (edit(WEIGHTS, lambda d: d["config"]["a"].update(path_name="../x")), "a member is missing"),
    "path not text": (edit(WEIGHTS, lambda d: d["config"]["a"].update(path_name=[])), "not described"),
    "no config": (edit(WEIGHTS, lambda d: d.clear()), "not described"),
    "weight lacks": (edit(WEIGHTS, lambda d: d["config"].pop("a")), "a weight is missing"),
    "other shape": (set_meta("row", "sizes", ints(5)), "where the graph says"),
    "deep JSON": (lambda m: m.update({MODEL: b"[" * 10**6}), "nested too deeply"),
    "truncated JSON": (lambda m: m.update({MODEL: m[MODEL][:-9]}), "JSON is damaged"),
    "huge number": (lambda m: m.update({MODEL: b'{"a": ' + b"9" * 10**5 + b"}"}), "JSON is damaged"),
    "not an object": (lambda m: m.update({MODEL: b"[]"}), "not an object"),
    "two keys": (lambda m: m.update({MODEL: b'{"a": 1, "a": 2}'}), "a key stands twice"),
    "newer schema": (set_schema(9), "schema version is 9, and 8 is read"),
    "other format": (lambda m: m.update(archive_format=b"pt3"), "archive_format is not 'pt2'"),
    "newer archive": (lambda m: m.update(archive_version=b"7"), "archive_version is not '0'"),
    "other byte order": (lambda m: m.update(byteorder=b"big"), "byteorder is not 'little'"),
    "two programs": (lambda m: m.update({"models/other.json": b"{}"}), "holds 2 programs"),
    "old kind": (lambda m: m.update({"serialized_exported_program.json": b"{}"}), "of the old kind"),
    "no format": (lambda m: m.pop("archive_format"), "not what torch.export.save writes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(saved: tuple[Path, nn.Module], tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    path = changed(saved, tmp_path, change)
    with pytest.raises(Error, match=message) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_compressed_members_are_refused(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("toy/models/model.json", bytes(10**8))
    with pytest.raises(FileError, match="compressed"):
        read(path)
