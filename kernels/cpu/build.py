"""Builds the C++ kernel library: each source once per instruction set, then one plain C-ABI shared library.

``setup.py`` loads this file by its path, before the package is installed: it imports nothing of fusegen or PyTorch.
A source says in its first line which levels it gains from: ``// levels: scalar avx2 avx512 neon`` (``base``: compiled
once, for any CPU).  ``_lib/build.txt`` beside the library says what was left out of it, and why.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "libfusegen_cpu.so"
NOTES = "build.txt"

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16")
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "scalar": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": _BF16,
        "amx": (*_BF16, "-mavx512vbmi", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    },
    "aarch64": {"scalar": (), "neon": ()},
}
# No contraction: a multiply and an add round twice at every level; kernels that want one rounding call fma.
FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-exceptions -fno-rtti -fno-math-errno "
    "-ffp-contract=off -fno-trapping-math -Wall -Wextra -Werror=return-type -Wno-psabi -Wno-ignored-attributes "
    "-Wno-uninitialized -Wno-maybe-uninitialized -g0"
)
# AddressSanitizer's checks make thousands of blocks of a function, and compiling them takes longer than running them:
# so little is optimized, accesses are checked by calls, and registers are allotted for a function as a whole.
SANITIZERS = {
    "address": shlex.split(
        "-Og -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined "
        "-fira-region=one --param asan-instrumentation-with-call-threshold=0"
    ),
    "thread": shlex.split("-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread"),
}


Choice = Callable[[Sequence[str]], Collection[str]]


class BuildFailed(Exception):
    """The library cannot be built; the text is one line saying why."""


@dataclass(frozen=True)
class Unit:
    """One compilation: a source at a level, or at ``base``."""

    source: Path
    level: str
    command: tuple[str, ...]
    output: Path


def compiler() -> str:
    """The C++ compiler: $CXX, else the first of g++, clang++, c++ on the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildFailed(f"no C++ compiler: {wanted or 'g++, clang++ or c++'} is not on the path")


def source_of(op: str) -> Path | None:
    """The C++ source of an op's kernel: its own, or that of the kernel that is launched for it; None without any."""
    own, launcher = HERE / f"{op}.cpp", HERE / f"{op}.py"
    if own.exists() or not launcher.exists():
        return own if own.exists() else None
    called = re.search(r'CpuLaunch\("(\w+)"', launcher.read_text())
    return HERE / f"{called[1]}.cpp" if called else None


def levels_of(source: Path) -> list[str]:
    """The levels named in the first line of ``source``."""
    found = re.match(r"// levels: ([a-z0-9_ ]+)\n", source.read_text())
    if not found:
        raise BuildFailed(f"{source.name}: its first line must be '// levels: ...'")
    return found[1].split()


def _accepts(cxx: list[str], flags: tuple[str, ...]) -> bool:
    command = [*cxx, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True, check=False).returncode == 0


def _machine(cxx: list[str]) -> str:
    """What the compiler compiles for (a cross compiler's target, not this machine)."""
    ran = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True, check=False)
    return (ran.stdout.split("-")[0] or platform.machine()).replace("arm64", "aarch64")


def plan(work: Path, sanitize: str = "", chosen: Choice | None = None) -> tuple[list[Unit], list[str]]:
    """Every compilation, and a note for each level that this compiler cannot do; see :func:`build`."""
    cxx = shlex.split(compiler())
    machine = _machine(cxx)
    if machine not in LEVELS:
        raise BuildFailed(f"no kernels for this processor: {machine}; there are some for {', '.join(LEVELS)}")
    able = {level: flags for level, flags in LEVELS[machine].items() if _accepts(cxx, flags)}
    notes = [f"level {level} left out: the compiler does not know {' '.join(flags)}"
             for level, flags in LEVELS[machine].items() if level not in able]  # fmt: skip
    units = []
    for source in sorted(HERE.glob("*.cpp")):
        known = [level for level in levels_of(source) if level == "base" or level in able]
        for level in known if chosen is None or known == ["base"] else chosen(known):
            define = () if level == "base" else (*able[level], f"-DFG_LEVEL_{level.upper()}=1")
            output = work / f"{source.stem}.{level}.o"
            command = (*cxx, *FLAGS, *SANITIZERS.get(sanitize, ()), *define, "-c", str(source), "-o", str(output))
            units.append(Unit(source, level, command, output))
    return units, notes


