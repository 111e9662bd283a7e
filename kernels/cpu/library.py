"""The C++ kernel library: loading it, choosing an instruction set, and sharing PyTorch's thread pool.

``FUSEGEN_CPU=avx2`` (or :func:`forced` in a test) makes every kernel run at that level.  A kernel that was not compiled
for a level, because it gains nothing there, runs at the next lower level that it has; :func:`ladder` shows which.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.op import Launch

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon")  # bit i of fg_cpu_levels()
VARIABLE = "FUSEGEN_CPU"
DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.int32: 4, torch.int64: 5,
    torch.int8: 6,
}  # fmt: skip
_FOLDER = Path(os.environ.get("FUSEGEN_CPU_LIBRARY") or Path(__file__).parent / "_lib")
_PATH = _FOLDER / "libfusegen_cpu.so"
_CODES = {1: "an argument that it does not serve", 2: "too little memory for its scratch"}
_forced: list[str] = []


class LevelError(ValueError):
    """An instruction set was asked for that does not exist or that this machine cannot run; one line."""


class KernelFailed(RuntimeError):
    """A kernel returned an error code; one line."""


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The opened library, or why there is none."""
    if not _PATH.exists():
        notes = _FOLDER / "build.txt"
        reason = notes.read_text().strip() if notes.exists() else f"{_PATH} is not there"
        return f"{reason}; mend: python setup.py build_kernels, or install again with a C++ compiler"
    try:
        lib = ctypes.CDLL(str(_PATH))
    except OSError as error:
        return f"{_PATH} cannot be opened: {error}"
    try:
        lib.fg_cpu_levels.restype = lib.fg_thread_count.restype = lib.fg_sizeof.restype = ctypes.c_int64
        lib.fg_pool.restype = ctypes.c_char_p
        lib.fg_sizeof.argtypes = [ctypes.c_char_p]
        lib.fg_run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        lib.fg_set_pool.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        lib.fg_set_cache.argtypes = [ctypes.c_int64]
    except AttributeError as error:
        return f"{_PATH} was built from other sources ({error}); mend: python setup.py build_kernels"
    _share_pool(lib)
    return lib


def _share_pool(lib: ctypes.CDLL) -> None:
    """Hand the library the OpenMP runtime that PyTorch runs on.

    A symbol looked up through libtorch_cpu is searched in its own dependencies: what is found is PyTorch's runtime,
    whatever that file is called (CPU wheels carry ``libgomp.so.1``, CUDA wheels a renamed copy).  Its
    ``at::get_num_threads`` also applies ``torch.set_num_threads`` in threads that PyTorch has not yet seen.
    """
    runtime = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        through = ctypes.CDLL(str(runtime))
        parallel, count = through.GOMP_parallel, through._ZN2at15get_num_threadsEv
    except (OSError, AttributeError):
        return  # fg_pool() is "" then: kernels run on the calling thread, and report() says so
    lib.fg_set_pool(ctypes.cast(parallel, ctypes.c_void_p), ctypes.cast(count, ctypes.c_void_p))


def available() -> bool:
    """Whether the library is there and opens."""
    return not isinstance(_library(), str)


def missing() -> str | None:
    """Why :func:`available` is False, in one line with the mend; None where it is True."""
    found = _library()
    return found if isinstance(found, str) else None


def opened() -> ctypes.CDLL:
    """The library; raises KernelFailed where there is none."""
    found = _library()
    if isinstance(found, str):
        raise KernelFailed(f"the C++ kernels are missing: {found}")
    return found


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels that this CPU runs, lowest first; a later one includes the earlier ones."""
    bits = opened().fg_cpu_levels()
    return tuple(name for i, name in enumerate(LEVELS) if bits >> i & 1)


def level() -> str:
    """The level in force: forced by a test, by $FUSEGEN_CPU, or the highest this CPU runs."""
    wanted = _forced[-1] if _forced else os.environ.get(VARIABLE)
    if not wanted:
        return levels()[-1]
    if wanted not in levels():
        what = "this machine cannot run" if wanted in LEVELS else "there is no"
        raise LevelError(f"{what} CPU level {wanted!r} ({VARIABLE}): it takes one of {', '.join(levels())}")
    return wanted


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Kernels bound inside this block run at that level; raises LevelError as :func:`level` does."""
    _forced.append(name)
    try:
        level()
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def cached(nbytes: int) -> Iterator[None]:
    """Kernels run inside this block as if the last cache had that many bytes: what is larger is written past it."""
    opened().fg_set_cache(nbytes)
    try:
        yield
    finally:
        opened().fg_set_cache(0)  # what the machine has


