"""A model's file and its sessions by name, for the commands that look into files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusegen.runtime.bundle import Bundle
    from fusegen.runtime.engine import Session


def open_bundle(path: Path) -> Bundle | None:
    """The bundle at ``path``, or None where something else stands there."""
    from fusegen.runtime.bundle import Bundle
    from fusegen.runtime.manifest import MANIFEST
    from fusegen.runtime.read.archive import Archive

    if path.is_dir():
        return Bundle.open(path)
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
    return Bundle.open(path) if zipped and MANIFEST in Archive(path).members else None


def open_sessions(model: str, component: str | None, **options: Any) -> Mapping[str, Session]:
    """The sessions of a model by component name, or only ``component``, as its family makes them with ``options``.

    A bundle without a family, or a bare graph, is compiled as it stands.
    """
    import fusegen
    from fusegen.models.load import locate
    from fusegen.runtime.read import read

    path = locate(model)
    bundle = open_bundle(path)
    if bundle is None:
        programs = {p.name: p for p in [read(path)]}
    elif bundle.manifest.family:
        refuse_unknown([component] if component else [], bundle.manifest.components, "component")
        family = fusegen.load(path, **options)
        return {name: getattr(family, name) for name in ([component] if component else bundle.manifest.components)}
    else:
        programs = {name: bundle.program(name) for name in bundle.manifest.components}
    refuse_unknown([component] if component else [], programs, "component")
    return {k: fusegen.compile(p, **options) for k, p in programs.items() if component in (None, k)}


def refuse_unknown(wanted: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Raise RequestError for the first of ``wanted`` that is not ``known``, listing those that are."""
    from fusegen.runtime.errors import RequestError

    known = sorted(known)
    for name in wanted:
        if name not in known:
            raise RequestError(f"no {kind} is called {name!r}", mend=f"there are {', '.join(known) or 'none'}")