def _stale(unit: Unit) -> bool:
    """Whether the command, the source or a header that it includes changed since the object was made."""
    record = unit.output.with_suffix(".cmd")
    if not unit.output.exists() or not record.exists() or record.read_text() != shlex.join(unit.command):
        return True
    made = unit.output.stat().st_mtime_ns
    depends = unit.output.with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return any(not Path(d).exists() or Path(d).stat().st_mtime_ns > made for d in depends)


def _compile(unit: Unit) -> None:
    record = unit.output.with_suffix(".cmd")
    record.unlink(missing_ok=True)
    command = [*unit.command, "-MMD", "-MF", str(unit.output.with_suffix(".d"))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.stderr:
        print(ran.stderr, end="")
    if ran.returncode:
        first = next((x for x in ran.stderr.splitlines() if "error" in x), "")
        raise BuildFailed(f"{unit.source.name} does not compile for {unit.level}: {first}")
    _refuse_weak(unit)
    record.write_text(shlex.join(unit.command))


def _refuse_weak(unit: Unit) -> None:
    """A weak symbol would be merged across levels: code for a CPU that has more might then run on one that has less."""
    if unit.level in ("base", "scalar") or not shutil.which("nm") or "-fsanitize" in " ".join(unit.command):
        return
    ran = subprocess.run(["nm", "--defined-only", str(unit.output)], capture_output=True, text=True, check=False)
    weak = [x.split()[-1] for x in ran.stdout.splitlines() if len(x.split()) == 3 and x.split()[1] in "WVu"]
    if weak:
        unit.output.unlink()
        raise BuildFailed(f"{unit.source.name} defines the weak symbol {weak[0]}: keep it in an anonymous namespace")


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(
    target: Path, work: Path, sanitize: str = "", jobs: int = 2, verbose: bool = True, chosen: Choice | None = None
) -> Path:
    """Compile what changed, ``jobs`` at a time, and link ``target / LIBRARY``; objects are kept in ``work``.

    ``sanitize``: a key of :data:`SANITIZERS`, or "" for none.  ``chosen``: of the levels a source can be
    compiled for, those that it is; None: all.

    Raises :class:`BuildFailed` with one line.  The library is replaced in one step: processes that have the old one
    open keep it.
    """
    with _locked(work):
        units, notes = plan(work, sanitize, chosen)
        todo = [u for u in units if _stale(u)]
        with ThreadPoolExecutor(jobs) as pool:
            for unit, _ in zip(todo, pool.map(_compile, todo), strict=True):
                if verbose:
                    print(f"compiled {unit.source.name} for {unit.level}", flush=True)
        target.mkdir(parents=True, exist_ok=True)
        library, partial = target / LIBRARY, target / f"{LIBRARY}.{os.getpid()}.part"
        objects = [str(u.output) for u in units]
        extra = SANITIZERS[sanitize] if sanitize else ["-Wl,--as-needed", "-Wl,-z,defs", "-s"]
        link = [*shlex.split(compiler()), "-shared", *extra, *objects, "-ldl", "-lpthread"]
        ran = subprocess.run([*link, "-o", str(partial)], capture_output=True, text=True, check=False)
        if ran.returncode:
            partial.unlink(missing_ok=True)
            raise BuildFailed(f"linking {LIBRARY} failed: {' '.join(ran.stderr.split())[:300]}")
        partial.replace(library)
        (target / NOTES).write_text("".join(f"{n}\n" for n in notes))
    return library


def build_or_say_why(target: Path, work: Path) -> Path | None:
    """:func:`build` for an install: without a compiler it leaves the reason in ``target / NOTES`` and goes on."""
    try:
        if os.name != "posix":
            raise BuildFailed(f"the C++ kernels are not built on {platform.system()}")
        return build(target, work)
    except BuildFailed as error:
        target.mkdir(parents=True, exist_ok=True)
        (target / NOTES).write_text(f"not built: {error}\n")
        print(f"warning: fusegen's C++ kernels are left out: {error}", flush=True)
        return None
