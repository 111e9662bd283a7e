"""The wheel, the editable install and the checkout each give their own files, whatever the current folder is."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "runtime", "models", "bench")
SUITE = Path("bench/suite")  # what `pytest bench/` collects: no package, and in no wheel
# Prints where each layer came from; every layer must come from the one place.
WHERE = """
import importlib, pathlib, fusegen
print(pathlib.Path(fusegen.__file__).parent)
for layer in ("kernels", "runtime", "models", "bench"):
    print(pathlib.Path(importlib.import_module("fusegen." + layer).__file__).parent)
"""


def pip(*args: str, folder: Path, **variables: str) -> None:
    """Run pip with the build's scratch in ``folder``, so that the checkout stays as it was (the objects are reused)."""
    extra = folder / "extra.cfg"
    extra.write_text(f"[build]\nbuild_base = {folder / 'build'}\n[egg_info]\negg_base = {folder}\n")
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *args, "--no-deps", "--no-index"]
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(extra), **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def python(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in ``cwd``, with ``paths`` on the module search path behind the current folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def places(cwd: Path, *paths: Path, code: str = WHERE) -> list[Path]:
    done = python(code, cwd, *paths)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "-w", str(folder), str(ROOT), folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", str(folder / "site"), str(wheel), folder=folder)
    return folder / "site"


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name
    assert "any" not in wheel.name


def test_the_wheel_holds_every_module_and_what_goes_with_them(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"fusegen/{p.relative_to(ROOT / 'fusegen')}" for p in (ROOT / "fusegen").rglob("*.py")}
    for layer in LAYERS:
        found = {p.relative_to(ROOT) for kind in ("*.py", "*.json", "*.fg") for p in (ROOT / layer).rglob(kind)}
        expected |= {f"fusegen/{p}" for p in found if "results" not in p.parts and SUITE not in p.parents}
    assert expected - names == set()
    assert "fusegen/kernels/cpu/_lib/libfusegen_cpu.so" in names
    assert {n.split("/")[0] for n in names} == {"fusegen", wheel.name.split("-py3")[0] + ".dist-info"}


def test_the_wheel_is_used_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert places(tmp_path, installed) == [installed / "fusegen", *(installed / "fusegen" / x for x in LAYERS)]


def test_the_wheel_brings_its_library(installed: Path, tmp_path: Path) -> None:
    code = "from fusegen.kernels.cpu import library; print(library.opened()._name)"
    assert places(tmp_path, installed, code=code) == [installed / "fusegen/kernels/cpu/_lib/libfusegen_cpu.so"]


def test_the_root_of_a_checkout_gives_the_checkout(installed: Path) -> None:
    """Else the new files of a developer would be mixed with the installed ones."""
    assert places(ROOT, installed) == [ROOT / "fusegen", *(ROOT / x for x in LAYERS)]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_wheel_installs_no_bare_layer(installed: Path, tmp_path: Path, layer: str) -> None:
    assert f"No module named '{layer}'" in python(f"import {layer}", tmp_path, installed).stderr


def test_without_a_compiler_it_installs_and_says_why(tmp_path: Path) -> None:
    pip("wheel", "--no-build-isolation", "-w", str(tmp_path), str(ROOT), folder=tmp_path, CXX="no-such-compiler")
    (built,) = tmp_path.glob("*.whl")
    pip("install", "--target", str(tmp_path / "site"), str(built), folder=tmp_path)
    code = "from fusegen.kernels.cpu import library; print(library.missing())"
    done = python(code, tmp_path, tmp_path / "site")
    assert "no-such-compiler is not on the path" in done.stdout, done.stderr


def test_the_editable_install_gives_the_checkout(tmp_path: Path) -> None:
    # Without --ignore-installed pip removes the environment's own install first, which tests beside this one run by.
    given = ["--ignore-installed", "--no-build-isolation", "--prefix", str(tmp_path / "env"), "-e", str(ROOT)]
    pip("install", *given, folder=tmp_path)
    (site,) = (tmp_path / "env").rglob("site-packages")
    code = f"import site; site.addsitedir({str(site)!r})\n{WHERE}"
    assert places(tmp_path, code=code) == [ROOT / "fusegen", *(ROOT / x for x in LAYERS)]


def test_no_folder_of_modules_is_left_out() -> None:
    folders = {p.parent.relative_to(ROOT) for layer in LAYERS for p in (ROOT / layer).rglob("*.py")} - {SUITE}
    assert [str(f) for f in sorted(folders) if not (ROOT / f / "__init__.py").exists()] == []


def test_one_onnx_runtime_on_every_platform() -> None:
    """The two distributions install the same package, so on each platform exactly one is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = [Requirement(r) for r in project["dependencies"] if r.startswith("onnxruntime")]
    expected = {("linux", "x86_64"): "onnxruntime-gpu", ("win32", "AMD64"): "onnxruntime-gpu",
                ("linux", "aarch64"): "onnxruntime", ("darwin", "arm64"): "onnxruntime",
                ("win32", "ARM64"): "onnxruntime"}  # fmt: skip
    for (system, machine), name in expected.items():
        where = {"sys_platform": system, "platform_machine": machine}
        assert [r.name for r in rows if r.marker and r.marker.evaluate(where)] == [name], where


def test_constraints_pin_what_the_project_asks_for() -> None:
    """Every requirement but Triton, which PyTorch's wheels pin themselves, has one tested version that satisfies it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    pins = {name.lower(): version for name, version in (line.split("==") for line in lines)}
    for requirement in map(Requirement, project["dependencies"] + extras):
        if requirement.name not in ("triton", "fusegen", "onnxruntime"):
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_building_needs_no_torch() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [Requirement(r).name for r in build] == ["setuptools"]
    assert "torch" not in (ROOT / "setup.py").read_text()


def test_setup_lists_what_the_tree_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    given: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    tree = {p.parent.relative_to(ROOT) for layer in ("fusegen", *LAYERS) for p in (ROOT / layer).rglob("__init__.py")}
    names = {".".join(p.parts if p.parts[0] == "fusegen" else ("fusegen", *p.parts)) for p in tree}
    assert set(given["packages"]) == names  # type: ignore[call-overload]
