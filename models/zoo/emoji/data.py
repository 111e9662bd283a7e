"""The emoji data set: Noto Color Emoji's bitmaps with their Unicode names as captions.

Source: Debian's package ``fonts-noto-color-emoji`` (SIL Open Font License 1.1).  The font's one bitmap strike is drawn
at 109 pixels an em, on white, padded to a square and reduced with a Lanczos filter.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109
GLYPH = (136, 128)
LENGTH = 16


@dataclass(frozen=True)
class Emoji:
    """``captions``: N lower-case names; ``images``: (N, 3, size, size) float32 in [-1, 1]."""

    captions: list[str]
    images: np.ndarray


def _draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> np.ndarray:
    side = max(GLYPH)
    image = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    corner = ((side - GLYPH[0]) // 2, (side - GLYPH[1]) // 2)
    ImageDraw.Draw(image).text(corner, character, font=font, embedded_color=True)
    small = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0


def load(size: int, font: Path = FONT) -> Emoji:
    """Draw every named single-codepoint picture of ``font`` at ``size`` x ``size`` pixels, in codepoint order."""
    if not font.exists():
        raise SystemExit(f"{font} is missing: install Debian's fonts-noto-color-emoji")
    face = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    captions, images = [], []
    for codepoint in range(0x23, 0x1FB00):
        character = chr(codepoint)
        name = unicodedata.name(character, "")
        if name and not name.startswith("REGIONAL INDICATOR") and face.getmask(character).getbbox() is not None:
            captions.append(name.lower())
            images.append(_draw(character, face, size))
    return Emoji(captions, np.stack(images))


def tokenizer(captions: list[str]) -> Tokenizer:
    """WordPiece over the captions' own words; an unknown word falls apart into single characters.

    Every text becomes ``[cls]`` and at most ``LENGTH - 1`` pieces, padded with ``[pad]`` to ``LENGTH``.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for c in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(c))})
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789") | {c for word in words for c in word})
    pieces = ["[pad]", "[unk]", "[cls]"] + sorted(set(words) | set(letters)) + ["##" + c for c in letters]
    tok = Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[unk]"))
    tok.normalizer, tok.pre_tokenizer = normalizer, splitter
    tok.post_processor = processors.TemplateProcessing(single="[cls] $A", special_tokens=[("[cls]", 2)])
    tok.enable_truncation(LENGTH)
    tok.enable_padding(pad_id=0, pad_token="[pad]", length=LENGTH)
    return tok
