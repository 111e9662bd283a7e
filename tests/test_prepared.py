"""What is made of a file's weights, kept in a folder: found again, made anew where it is not what it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import unet_inputs, unet_program
from torch import Tensor, nn

import fusegen
from fusegen.kernels.cpu import library
from fusegen.runtime import prepared
from fusegen.runtime.api import capture
from fusegen.runtime.bundle import Bundle, Manifest
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.derived import Derived, Weight, converted
from fusegen.runtime.engine import Session
from fusegen.runtime.errors import FileError, RequestError
from fusegen.runtime.program import Program
from fusegen.runtime.read import archive

pytestmark = pytest.mark.skipif(not library.available(), reason="the C++ kernels are not built")
LEVELS = [level for level in ("scalar", "avx2", "neon") if level in (library.levels() if library.available() else ())]


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    """A level of float32 kernels, whatever this machine has besides."""
    with library.forced(LEVELS[-1]):
        yield


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.forced(request.param):
        yield request.param


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.fg", unet_program())


def write(path: Path, program: Program, storage: str = "") -> Path:
    Bundle.write(path, Manifest(name="net"), {"net": program}, storage_dtype=storage)
    return path


def session(model: Path, cache: Path | None, **options: Any) -> Session:
    return compile_program(Bundle.open(model).program("net"), dtype="float32", cache=cache, **options)


def kept(cache: Path) -> dict[str, tuple[int, int]]:
    """File -> its inode and time: what was written anew has others."""
    return {str(p.relative_to(cache)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in cache.rglob("*.bin")}


def test_the_next_session_makes_nothing_and_has_the_same_bits(
    model: Path, tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, cache = unet_inputs(2), tmp_path / "kept"
    want = session(model, None)(*inputs)
    assert torch.equal(session(model, cache)(*inputs), want)
    first = kept(cache)
    assert first and not list(cache.rglob("*.part"))

    def refuse(*_: Any) -> None:
        raise AssertionError("something was made anew")

    monkeypatch.setattr(prepared, "_write", refuse)
    again = session(model, cache)
    assert torch.equal(again(*inputs), want) and kept(cache) == first
    values = [v for found in again.weights.made.values() for v in found]
    assert values and all(archive.origin(v) is not None for v in values)  # they are the files' own pages


def test_what_is_too_short_is_made_anew(model: Path, tmp_path: Path) -> None:
    inputs, cache = unet_inputs(1), tmp_path / "kept"
    want = session(model, cache)(*inputs)
    first = kept(cache)
    hurt = sorted(first)[0]
    os.truncate(cache / hurt, 16)
    assert torch.equal(session(model, cache)(*inputs), want)
    now = kept(cache)
    assert now.keys() == first.keys() and (cache / hurt).stat().st_size > 16
    assert {k for k in first if now[k] != first[k]} == {hurt}


def test_another_file_of_that_name_leaves_nothing_of_the_first(model: Path, tmp_path: Path) -> None:
    inputs, cache = unet_inputs(1), tmp_path / "kept"
    session(model, cache)(*inputs)
    first = kept(cache)
    program = unet_program()
    with torch.no_grad():
        weights = {k: w * 1.5 if isinstance(w, Tensor) and w.dim() == 4 else w for k, w in program.weights.items()}
    write(model, replace(program, weights=weights))
    assert torch.equal(session(model, cache)(*inputs), session(model, None)(*inputs))
    assert kept(cache) and not kept(cache).keys() & first.keys()


def test_another_level_finds_nothing(model: Path, tmp_path: Path) -> None:
    inputs, cache, folders = unet_inputs(1), tmp_path / "kept", list[set[Path]]()
    for one in LEVELS:
        with library.forced(one):
            assert torch.equal(session(model, cache)(*inputs), session(model, None)(*inputs))
        folders.append({p.parent for p in cache.rglob("*.bin")})
    assert all(len(f) == 1 for f in folders) and len(set().union(*folders)) == len(LEVELS)


def test_weights_in_no_file_are_not_kept(tmp_path: Path) -> None:
    inputs, cache = unet_inputs(1), tmp_path / "kept"
    got = compile_program(unet_program(), dtype="float32", cache=cache)(*inputs)
    assert torch.equal(got, compile_program(unet_program(), dtype="float32")(*inputs)) and not kept(cache)


class Halves(nn.Module):
    """Two gated layers whose gates are the other half of the one file's weight."""

    def __init__(self, swap: bool):
        super().__init__()
        self.swap, self.up = swap, nn.Linear(128, 256)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return a * nn.functional.gelu(b) if self.swap else b * nn.functional.gelu(a)


@pytest.mark.skipif("avx2" not in LEVELS, reason="packed layers of float32 are AVX2's")
def test_halves_of_a_weight_are_told_apart(tmp_path: Path) -> None:
    """Both programs read the same bytes of a file of one name, size and time."""
    cache, x = tmp_path / "kept", torch.randn(256, 128)
    with library.forced("avx2"):
        for swap in (True, False):
            torch.manual_seed(0)
            model = write(tmp_path / "halves.fg", capture(Halves(swap).eval(), (x,)), "bfloat16")
            os.utime(model, ns=(1, 1))
            assert torch.equal(session(model, cache)(x), session(model, None)(x))
    assert kept(cache)


def test_weights_of_the_same_bytes_are_described_apart(model: Path) -> None:
    weights = Bundle.open(model).program("net").weights.values()
    source = next(w for w in weights if isinstance(w, Tensor) and w.dim() == 2)

    def rows(at: int) -> Derived:
        return Derived(lambda w: w[at:], source)

    made: list[Weight] = [
        source,
        source.t(),
        source[1:],
        source[:-1],
        converted(source, torch.bfloat16),
        rows(0),
        rows(1),
    ]
    made += [converted(source, torch.float16), *(Derived(partial(torch.roll, shifts=k), source) for k in (1, 2))]
    assert len({prepared._described(w) for w in made}) == len(made)
    assert prepared._described(rows(1)) == prepared._described(rows(1))


def test_a_folder_that_cannot_be_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="the folder cannot be made"):
        session(model, tmp_path / "file" / "kept")
    with pytest.raises(RequestError, match="'eager' prepares no weights"):
        session(model, tmp_path / "kept", backend="eager")


def test_a_disk_that_is_full_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared.os, "fsync", full)
    with pytest.raises(FileError, match="cannot be kept: No space left on device"):
        session(model, tmp_path / "kept")(*unet_inputs(1))
    assert not [p for p in (tmp_path / "kept").rglob("*") if p.is_file()]


def test_a_model_of_a_family_takes_the_folder(tmp_path: Path) -> None:
    (first,) = fusegen.load("emoji-gan", dtype="float32", cache=tmp_path).generate([3])
    (again,) = fusegen.load("emoji-gan", dtype="float32", cache=tmp_path).generate([3])
    assert kept(tmp_path) and np.array_equal(np.asarray(first), np.asarray(again))
