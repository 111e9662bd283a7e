"""Which packages there are, and the C++ library's build.  Everything else stands in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

LAYERS = ("kernels", "runtime", "models", "bench")  # folders at the top level that import as fusegen.<folder>


def packages() -> list[str]:
    """Every package by its import name; pyproject.toml's package-dir says where each layer stands."""
    found = ["fusegen", *(f"fusegen.{p}" for p in find_packages("fusegen"))]
    for layer in LAYERS:
        found += [f"fusegen.{layer}", *(f"fusegen.{layer}.{p}" for p in find_packages(layer))]
    return found


setup(packages=packages())
