"""JSON from files that are not trusted: bounded in size and depth, no duplicate keys, no NaN."""

from __future__ import annotations

import json
from typing import Any

from fusegen.runtime.errors import FileError

MAX_GRAPH = 256 << 20  # bytes; Stable Diffusion 1.5's U-Net takes 3 MB
MAX_CONFIG = 64 << 20


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return out


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def loads(text: bytes, where: str) -> Any:
    """The value that ``text`` spells; :class:`FileError` where it is not JSON as the standard has it."""
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except RecursionError:
        raise FileError("the JSON is nested too deeply", where=where) from None
    except ValueError as error:
        raise FileError(f"the JSON is damaged: {error}"[:200], where=where, mend="get the file again") from None


def load_object(text: bytes, where: str) -> dict[str, Any]:
    """As :func:`loads`, and the value is an object."""
    value = loads(text, where)
    if not isinstance(value, dict):
        raise FileError("the JSON is not an object", where=where)
    return value
