"""What may be asked of a model that writes text, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fusegen.models.request import integer, number
from fusegen.runtime.errors import RequestError
from fusegen.runtime.loop.decode import CHUNKS, Sampling

# Orders of a text whose middle is to be filled in (Bavarian et al. 2022, arXiv:2207.14255): the middle comes
# behind the suffix, or right behind its prefix, whose text it goes on with: <prefix> <suffix> suffix <middle> prefix.
FILLS = ("psm", "spm")
MOST_CHARACTERS, MOST_STOPS, MOST_PROMPTS, MOST_CONTEXT = 1_000_000, 64, 1024, 1 << 20


@dataclass(frozen=True)
class TextConfig:
    """``context``: the most tokens of a prompt and what comes after it.  The rest are tokens by their text, empty where
    there is none: ``end`` ends a text, ``begin`` stands before a prompt; ``prefix``, ``suffix`` and ``middle`` stand
    before the parts of a text whose middle is to be filled in, in the order that ``fill`` names (:data:`FILLS`)."""

    context: int
    end: str
    begin: str = ""
    prefix: str = ""
    suffix: str = ""
    middle: str = ""
    fill: str = "psm"

    def __post_init__(self) -> None:
        integer("context", self.context, 1, MOST_CONTEXT)
        if self.context % CHUNKS[-1]:  # a prompt's last chunk is padded, and must fit
            raise RequestError(f"context is {self.context}", "loop", f"it must be a multiple of {CHUNKS[-1]}")
        for name, value in asdict(self).items():
            if name != "context" and not isinstance(value, str):
                raise RequestError(f"{name} is a {type(value).__name__}", "loop", "it must be a text")
        if self.fill not in FILLS:
            raise RequestError(f"fill is {self.fill!r}", "loop", f"it must be one of {', '.join(FILLS)}")

    def special(self) -> dict[str, str]:
        """The tokens there are, by their part."""
        return {k: v for k, v in asdict(self).items() if k not in ("context", "fill") and v}


RANGES = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repeat_penalty": (0.01, 100.0),
    "frequency_penalty": (-100.0, 100.0), "presence_penalty": (-100.0, 100.0),
}  # fmt: skip


@dataclass(frozen=True)
class TextDefaults:
    """What a request that does not say gets, and a request's settings.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep all tokens, and each takes what the one
    before it left; the penalties look at the last ``repeat_last_n`` tokens (-1: all), the prompt's among them.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_last_n: int = 64

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 0), ("top_k", 0), ("repeat_last_n", -1)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low, MOST_CONTEXT))
        for name, bounds in RANGES.items():
            object.__setattr__(self, name, number(name, getattr(self, name), *bounds))

    def sampling(self, context: int) -> Sampling:
        """As the loop takes it; the draw's penalties are off where the window is empty."""
        off = self.repeat_last_n == 0
        return Sampling(
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            1.0 if off else self.repeat_penalty,
            0.0 if off else self.frequency_penalty,
            0.0 if off else self.presence_penalty,
            context if self.repeat_last_n < 0 else self.repeat_last_n,
        )


SETTINGS = tuple(f.name for f in fields(TextDefaults))


def texts(name: str, value: Any, most: int) -> tuple[str, ...]:
    """One text or several as a tuple, or RequestError."""
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, Sequence) or not all(isinstance(t, str) for t in several):
        raise RequestError(f"{name} is not a text or a list of texts", name, f"it is {value!r:.80}")
    if len(several) > most:
        raise RequestError(f"{name} has {len(several)} texts", name, f"give at most {most}")
    for text in several:
        if len(text) > MOST_CHARACTERS:
            raise RequestError(f"{name} has {len(text)} characters", name, f"give at most {MOST_CHARACTERS}")
    return tuple(several)
