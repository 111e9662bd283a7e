"""Every error a user can meet, each one line: what, where, and how to mend it."""

from __future__ import annotations


class Error(Exception):
    """The base of all errors that fusegen raises on purpose.

    ``what`` happened, ``where`` (file, node, argument), and the ``mend``; ``str(error)`` is one line of the three.
    """

    def __init__(self, what: str, where: str = "", mend: str = ""):
        self.what, self.where, self.mend = what, where, mend
        line = what + (f" ({where})" if where else "") + (f": {mend}" if mend else "")
        super().__init__(" ".join(line.split()))


class FileError(Error):
    """A file is missing, damaged, too large, or of a kind that is not opened."""


class UnsafeFileError(FileError):
    """A file holds what could run code (a pickle, a compiled object, a custom object)."""


class GraphError(Error):
    """A graph says something that cannot be read, planned or run."""


class RequestError(Error):
    """A caller asked for something that does not exist or is out of range."""


class QualityError(Error):
    """Quantizing loses more than was allowed; nothing was written."""


class OutOfMemoryError(Error):
    """There was not enough memory; the next, smaller request works."""


class Cancelled(Error):
    """The caller cancelled a generation; nothing was returned."""
