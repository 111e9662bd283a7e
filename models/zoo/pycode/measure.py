"""What pycode's card says of what it writes: lines filled in, and functions that parse, on files that it has not read.

``python -m fusegen.models.zoo.pycode.measure [MODEL]`` measures any model of this family so, for comparison.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import fusegen
from fusegen.models.text_generation import TextGeneration
from fusegen.models.zoo.pycode import data
from fusegen.runtime.errors import RequestError

LINES, FUNCTIONS = 400, 100  # how many of each
BEFORE, AFTER = 320, 200  # characters at most before and after a line that is to be filled in
SHORT = 4  # characters, without which a line is too short to count


@dataclass(frozen=True)
class Hole:
    """A line or its rest, the text before it (with its indentation) and the text after it."""

    before: str
    line: str
    after: str


def holes(texts: Sequence[str], count: int = LINES, within: bool = False) -> list[Hole]:
    """Lines of ``texts``, drawn at random from all that are not too short, with whole lines around them.

    ``within``: what is left of a line from one of its words on that is not its first, each word with the same chance.
    """
    every = [(text, found) for text in texts for found in re.finditer(r"^([ \t]*)(\S.*)$", text, re.MULTILINE)]
    spans = [(text, found.start(2), found.end()) for text, found in every]
    if within:
        words = [(text, re.compile(r"(?<!\w)\w").finditer(text, start + 1, end), end) for text, start, end in spans]
        spans = [(text, word.start(), end) for text, found, end in words for word in found]
    spans = [span for span in spans if len(span[0][span[1] : span[2]].rstrip()) >= SHORT]
    out = []
    for at in np.random.default_rng(0).permutation(len(spans))[:count]:
        text, start, end = spans[at]
        before, after = text[max(0, start - BEFORE) : start], text[end : end + AFTER]
        if start > BEFORE and "\n" in before:
            before = before[before.index("\n") + 1 :]
        if end + AFTER < len(text) and "\n" in after[1:]:
            after = after[: after.rindex("\n") + 1]
        out.append(Hole(before, text[start:end].rstrip(), after))
    return out


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: characters put in, taken out or replaced."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@dataclass(frozen=True)
class Filled:
    """``exact``: the part of the lines that came out as they were; ``similar``: the mean of 1 - distance / length."""

    exact: float
    similar: float


def fill(model: TextGeneration, lines: Sequence[Hole], suffix: bool = True) -> Filled:
    """Greedy lines for the holes, with what comes after them or without."""
    exact, similar = 0, 0.0
    settings: dict[str, Any] = {"max_tokens": 64, "temperature": 0.0, "repeat_penalty": 1.0}
    for hole in lines:
        try:
            (made,) = model.generate(hole.before, hole.after if suffix else None, stop="\n", **settings)
        except RequestError:  # more tokens than the model takes: none
            made = ""
        made = made.rstrip()
        exact += made == hole.line
        similar += 1 - edits(made, hole.line) / max(len(made), len(hole.line))
    return Filled(exact / len(lines), similar / len(lines))


def signatures(texts: Sequence[str]) -> Iterator[str]:
    """The first lines of functions that are in no class."""
    for text in texts:
        yield from (found[0] for found in re.finditer(r"^def \w+\(.*\):\n", text, re.MULTILINE))


def parsing(model: TextGeneration, texts: Sequence[str], count: int = FUNCTIONS) -> float:
    """The part of functions, written from their first lines on with the model's own settings, that parse.

    A function ends before the first line that is not indented; what ends in its midst after 128 tokens is cut at the
    last line's end.
    """
    every = sorted(set(signatures(texts)))
    chosen = [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]
    good = 0
    for seed, first in enumerate(chosen):
        (made,) = model.generate(first, seeds=[seed], max_tokens=128)
        body = re.match(r"(?:[ \t]+.*\n|\n)*", made if made.endswith("\n") else made[: made.rfind("\n") + 1])
        try:
            ast.parse(first + (body[0] if body else ""))
        except (SyntaxError, ValueError):
            continue
        good += 1
    return good / max(1, len(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pycode")
    args = parser.parse_args()
    texts, model = list(data.load().held_out.values()), fusegen.load(args.model, dtype="float32")
    for within in (False, True):
        found = holes(texts, within=within)
        print("rests of lines" if within else "lines", fill(model, found), "without what comes after", end=" ")
        print(fill(model, found, suffix=False))
    print(f"functions that parse {parsing(model, texts):.1%}")


if __name__ == "__main__":
    main()
