"""Kernel launches as data: what :mod:`runner.cpp` takes, and what it gives back.

A launch is its filled argument struct and the memory that the struct points to.  Both are written to a file, run by the
runner in another process (under an emulator, or a sanitizer), and what the kernel left is copied back to where the
launch would have left it.  Nothing here knows an op: pointers are the struct's ``c_void_p`` fields, memory is the
storage of the launch's tensors and the constants of the op's launcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from fusegen.kernels.cpu import build, library
from fusegen.kernels.cpu.library import CpuLaunch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORD = 8


@dataclass(frozen=True)
class Region:
    """Memory of this process: its address, its size in bytes, and what keeps it alive."""

    address: int
    size: int
    owner: Any


@contextlib.contextmanager
def foreign(level: str) -> Iterator[None]:
    """Launches bound inside are for ``level`` of another machine or library: they are recorded, never run here."""
    nothing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: -1)
    with (
        mock.patch.object(library, "level", lambda: level),
        mock.patch.object(library, "levels", lambda: ("scalar", level) if level != "scalar" else ("scalar",)),
        mock.patch.object(library, "function", lambda op, at=None: nothing),
    ):
        yield


def levels_of(op: str, levels: Sequence[str]) -> list[str]:
    """Those of ``levels`` that the source of ``op`` is compiled for."""
    source = build.source_of(op)
    return [] if source is None else [level for level in levels if level in build.levels_of(source)]


class Records:
    """Launches to run elsewhere."""

    def __init__(self) -> None:
        self._launches: list[tuple[str, CpuLaunch | PlantedLaunch, list[Region]]] = []

    def __len__(self) -> int:
        return len(self._launches)

    def add(self, launch: CpuLaunch | PlantedLaunch, level: str) -> None:
        """Take a launch that was bound under :func:`foreign`; its arguments are read when :meth:`run` is called."""
        self._launches.append((f"fg_{launch.op}_{level}", launch, _regions(launch)))

    def run(self, command: Sequence[str | Path], path: Path, threads: int) -> int:
        """Run all with the runner ``command`` (the library behind it), through the file ``path``; how many times a
        kernel used more than one thread.

        Raises AssertionError where a kernel fails, or the runner does or complains, with what it printed.
        """
        words = [np.array([len(self)], np.int64), *(part for row in self._launches for part in _words(*row))]
        np.concatenate(words).tofile(path)
        ran = subprocess.run([*map(str, command), str(path), str(threads)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0 and not ran.stderr, f"exit code {ran.returncode}: {ran.stderr[:5000]}"
        self._take_back(np.fromfile(path, np.int64))
        return int(ran.stdout)

    def _take_back(self, words: np.ndarray[Any, Any]) -> None:
        at = 1
        for symbol, _, regions in self._launches:
            assert words[at] == 0, f"{symbol} reports code {words[at]}"
            struct, count, pointers = words[at + 8 : at + 11]
            at += 11 + int(struct + 2 * count + 3 * pointers)
            for region in regions:
                ctypes.memmove(region.address, words[at:].ctypes.data, region.size)
                at += -(-region.size // WORD)


def _words(symbol: str, launch: CpuLaunch | PlantedLaunch, regions: list[Region]) -> Iterator[np.ndarray[Any, Any]]:
    """One record as int64 words; see runner.cpp."""
    name = np.frombuffer(symbol.encode().ljust(64, b"\0"), np.int64)
    struct = np.frombuffer(bytes(launch.struct), np.int64)
    pointers = [p for p in (_pointer(launch, field, regions) for field in launch.struct._fields_) if p is not None]
    yield np.concatenate([name, np.array([len(struct), len(regions), len(pointers)], np.int64), struct])
    yield np.array([(r.size, r.address % 64) for r in regions], np.int64).reshape(-1)
    yield np.array(pointers, np.int64).reshape(-1)
    for region in regions:
        data = ctypes.string_at(region.address, region.size)
        yield np.frombuffer(data.ljust(-(-region.size // WORD) * WORD, b"\0"), np.int64)


def _pointer(launch: CpuLaunch | PlantedLaunch, field: Any, regions: list[Region]) -> tuple[int, int, int] | None:
    """(word of the struct, region, bytes into it) of a field that points to something."""
    name, kind = field[:2]
    address = getattr(launch.struct, name) if kind is ctypes.c_void_p else None
    if not address:
        return None
    for i, region in enumerate(regions):
        if region.address <= address < region.address + region.size:
            return getattr(type(launch.struct), name).offset // WORD, i, address - region.address
    raise AssertionError(f"{launch.op}: {name} points to no tensor of the launch and no constant of its launcher")


def _regions(launch: CpuLaunch | PlantedLaunch) -> list[Region]:
    """The memory that a launch may point to, each storage once; of the constants only those that it does point to."""
    launcher = sys.modules.get(f"fusegen.kernels.cpu.{launch.op}")
    used = [t for t in (*launch.outs, *launch.args) if isinstance(t, Tensor)]
    held = [*vars(launch).values(), *(vars(launcher).values() if launcher else ())]
    found: dict[int, Region] = {r.address: r for r in map(_region, used) if r.size}
    addresses = [getattr(launch.struct, name) for name, kind in launch.struct._fields_ if kind is ctypes.c_void_p]
    for value in held:
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (Tensor, np.ndarray)):
                region = _region(item)
                if any(a and region.address <= a < region.address + region.size for a in addresses):
                    found.setdefault(region.address, region)
    return list(found.values())


def _region(value: Tensor | np.ndarray[Any, Any]) -> Region:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return Region(storage.data_ptr(), storage.nbytes(), storage)
    return Region(value.ctypes.data, value.nbytes, value)


def build_library(folder: Path, compiler: str, sanitize: str = "", chosen: build.Choice | None = None) -> Path:
    """The kernel library by another compiler, or with a sanitizer, in ``folder``; compiles only what changed."""
    with mock.patch.dict(os.environ, {"CXX": compiler}):
        return build.build(folder, folder, sanitize=sanitize, chosen=chosen, jobs=os.cpu_count() or 1)


def build_planted(folder: Path, flags: Sequence[str]) -> Path:
    """A library of the pool and the kernels with faults of planted.cpp."""
    made = folder / "libplanted.so"
    sources = [build.HERE / "pool.cpp", HERE / "planted.cpp"]
    command = ["g++", *build.FLAGS, *flags, "-shared", *map(str, sources), "-o", str(made), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return made


class Planted(ctypes.Structure):
    """fg_planted_args of planted.cpp."""

    _fields_ = [("counter", ctypes.c_void_p), ("items", ctypes.c_int64), ("fault", ctypes.c_int64)]


@dataclass
class PlantedLaunch:
    """What :class:`Records` reads of a launch, for planted.cpp."""

    op: str
    struct: Planted
    outs: tuple[Tensor, ...]
    args: tuple[Any, ...] = ()


def sanitized(folder: Path, sanitize: str, planted: Path) -> list[str | Path]:
    """How the runner under a sanitizer is started; the library and what follows it are still to be added."""
    folder.mkdir(parents=True, exist_ok=True)
    runner = build_runner(folder, "g++", build.SANITIZERS[sanitize])
    empty = planted.parent / "empty"
    empty.write_bytes(bytes(WORD))
    probe = subprocess.run([runner, planted, empty, "1"], capture_output=True, text=True, check=False)
    # GCC 12's ThreadSanitizer knows less randomization of addresses than new kernels have.
    fixed = ["setarch", "-R"] if "unexpected memory mapping" in probe.stderr else []
    return [*fixed, runner]


def build_runner(folder: Path, compiler: str, flags: Sequence[str] = ()) -> Path:
    """runner.cpp compiled; replaced in one step, since another process may be running it."""
    runner, partial = folder / "runner", folder / f"runner.{os.getpid()}.part"
    command = [*shlex.split(compiler), "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", *flags]
    subprocess.run([*command, str(HERE / "runner.cpp"), "-o", str(partial), "-ldl", "-lpthread"], check=True)
    partial.replace(runner)
    return runner
