"""Tokens to text as they come: bytes to characters at their boundaries, and stop strings across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (GPT-2, Radford et al. 2019): printable ones stand for
    themselves, the others for those from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What each token of a byte-level tokenizer stands for; special tokens stand for nothing."""
    table, special = alphabet(), {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    out = []
    for i in range(tokenizer.get_vocab_size()):
        token = tokenizer.id_to_token(i)
        out.append(b"" if token is None or i in special else bytes(table[c] for c in token))
    return out


class TextStream:
    """One text as its tokens come: :meth:`push` bytes, get the text that is sure by now.

    A character is given when its last byte is there; bytes that are no UTF-8 give U+FFFD.  What may be the beginning of
    a stop string is held back; once one is complete, ``stopped`` is set, and neither it nor anything after it is given.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stop = [s for s in stop if s]
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes, final: bool = False) -> str:
        """The text that ``piece`` makes sure; with ``final``, all that is left."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(piece, final)
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
