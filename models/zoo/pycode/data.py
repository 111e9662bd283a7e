"""The data of pycode: the source of the running interpreter's standard library, without its tests (PSF licence 2)."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
END, PREFIX, SUFFIX, MIDDLE = SPECIAL = ("<|end|>", "<|prefix|>", "<|suffix|>", "<|middle|>")
# tests, what pip brought, and tables that are no code: code pages, the manual's text as a dictionary
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
HELD_OUT = 20  # one file in so many, by its path's hash
# Lines' ends with the next line's indentation; words (of snake_case each with the underscores before it), single digits
# and runs of other signs, each with a space before it; runs of spaces but for that one; other white space.
SPLIT = r"\n+ *| ?_*[A-Za-z]+| ?_+| ?[0-9]| ?[^\sA-Za-z_0-9]+| +(?= )| +|\s"
WORD = re.compile(r"\b")


@dataclass(frozen=True)
class Sources:
    """The files' texts by their path below the library's folder."""

    train: dict[str, str]
    held_out: dict[str, str]


def load(folder: Path | None = None) -> Sources:
    """Every ``.py`` file of ``folder`` (the running interpreter's standard library) that is UTF-8, by sorted path."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    found = Sources({}, {})
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts[:-1]) and not name.name.startswith("_sysconfigdata"):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            digest = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16)
            (found.held_out if digest % HELD_OUT == 0 else found.train)[name.as_posix()] = text
    if not found.train:
        raise SystemExit(f"{root} holds no Python source")
    return found


def tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE trained on ``texts``: any text has tokens, and they give its bytes back."""
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=alphabet,
            max_token_length=24,
            show_progress=False,
        ),
    )
    return tok


def special(tok: Tokenizer) -> list[int]:
    """The numbers of :data:`SPECIAL`."""
    return [i for i in map(tok.token_to_id, SPECIAL) if i is not None]


class Windows:
    """Training windows: pieces of files one behind the other, more than half of them for filling in the middle.

    A piece is ``<|end|>`` and a file's text from a line's start on, or ``<|prefix|> <|suffix|> c <|middle|> t <|end|>``
    for a text t that c goes on from: the order suffix, prefix, middle of Bavarian et al. (2022, arXiv:2207.14255), in
    which a middle goes on from its prefix as any text does.  Where in t the middle begins is nothing a window shows, so
    every place in it is learned, and a prefix's last token is what it would be in the whole text.
    """

    FILLED = 0.6  # the part of the pieces that are for filling in the middle
    LEAST = 32  # tokens: the end of a window is left to no piece shorter than that
    CHARACTERS = 6  # of text read for a token of a piece: more than a token has on average

    def __init__(self, texts: Sequence[str], tok: Tokenizer, length: int):
        self.texts, self.tok, self.length = texts, tok, length
        self.ends = np.cumsum([len(t) for t in texts])
        self.end, self.prefix, self.suffix, self.middle = special(tok)

    def place(self, rng: np.random.Generator) -> tuple[str, int]:
        """A file and a character of it, any of all the files' with the same chance."""
        at = int(rng.integers(self.ends[-1]))
        index = int(np.searchsorted(self.ends, at, side="right"))
        return self.texts[index], at - int(self.ends[index]) + len(self.texts[index])

    def onward(self, room: int, rng: np.random.Generator) -> list[int]:
        """A file's text from a line's start on, in at most ``room`` tokens."""
        text, at = self.place(rng)
        start = text.rfind("\n", 0, at) + 1
        piece = text[start : start + self.CHARACTERS * room]
        return [self.end, *self.tok.encode(piece).ids, *[self.end] * (start + len(piece) == len(text))][:room]

    def cut(self, text: str, at: int, rng: np.random.Generator) -> int:
        """Where the suffix begins: at the end or the beginning of the line of ``at``, before or behind its indentation,
        between two words, or at any character."""
        kind = rng.random()
        if kind < 0.4:
            stop = text.find("\n", at)
            return len(text) if stop < 0 else stop
        if kind < 0.6:
            start = text.rfind("\n", 0, at) + 1
            return start if kind < 0.5 else start + len(text[start:at]) - len(text[start:at].lstrip(" "))
        found = WORD.search(text, at) if kind < 0.8 else None
        return found.start() if found else at

    def filled(self, room: int, rng: np.random.Generator) -> list[int]:
        """A suffix and the text up to it, from a line's start on where it has one, in at most ``room`` tokens."""
        text, at = self.place(rng)
        at = self.cut(text, at, rng)
        most = int(rng.integers(self.LEAST, room + 1)) - 4
        after = int(most * rng.uniform(0.05, 0.6))
        c = self.tok.encode(text[at : at + self.CHARACTERS * after]).ids[:after]
        before = text[max(0, at - self.CHARACTERS * (most - len(c))) : at]
        encoded = self.tok.encode(before)
        if len(encoded.ids) > most - len(c):
            start = encoded.offsets[len(encoded.ids) - most + len(c)][0]
            line = before.find("\n", start, len(before) - 1)
            before = before[start if line < 0 else line + 1 :]
        t = self.tok.encode(before).ids[len(c) - most :]
        return [self.prefix, self.suffix, *c, self.middle, *t, self.end]

    def one(self, rng: np.random.Generator) -> list[int]:
        """One window: at most ``length`` + 1 tokens."""
        ids, size = list[int](), self.length + 1
        while (room := size - len(ids)) >= self.LEAST or not ids:
            fill = rng.random() < self.FILLED and room >= self.LEAST
            ids += self.filled(room, rng) if fill else self.onward(room, rng)
        return ids

    def batch(self, step: int, size: int) -> np.ndarray:
        """``size`` windows of a step, (size, length + 1) int64 and -100 behind their ends, from its number."""
        rng = np.random.default_rng(step)
        out = np.full((size, self.length + 1), -100, dtype=np.int64)
        for row in out:
            ids = self.one(rng)
            row[: len(ids)] = ids
        return out
