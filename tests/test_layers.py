"""Imports go one way: fusegen -> bench, models -> runtime -> kernels, with finer rules inside kernels and runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusegen.kernels import catalogue

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "runtime", "models", "bench")
# Layer -> the layers it may import, itself included.  "fusegen" is the door: the files of fusegen/ itself.
ALLOWED = {
    "kernels": {"kernels"},
    "runtime": {"runtime", "kernels"},
    "models": {"models", "runtime", "kernels"},
    "bench": {"bench", "models", "runtime", "kernels"},
    "fusegen": {"fusegen", "bench", "models", "runtime", "kernels"},
}
# Sources that run code found in a file, or that only oracles may import.
ORACLES = {"diffusers", "transformers", "openvino", "scipy"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def module_of(path: Path) -> str:
    """The name a file is imported by."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "fusegen" else ["fusegen", *parts])


def imports_in(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every absolute module name that ``source`` imports; each name of a from-import counts as a possible module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                parent = package[: len(package) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def files() -> list[Path]:
    return sorted(p for folder in ("fusegen", *LAYERS) for p in (ROOT / folder).rglob("*.py"))


def layer_of(name: str) -> str | None:
    """The layer that an imported name belongs to, or None if it is not fusegen's."""
    parts = name.split(".")
    if parts[0] != "fusegen":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "fusegen"


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """The rules that the imports of ``source``, standing at ``module``, break; one line each."""
    out = []
    for name in imports_in(source, module, is_package):
        reason = _foreign(module, name) if layer_of(name) is None else _own(module, name)
        out += [f"{module} imports {name}: {reason}"] if reason else []
    if module.startswith("fusegen.runtime.") and module != "fusegen.runtime.plan":
        calls = (n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call))
        if any(isinstance(f, ast.Attribute) and f.attr == "pick" for f in calls):
            out.append(f"{module} calls pick: only plan picks kernels")
    return out


def _foreign(module: str, name: str) -> str | None:
    """Why ``module`` may not import ``name``, a module that is not fusegen's."""
    top = name.split(".")[0]
    if top in LAYERS:
        return f"this makes a second module object: say fusegen.{name}"
    if top in PICKLES:
        return "no pickle is ever opened"
    if top == "triton" and not module.startswith("fusegen.kernels.gpu"):
        return "Triton is imported only in kernels/gpu"
    if top in ORACLES and layer_of(module) != "bench":
        return "an oracle, for tests and benchmarks only"
    return None


def _own(module: str, name: str) -> str | None:
    """Why ``module`` may not import ``name``, a module of fusegen's."""
    layer, target = layer_of(module), layer_of(name)
    assert layer is not None
    if target not in ALLOWED[layer] and name != "fusegen":
        return f"{layer} does not import {target}"
    if layer == "kernels":
        return _within_kernels(module.split("."), name.split("."))
    if layer == "runtime":
        return _within_runtime(module.split("."), name.split("."))
    return None


def _within_kernels(module: list[str], name: list[str]) -> str | None:
    """gpu/ and cpu/ import op.py, their own folder's files and their own op's spec, never each other."""
    specs = {p.stem for p in (ROOT / "kernels").glob("*.py")} - catalogue.NOT_OPS
    where, target = "".join(module[2:3]), "".join(name[2:3])
    if where not in ("cpu", "gpu"):
        if target in ("cpu", "gpu") and where not in ("catalogue", "op"):
            return "a spec does not import its kernels"
    elif target in {"cpu", "gpu"} - {where}:
        return "cpu/ and gpu/ never import each other"
    elif target in specs and module[3] in specs and target != module[3]:
        return "a kernel imports its own op's spec only"
    return None


def _within_runtime(module: list[str], name: list[str]) -> str | None:
    """read and rewrite never see what runs their programs; only plan picks kernels."""
    if "".join(module[2:3]) in ("read", "rewrite") and name[1] == "runtime":
        if "".join(name[2:3]) in ("engine", "plan", "backends", "loop"):
            return "read and rewrite never see the engine"
    if name[-1] == "pick" and name[1] == "kernels" and module[2] != "plan":
        return "only plan picks kernels"
    return None


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    assert faults(path.read_text(), module_of(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fusegen.kernels.attention", "from fusegen.runtime.plan import plan"),
        ("fusegen.kernels.attention", "from fusegen.kernels.cpu import library"),
        ("fusegen.kernels.cpu.attention", "from fusegen.kernels.gpu import attention"),
        ("fusegen.kernels.cpu.layer_norm", "import fusegen.kernels.group_norm"),
        ("fusegen.kernels.cpu.attention", "import triton"),
        ("fusegen.runtime.engine", "from fusegen.models import load"),
        ("fusegen.runtime.engine", "def f():\n    from fusegen import models"),
        ("fusegen.runtime.engine", "from ..models import load"),
        ("fusegen.runtime.engine", "from fusegen.kernels.op import pick"),
        ("fusegen.runtime.engine", "from fusegen.kernels import op\nop.pick(1, 2, 3)"),
        ("fusegen.runtime.engine", "import kernels.op"),
        ("fusegen.runtime.rewrite.match", "from fusegen.runtime import engine"),
        ("fusegen.runtime.read.pt2", "import pickle"),
        ("fusegen.models.load", "from fusegen.bench import row"),
        ("fusegen.models.load", "from fusegen.cli import main"),
        ("fusegen.models.load", "import importlib\nimportlib.import_module('diffusers')"),
        ("fusegen.bench.cli", "from fusegen.cli import main"),
    ],
)
def test_each_rule_can_fail(module: str, source: str) -> None:
    assert faults(source, module) != []


@pytest.mark.parametrize("layer", ["kernels", "runtime", "models"])  # pytest itself imports bench, to collect its suite
def test_a_layer_is_refused_under_its_bare_name(layer: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {layer}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import '{layer}' as 'fusegen.{layer}'" in done.stderr.splitlines()[-1]