@functools.cache
def _symbol(op: str, top: str) -> tuple[str, Any] | None:
    """The kernel of ``op`` at the highest level not above ``top`` that it was compiled for."""
    lib = opened()
    for name in reversed(levels()[: levels().index(top) + 1]):
        function = getattr(lib, f"fg_{op}_{name}", None)
        if function is not None:
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
            return name, function
    return None


def function(op: str, at: str | None = None) -> Any:
    """The C function of ``op`` at level ``at`` (the level in force), by the ladder; raises KernelFailed if none."""
    found = _symbol(op, at or level())
    if found is None:
        raise KernelFailed(f"the library has no kernel for {op}: python setup.py build_kernels")
    return found[1]


def ladder() -> dict[str, dict[str, str]]:
    """Op -> {level: the level whose code runs there}, for every op that the library has."""
    stems = sorted(p.stem for p in Path(__file__).parent.glob("*.py"))
    rows = {op: {name: found[0] for name in levels() if (found := _symbol(op, name))} for op in stems}
    return {op: row for op, row in rows.items() if row}


def path() -> Path:
    """The library's file, whether or not it is there."""
    return _PATH


def pool() -> str:
    """The file of the OpenMP runtime whose threads the kernels use; "" where they run on the calling thread alone."""
    return opened().fg_pool().decode()


def threads() -> int:
    """How many threads a kernel called from here may use."""
    return int(opened().fg_thread_count())


def report() -> list[str]:
    """Lines for ``fusegen doctor``: the library, its levels, each op's ladder, and the pool."""
    why = missing()
    if why:
        return [f"C++ kernels: missing: {why}"]
    notes = (_FOLDER / "build.txt").read_text().splitlines() if (_FOLDER / "build.txt").exists() else []
    lines = [f"C++ kernels: {_PATH}", f"level: {level()} (this CPU runs {', '.join(levels())})", *notes]
    lines += [f"{op}: " + ", ".join(f"{k} as {v}" if k != v else k for k, v in row.items())
              for op, row in ladder().items()]  # fmt: skip
    shared = pool()
    return [*lines, f"threads: {threads()} of {shared}" if shared else "threads: 1 (PyTorch's OpenMP was not found)"]


class CpuLaunch(Launch):
    """A C++ kernel bound to its arguments: one prepared struct, one foreign call.

    ``struct``: the filled ctypes mirror of ``fg_<op>_args``.  ``pointers``: positional argument -> the field that
    holds its address.  The outputs are kept alive, and the arguments by position, until one is moved.
    """

    def __init__(self, op: str, struct: ctypes.Structure, pointers: dict[int, str],
                 outs: tuple[Tensor, ...], args: tuple[Any, ...]):  # fmt: skip
        size = opened().fg_sizeof(op.encode())
        if size != ctypes.sizeof(struct):
            raise KernelFailed(f"the library was built from another abi.h ({op}): python setup.py build_kernels")
        self.op, self.struct, self.pointers = op, struct, pointers
        self.outs, self.args = outs, list(args)
        for index, field in pointers.items():
            if args[index] is not None:
                setattr(struct, field, args[index].data_ptr())
        self._function = function(op)
        self._address = ctypes.c_void_p(ctypes.addressof(struct))

    def run(self) -> None:
        code = self._function(self._address)
        if code:
            raise KernelFailed(f"the kernel {self.op} reports {_CODES.get(code, f'code {code}')}")

    def move(self, index: int, tensor: Tensor) -> None:
        setattr(self.struct, self.pointers[index], tensor.data_ptr())
        self.args[index] = None  # what it was bound to may go

    def call(self) -> tuple[int, int]:
        """(function, struct) addresses: one entry of the list that ``fg_run`` takes."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0, self._address.value or 0
