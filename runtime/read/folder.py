"""A bundle as a folder: the same tree as in its zip, each member mapped when it is read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from fusegen.runtime.errors import FileError
from fusegen.runtime.read import archive


class Folder:
    """The regular files under a folder, by name; links are refused, since they may lead out of it."""

    def __init__(self, path: Path):
        self.path = path
        self._sizes = dict(self._walk(path, ""))

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(sorted(entries, key=lambda e: e.name)):
                name = archive.check_name(prefix + entry.name, self.path)
                if entry.is_symlink() or count >= archive.MAX_MEMBERS:
                    raise FileError(
                        "a link is not followed" if entry.is_symlink() else "too many files", f"{self.path}: {name}"
                    )
                if entry.is_dir():
                    yield from self._walk(Path(entry.path), name + "/")
                elif entry.is_file():
                    yield name, entry.stat().st_size
                else:
                    raise FileError("this is not a regular file", where=f"{self.path}: {name}")

    def sizes(self) -> dict[str, int]:
        """Member name -> bytes."""
        return self._sizes

    def head(self, name: str) -> bytes:
        """A member's first bytes."""
        with (self.path / name).open("rb") as file:
            return file.read(16)

    def content(self, name: str, limit: int) -> bytes:
        """A copy of a member of at most ``limit`` bytes."""
        if name not in self._sizes:
            raise FileError("a member is missing", where=f"{self.path}: {name}")
        with (self.path / name).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise FileError(f"more than {limit} bytes, which are not read", where=f"{self.path}: {name}")
        return data

    def span(self, name: str) -> tuple[mmap.mmap, int, int]:
        """A member's mapping, first byte and size."""
        if name not in self._sizes:
            raise FileError("a member is missing", where=f"{self.path}: {name}")
        data = archive.map_file(self.path / name)
        return data, 0, len(data)
