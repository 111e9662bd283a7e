"""Classes of diffusers and transformers, as oracles."""

from __future__ import annotations

from typing import Any

from fusegen.bench.published.networks import library


def diffusers() -> Any:
    """The package ``diffusers``."""
    return library("diffusers")


def transformers() -> Any:
    """The package ``transformers``."""
    return library("transformers")
