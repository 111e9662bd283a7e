"""Which packages there are, and the C++ library's build.  Everything else stands in pyproject.toml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
LAYERS = ("kernels", "runtime", "models", "bench")  # folders at the top level that import as fusegen.<folder>
IN_PLACE = ROOT / "kernels" / "cpu" / "_lib"
OBJECTS = ROOT / "build" / "kernels"


def packages() -> list[str]:
    """Every package by its import name; pyproject.toml's package-dir says where each layer stands."""
    found = ["fusegen", *(f"fusegen.{p}" for p in find_packages("fusegen"))]
    for layer in LAYERS:
        found += [f"fusegen.{layer}", *(f"fusegen.{layer}.{p}" for p in find_packages(layer))]
    return found


def builder() -> Any:
    """kernels/cpu/build.py, loaded by its path: nothing of fusegen is importable while it is being installed."""
    spec = importlib.util.spec_from_file_location("fusegen_cpu_build", ROOT / "kernels" / "cpu" / "build.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(Command):
    """``python setup.py build_kernels``: (re)build the C++ library in place, compiling only what changed."""

    description = "build the C++ kernels in place"
    user_options: ClassVar = [("jobs=", None, "compilations at a time (2)")]

    def initialize_options(self) -> None:
        self.jobs = "2"

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        build = builder()
        try:
            print(build.build(IN_PLACE, OBJECTS, jobs=int(self.jobs)))
        except build.BuildFailed as error:
            raise SystemExit(f"error: {error}") from None


class BuildPackages(build_py):
    """Copies the packages, then builds the C++ library: into the wheel, or in place for an editable install."""

    def run(self) -> None:
        super().run()
        target = IN_PLACE if self.editable_mode else Path(self.build_lib) / "fusegen" / "kernels" / "cpu" / "_lib"
        builder().build_or_say_why(target, OBJECTS)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library is plain C, bound to a platform but to no interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Says that the wheel holds machine code, so that it is tagged with its platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=packages(),
    distclass=BinaryDistribution,
    cmdclass={"build_kernels": BuildKernels, "build_py": BuildPackages, "bdist_wheel": PlatformWheel},
)
