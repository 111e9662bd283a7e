"""What families do alike with the bundle they came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusegen.runtime.bundle import Bundle
from fusegen.runtime.errors import Error, FileError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's ``tokenizer.json``; FileError where it cannot be read."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(bundle.file("tokenizer.json").decode())
    except Error:
        raise
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise FileError(f"tokenizer.json cannot be read: {error}", str(bundle.path), "get the file again") from None


def save(bundle: Bundle | None, path: str | Path) -> None:
    """Write the bundle that a model came from: its programs as they were read, its files and manifest."""
    if bundle is None:
        raise RequestError("this model was not loaded from a bundle", "save", "save the bundle it was made from")
    own = {name: bundle.file(name) for name in bundle.manifest.members if not name.startswith("components/")}
    kinds = {c.storage_dtype for c in bundle.manifest.components.values()}
    programs = {name: bundle.program(name) for name in bundle.manifest.components}
    Bundle.write(path, bundle.manifest, programs, own, kinds.pop() if len(kinds) == 1 else "")
