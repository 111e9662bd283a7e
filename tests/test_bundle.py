"""Bundles: what is written is what is opened; damage, code and half-written files are refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpret import interpret
from torch import Tensor, nn

from fusegen.runtime import manifest as manifest_json
from fusegen.runtime.api import capture, read
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.derived import value
from fusegen.runtime.errors import Error, FileError, RequestError, UnsafeFileError
from fusegen.runtime.program import Program
from fusegen.runtime.read import safetensors
from fusegen.runtime.write import write_zip

ABOUT = Manifest("toy", family="test", loop={"steps": 4}, licence="MIT", card="A toy.", sampler={"name": "ddim"})
FILES = {"tokenizer.json": b"{}", "card.md": b"# Toy"}
WEIGHTS, GRAPH = "components/net/weights.safetensors", "components/net/graph.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("odd", torch.arange(3))
        self.register_buffer("turned", torch.randn(16, 5).t())

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) @ self.turned.t())[:, self.odd]


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Net(), (torch.randn(2, 16),), dynamic={"x": {0: ("batch", 1, 8)}})


@pytest.fixture
def path(program: Program, tmp_path: Path) -> Path:
    Bundle.write(tmp_path / "toy.fg", ABOUT, {"net": program}, FILES)
    return tmp_path / "toy.fg"


def test_what_is_written_is_what_is_opened(path: Path, program: Program) -> None:
    bundle = Bundle.open(path)
    assert dataclasses.replace(bundle.manifest, components={}, members={}) == ABOUT
    assert bundle.file("tokenizer.json") == b"{}"
    assert bundle.manifest.components["net"].inputs == program.inputs
    got = bundle.program("net")
    assert dataclasses.replace(got, weights={}) == dataclasses.replace(program, weights={})
    assert got.weights.keys() == program.weights.keys()
    assert all(torch.equal(v, program.weights[k]) for k, v in got.weights.items())
    assert got.weights["linear.weight"].data_ptr() % 64 == 0
    x = torch.randn(3, 16)
    torch.testing.assert_close(interpret(got, x)[0], interpret(program, x)[0])
    with pytest.raises(RequestError, match="no component 'vae'; it has net"):
        bundle.program("vae")
    with pytest.raises(RequestError, match="no file 'x'"):
        bundle.file("x")


def test_read_takes_a_bundle_of_one_program(path: Path, program: Program, tmp_path: Path) -> None:
    assert read(path).nodes == program.nodes
    Bundle.write(tmp_path / "two.fg", ABOUT, {"a": program, "b": program})
    with pytest.raises(FileError, match="a model of a, b, not one program"):
        read(tmp_path / "two.fg")


def test_a_folder_of_the_same_tree(path: Path, program: Program, tmp_path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None  # as others read it
        file.extractall(tmp_path / "folder")
    assert read(tmp_path / "folder").nodes == program.nodes
    (tmp_path / "folder" / "card.md").unlink()
    (tmp_path / "folder" / "card.md").symlink_to("/etc/hostname")
    with pytest.raises(FileError, match="a link is not followed"):
        read(tmp_path / "folder")


def test_same_arguments_same_bytes(path: Path, program: Program, tmp_path: Path) -> None:
    time.sleep(0.01)
    Bundle.write(tmp_path / "again.fg", ABOUT, {"net": program}, dict(reversed(FILES.items())))
    assert (tmp_path / "again.fg").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_stored_in_halves_come_back_as_float32(program: Program, tmp_path: Path, dtype: str) -> None:
    Bundle.write(tmp_path / "half.fg", ABOUT, {"net": program}, storage_dtype=dtype)
    got = read(tmp_path / "half.fg")
    weight = program.weights["linear.weight"]
    assert got.weights["linear.weight"].dtype == torch.float32
    assert torch.equal(value(got.weights["linear.weight"]), weight.to(getattr(torch, dtype)).float())
    assert got.weights["odd"].dtype == torch.int64
    with pytest.raises(RequestError, match="cannot be stored as 'int3'"):
        Bundle.write(tmp_path / "x.fg", ABOUT, {"net": program}, storage_dtype="int3")


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a\\b", "components/net/graph.json", "manifest.json", "x.pt", "a//b", ""]
)
def test_names_that_cannot_be_members(program: Program, tmp_path: Path, name: str) -> None:
    with pytest.raises(Error):
        Bundle.write(tmp_path / "x.fg", ABOUT, {"net": program}, {name: b""})
    assert list(tmp_path.iterdir()) == []


Members = dict[str, bytes]


def rebuilt(path: Path, change: Callable[[Members], Any], relist: bool = True) -> Path:
    """The bundle with changed members; ``relist`` corrects the manifest's sizes and hashes, as an attacker would."""
    import hashlib

    with zipfile.ZipFile(path) as file:
        members = {n: file.read(n) for n in file.namelist()}
    change(members)
    if relist:
        manifest = json.loads(members["manifest.json"])
        manifest["members"] = {
            k: {"size": len(v), "sha256": hashlib.sha256(v).hexdigest()}
            for k, v in members.items()
            if k != "manifest.json"
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    path.unlink()
    with path.open("wb") as out:
        write_zip(out, {k: [v] for k, v in members.items()})
    return path


def flipped(name: str) -> Callable[[Members], None]:
    return lambda m: m.update({name: m[name][:-1] + bytes([m[name][-1] ^ 1])})


def manifest(**changes: Any) -> Callable[[Members], None]:
    return lambda m: m.update({"manifest.json": json.dumps(json.loads(m["manifest.json"]) | changes).encode()})


DAMAGE: dict[str, tuple[Callable[[Members], Any], str]] = {
    "weights flipped": (flipped(WEIGHTS), f"{WEIGHTS}.*|SHA-256 differs"),
    "graph flipped": (flipped(GRAPH), "SHA-256 differs"),
    "member missing": (lambda m: m.pop("card.md"), "a member is missing .*card.md"),
    "member longer": (lambda m: m.update({"card.md": b"longer than before"}), "has 18 bytes, not 5 .*card.md"),
    "member unknown": (lambda m: m.update({"notes.txt": b""}), "does not list this member .*notes.txt"),
    "no manifest": (lambda m: m.pop("manifest.json"), "not what torch.export.save writes"),
    "unknown key": (manifest(colour="red"), "the key 'colour' is unknown"),
    "newer": (manifest(version=2), "version is version 2|version 2, and 1 is read"),
    "other format": (manifest(format="x"), "not a fusegen bundle"),
    "family not text": (manifest(family=3), "family is not a text"),
    "members not object": (manifest(members=[]), "manifest is not as it should be"),
    "component without graph": (manifest(components={"x": {}}), "manifest is not as it should be"),
    "manifest not JSON": (lambda m: m.update({"manifest.json": b"{"}), "JSON is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    with pytest.raises(FileError, match=message) as error:
        read(rebuilt(path, change, relist=False))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_weights_are_not_hashed_when_asked(path: Path) -> None:
    rebuilt(path, flipped(WEIGHTS), relist=False)
    assert Bundle.open(path, verify=False).only().nodes
    with pytest.raises(FileError, match="SHA-256 differs"):
        Bundle.open(path).only()


@pytest.mark.parametrize("name", ["x.pkl", "x.bin", "model.ckpt", "a.pt", "x.so", "code.py", "innocent.txt"])
def test_code_is_refused(path: Path, name: str) -> None:
    with pytest.raises(UnsafeFileError, match="a pickle or a program") as error:
        read(rebuilt(path, lambda m: m.update({name: pickle.dumps([1])})))
    assert name in str(error.value)


def graph(change: Callable[[Any], Any]) -> Callable[[Members], None]:
    def run(members: Members) -> None:
        document = json.loads(members[GRAPH])
        change(document)
        members[GRAPH] = json.dumps(document).encode()

    return run


def node(**changes: Any) -> Callable[[Members], None]:
    return graph(lambda d: d["nodes"][0].update(changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (node(op="aten.from_file.default", args={"filename": "/etc/passwd", "size": 9}), "could reach outside"),
        (node(op="os.system.default"), "from outside PyTorch"),
        (node(op="aten.add_.Tensor"), "writes to its argument"),
        (node(op="aten.nothing.default"), "has no operator"),
        (node(op="sym.system"), "no operator sym.system"),
        (graph(lambda d: d["inputs"].update(x=["float32", ["batch", 17]])), "manifest and the graph disagree"),
        (graph(lambda d: d["nodes"].reverse()), "which nothing before it makes"),
    ],
)
def test_graphs_that_are_refused_though_their_hash_is_right(
    path: Path, change: Callable[[Members], None], message: str
) -> None:
    with pytest.raises(Error, match=message):
        read(rebuilt(path, change))


def test_every_truncation_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FileError):
            read(path)


def test_every_flipped_byte_is_found_or_harmless(path: Path, program: Program) -> None:
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            got = read(path)
        except Error:
            continue
        assert dataclasses.replace(got, weights={}) == dataclasses.replace(program, weights={})
        assert all(torch.equal(v, program.weights[k]) for k, v in got.weights.items())


@pytest.mark.parametrize("part", [1, 4096, 5000])
def test_weights_are_hashed_in_parts(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(manifest_json, "PART", part)
    written = Bundle.write(tmp_path / "x.fg", ABOUT, {"net": program}).members[WEIGHTS]
    assert len(written.parts) == (-(-written.size // part) if written.size > part else 0)
    got = read(tmp_path / "x.fg")
    assert all(torch.equal(value(v), program.weights[k]) for k, v in got.weights.items())
    path = tmp_path / "x.fg"
    raw = bytearray(path.read_bytes())
    at = raw.index(program.weights["linear.weight"].numpy().tobytes())
    raw[at + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match="SHA-256 differs"):
        read(path)


def test_weights_without_parts_are_checked_whole(program: Program, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_json, "PART", 100)  # the file was written with larger ones
    assert not Bundle.open(path).manifest.members[WEIGHTS].parts
    assert all(torch.equal(value(v), program.weights[k]) for k, v in read(path).weights.items())


@pytest.mark.parametrize("parts", [["0" * 64] * 2, ["0" * 63, "0" * 64], [1, 2], "ab"])
def test_parts_that_cannot_be(path: Path, parts: Any) -> None:
    document = json.loads(zipfile.ZipFile(path).read("manifest.json"))
    document["members"][WEIGHTS]["parts"] = parts
    with pytest.raises(FileError, match="the manifest is not as it should be"):
        manifest_json.loads(json.dumps(document).encode(), "x")


def test_missing_folder(tmp_path: Path, program: Program) -> None:
    with pytest.raises(FileError, match="No such file"):
        Bundle.write(tmp_path / "none" / "x.fg", ABOUT, {"net": program})


def test_other_kinds_of_file_say_what_they_are(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.ones(1)}, tmp_path / "zip.bin")
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07onnx graph")
    (tmp_path / "w.safetensors").write_bytes(b"".join(safetensors.chunks({"a": torch.ones(1)})))
    (tmp_path / "empty.fg").write_bytes(b"")
    for name, kind, message in (
        ("old.pt", UnsafeFileError, "a pickle"),
        ("zip.bin", UnsafeFileError, "pickle"),
        ("x.onnx", FileError, "ONNX graphs are not read yet.*fusegen reads .pt2"),
        ("w.safetensors", FileError, "weights without a graph"),
        ("empty.fg", FileError, "not a kind of file"),
        ("none.fg", FileError, "no such file"),
    ):
        with pytest.raises(kind, match=message):
            read(tmp_path / name)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileError, match="no such file"):
        read(tmp_path)
