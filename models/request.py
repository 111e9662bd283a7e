"""What may be asked of a model that makes pictures, checked before anything is allocated."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from fusegen.runtime.errors import RequestError
from fusegen.runtime.sampler import Coefficients, find

MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE, MOST_TEXT, MOST_SIDE = 1024, 1000, 1000.0, 10_000, 16_384

Config = TypeVar("Config")


@dataclass(frozen=True)
class ImageConfig:
    """The pictures a model makes: default ``width`` and ``height`` in pixels, and what other sizes it takes."""

    width: int
    height: int
    least: int
    most: int
    multiple: int = 1
    channels: int = 3

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if type(value) is not int or not 1 <= value <= MOST_SIDE:
                raise RequestError(f"{key} is not an integer from 1 to {MOST_SIDE}", "image", f"it is {value!r}")
        if self.channels not in (1, 3):
            raise RequestError(f"{self.channels} channels are no picture", "image", "use 1 or 3")
        self.check("width", self.width)
        self.check("height", self.height)

    def check(self, name: str, value: int) -> int:
        """``value`` as a side of a picture; RequestError says which there are."""
        if not self.least <= value <= self.most or value % self.multiple:
            which = str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
            every = f", a multiple of {self.multiple}" if self.multiple > 1 and self.least < self.most else ""
            raise RequestError(f"{name} {value} is not one this model makes", name, f"ask for {which}{every}")
        return value


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets."""

    sampler: str = "dpmpp_2m"
    steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", find(self.sampler))
        object.__setattr__(self, "steps", integer("steps", self.steps, 1, MOST_STEPS))
        object.__setattr__(self, "guidance", check_guidance(self.guidance))


def integer(name: str, value: Any, least: int, most: int) -> int:
    """``value`` as an int within bounds, or RequestError."""
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if not least <= found <= most:
        raise RequestError(f"{name} is not an integer from {least} to {most}", name, f"it is {value!r:.80}")
    return found


def number(name: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float within bounds, or RequestError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is not a number from {low:g} to {high:g}", name, f"it is {value!r:.80}")
    return float(value)


def check_guidance(value: Any) -> float:
    """``value`` as a finite number of moderate size, or RequestError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or abs(value) > MOST_GUIDANCE:
        raise RequestError(f"guidance is not a number up to {MOST_GUIDANCE:g}", "guidance", f"it is {value!r:.80}")
    return float(value)


def check_text(name: str, value: Any) -> str:
    """``value`` as a text of moderate length, or RequestError."""
    if not isinstance(value, str):
        raise RequestError(f"the {name} is a {type(value).__name__}", name, "give one string")
    if len(value) > MOST_TEXT:
        raise RequestError(f"the {name} has {len(value)} characters", name, f"give at most {MOST_TEXT}")
    return value


@dataclass(frozen=True)
class Request:
    """What is to be made, checked: the texts (negative one first, where there is guidance), rows, seeds and sizes."""

    texts: tuple[str, ...]
    plan: Coefficients
    seeds: tuple[int, ...]
    shape: tuple[int, int, int]
    guidance: float | None


def mapping(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object that ``holder`` has at ``key``, or RequestError."""
    value = holder.get(key)
    if not isinstance(value, Mapping):
        raise RequestError(f"there is no {key!r}", "loop", "it must be an object")
    return value


def config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration of that kind from a mapping; RequestError for an unknown key or a missing one."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise RequestError(f"{kind.__name__} has no {key!r}", mend=f"it has {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise RequestError(f"{kind.__name__} is incomplete: {error}") from None
