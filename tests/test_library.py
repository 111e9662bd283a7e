"""The C++ kernel library: its levels, how one is forced, the layout of its structs, and whose threads it uses."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusegen.kernels import op as registry
from fusegen.kernels.cpu import library

HEADERS = sorted(Path(library.__file__).parent.glob("abi*.h"))
C_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}

pytestmark = pytest.mark.skipif(not library.available(), reason=str(library.missing()))


def declared(op: str) -> list[tuple[str, type]]:
    """The fields of fg_<op>_args as the headers declare them, in order; where it only derives, those of its base."""
    text = re.sub(r"//.*", "", "".join(header.read_text() for header in HEADERS))
    if base := re.search(rf"struct fg_{op}_args : fg_(\w+)_args \{{\}};", text):
        return declared(base[1])
    found = re.search(rf"struct fg_{op}_args \{{(.*?)\}};", text, re.S)
    assert found, f"no header declares fg_{op}_args"
    fields: list[tuple[str, type]] = []
    for line in filter(None, (x.strip() for x in found[1].split(";"))):
        kind, names = re.match(r"(?:const )?(\w+)\s+(.*)", line, re.S).groups()
        for name in (n.strip() for n in names.split(",")):
            fields.append((name.lstrip("* "), ctypes.c_void_p if name.startswith("*") else C_TYPES[kind]))
    return fields


@pytest.mark.parametrize("op", sorted(library.ladder()))
def test_the_mirror_of_each_struct_is_the_declaration(op: str) -> None:
    mirror = importlib.import_module(f"fusegen.kernels.cpu.{op}").Args
    fields = declared(op)
    assert [(n, t) for n, t in mirror._fields_] == fields
    assert ctypes.sizeof(mirror) == library.opened().fg_sizeof(op.encode()) == 8 * len(fields)
    assert [getattr(mirror, n).offset for n, _ in fields] == [8 * i for i in range(len(fields))]


def test_an_unknown_op_has_no_size() -> None:
    assert library.opened().fg_sizeof(b"attentio") == library.opened().fg_sizeof(b"attentions") == 0


def test_levels_rise_from_scalar_and_the_highest_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert library.levels()[0] == "scalar"
    assert list(library.levels()) == sorted(library.levels(), key=library.LEVELS.index)
    assert library.level() == library.levels()[-1]


def test_a_level_is_forced_by_the_environment_and_by_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "scalar")
    assert library.level() == "scalar"
    with library.forced(library.levels()[-1]):
        assert library.level() == library.levels()[-1]
    assert library.level() == "scalar"


@pytest.mark.parametrize("name", ["avx3", "AVX2", "neon", "amx "])
def test_a_level_that_cannot_run_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in library.levels():
        pytest.skip("this machine runs it")
    monkeypatch.setenv(library.VARIABLE, name)
    with pytest.raises(library.LevelError) as caught:
        library.level()
    text = str(caught.value)
    assert name in text and "\n" not in text and all(known in text for known in library.levels())


def test_the_ladder_falls_to_a_level_that_exists() -> None:
    for op, row in library.ladder().items():
        assert list(row) == list(library.levels()), f"{op} has no kernel at scalar"
        for asked, runs in row.items():
            assert library.LEVELS.index(runs) <= library.LEVELS.index(asked)
            assert hasattr(library.opened(), f"fg_{op}_{runs}")


def test_forced_levels_bind_different_code() -> None:
    at = {ctypes.cast(library.function("attention", name), ctypes.c_void_p).value for name in library.levels()}
    assert len(at) == len(library.levels())


def test_the_pool_is_pytorchs() -> None:
    assert Path(library.pool()).resolve().is_relative_to(Path(torch.__file__).resolve().parent.parent)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert library.threads() == count
    finally:
        torch.set_num_threads(before)


_COUNT_THREADS = """
import os, torch
from fusegen.kernels import op as registry
torch.set_num_threads(3)
x = torch.randn(512, 512)
for _ in range(3): torch.nn.functional.gelu(x) @ x
def count(): return len(os.listdir("/proc/self/task"))
op = registry.get("attention")
q = torch.randn(4, 4, 512, 40)
alone = count()
for _ in range(5): torch.ops.fusegen.attention(q, q, q); torch.nn.functional.gelu(x) @ x
code = [line.split()[-1] for line in open("/proc/self/maps") if " r-xp " in line]
print(alone, count(), sum("omp" in os.path.basename(path) and ".so" in path for path in code))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_start_no_threads_of_their_own() -> None:
    root = str(Path(registry.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root}
    ran = subprocess.run([sys.executable, "-c", _COUNT_THREADS], env=env, capture_output=True, text=True, check=True)
    before, after, runtimes = map(int, ran.stdout.split())
    assert after == before
    assert runtimes == 1


def test_a_missing_library_is_said_in_one_line_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "build.txt").write_text("not built: no C++ compiler: g++ is not on the path\n")
    code = (
        "from fusegen.kernels import op; from fusegen.kernels.cpu import library\n"
        "assert not library.available() and op.get('attention').kernels == []; print(library.missing())"
    )
    env = {**os.environ, "FUSEGEN_CPU_LIBRARY": str(tmp_path), "PYTHONPATH": str(Path(registry.__file__).parent.parent)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.count("\n") == 1 and "no C++ compiler" in ran.stdout and "setup.py build_kernels" in ran.stdout


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_library_of_other_sources_is_refused_with_the_mend(tmp_path: Path) -> None:
    command = ["gcc", "-shared", "-x", "c", "-", "-o", str(tmp_path / "libfusegen_cpu.so")]
    subprocess.run(command, input="long fg_cpu_levels(void) { return 1; }", text=True, check=True)
    code = "from fusegen.kernels.cpu import library; print(library.available(), library.missing())"
    env = {**os.environ, "FUSEGEN_CPU_LIBRARY": str(tmp_path), "PYTHONPATH": str(Path(registry.__file__).parent.parent)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"False .*built from other sources.*setup\.py build_kernels\n", ran.stdout)


def test_a_list_of_bound_kernels_runs_in_one_call() -> None:
    op, calls, outs, args = registry.get("attention"), [], [], []
    for seed in range(3):
        a = op.case("odd").build(torch.Generator().manual_seed(seed), torch.float32)
        out = op.allocate(*a)
        launch = op.kernels[0].bind(out, a)
        calls.append(launch)
        outs.append(out[0])
        args.append(a)
    array = (ctypes.c_void_p * 6)(*(x for c in calls for x in c.call()))
    assert library.opened().fg_run(array, 3) == 0
    for out, a in zip(outs, args, strict=True):
        assert torch.equal(out, torch.ops.fusegen.attention(*a))
