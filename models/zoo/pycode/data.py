"""The data of pycode: the source of the running interpreter's standard library, without its tests (PSF licence 2)."""

from __future__ import annotations

import hashlib
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
# A line's end with the next line's indentation, words, single digits, runs of other signs, other white space.
SPLIT = r"\n *| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|\s"


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
    """Training windows: pieces of files from a line's start on, half of them for filling in the middle.

    A window begins with ``<|end|>``, or is ``<|prefix|> a <|suffix|> c <|middle|> b <|end|>`` for a text a + b + c cut
    at two random characters (Bavarian et al. 2022, arXiv:2207.14255).
    """

    CHARACTERS = 5  # of text read for a token of the window: more than a token has on average

    def __init__(self, texts: Sequence[str], tok: Tokenizer, length: int):
        self.texts, self.tok, self.length = texts, tok, length
        self.ends = np.cumsum([len(t) for t in texts])
        self.end, self.prefix, self.suffix, self.middle = special(tok)

    def one(self, rng: np.random.Generator) -> list[int]:
        """One window: at most ``length`` + 1 tokens."""
        at = int(rng.integers(self.ends[-1]))
        index = int(np.searchsorted(self.ends, at, side="right"))
        text = self.texts[index]
        start = text.rfind("\n", 0, at - int(self.ends[index]) + len(text)) + 1
        piece = text[start : start + self.CHARACTERS * self.length]
        encoded = self.tok.encode(piece)
        if rng.random() < 0.5:
            most = self.length - 3
            stop = encoded.offsets[most - 1][1] if len(encoded.ids) > most else len(piece)
            return self.filled(piece[: int(rng.integers(min(64, stop), stop + 1))], rng)
        whole = start + len(piece) == len(text)
        return [self.end, *encoded.ids, *([self.end] if whole else [])][: self.length + 1]

    def filled(self, text: str, rng: np.random.Generator) -> list[int]:
        """A text cut at two random characters, the middle last."""
        first, second = sorted(int(i) for i in rng.integers(0, len(text) + 1, 2))
        a, b, c = (e.ids for e in self.tok.encode_batch([text[:first], text[first:second], text[second:]]))
        c = c[: max(0, self.length - 3 - len(a) - len(b))]
        return [self.prefix, *a, self.suffix, *c, self.middle, *b, self.end][: self.length + 1]

    def batch(self, step: int, size: int) -> np.ndarray:
        """``size`` windows of a step, (size, length + 1) int64 and -100 behind their ends, from its number."""
        rng = np.random.default_rng(step)
        out = np.full((size, self.length + 1), -100, dtype=np.int64)
        for row in out:
            ids = self.one(rng)
            row[: len(ids)] = ids
        return out
