"""Models by file or by name."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusegen.runtime.errors import FileError, RequestError

if TYPE_CHECKING:
    import torch

    from fusegen.runtime.bundle import Bundle

ZOO = Path(__file__).parent / "zoo"
# manifest.family -> the module and class that run it
FAMILIES = {
    "text-to-image": ("fusegen.models.text_to_image", "TextToImage"),
    "text-generation": ("fusegen.models.text_generation", "TextGeneration"),
    "gan": ("fusegen.models.gan", "Gan"),
}


def zoo() -> dict[str, Path]:
    """The models that come with the package, by name."""
    return {p.stem: p for p in sorted(ZOO.glob("*.fg"))}


def locate(name: str | Path) -> Path:
    """The file of ``name``: a model of the zoo, else a path that exists; FileError lists those there are.

    A file or folder of the current directory called like one of them is ``./emoji``, or a :class:`~pathlib.Path`.
    """
    path, known = Path(name), zoo()
    if isinstance(name, str) and name in known:
        return known[name]
    if path.exists():
        return path
    raise FileError(f"there is no model {str(name)!r}", "", f"give a .fg file, or one of {', '.join(known) or 'none'}")


def load(
    name: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    deterministic: bool = False,
    without: Collection[str] = (),
    cache: str | Path | None = None,
) -> Any:
    """Open the model in the ``.fg`` file or folder ``name``, or the zoo's model of that name: its family's class.

    ``device``: ``"cpu"`` or ``"cuda"``.  ``dtype``: what it computes in; None is the device's best.  ``deterministic``
    binds only kernels whose results do not depend on the batch (a text model's never do).  ``without``: ops whose
    kernels are left alone, ``cache``: a folder for what is made of the weights, for the next start, both as
    :func:`~fusegen.runtime.compile.compile` has them.  Raises FileError, or RequestError for a bundle
    that holds a bare program.
    """
    bundle = _opened(name)
    module, kind = FAMILIES[bundle.manifest.family]
    return getattr(importlib.import_module(module), kind).from_bundle(
        bundle, device, dtype, deterministic, without, cache
    )


def family_of(name: str | Path) -> str:
    """The family of the model that :func:`load` would open."""
    return _opened(name).manifest.family


def _opened(name: str | Path) -> Bundle:
    """The bundle of a family that is known."""
    from fusegen.runtime.bundle import Bundle

    if not isinstance(name, (str, Path)):
        raise RequestError(f"a model is a path or a name, not a {type(name).__name__}", "load")
    path = locate(name)
    bundle = Bundle.open(path)
    family = bundle.manifest.family
    if family not in FAMILIES:
        what = f"the family {family!r}" if family else "no family"
        raise RequestError(
            f"the bundle is of {what}", str(path), f"there are {', '.join(FAMILIES)}; or use fusegen.read"
        )
    return bundle


def save(model: Any, path: str | Path) -> None:
    """Write ``model`` as a ``.fg`` file: whole or not at all."""
    model.save(path)
