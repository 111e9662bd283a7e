"""Pictures to files: a grid of several, numbered files, written whole or not at all."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusegen.runtime import write

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
NUMBER = re.compile(r"%0?\d*d")


def destinations(pattern: Path, count: int) -> list[Path]:
    """The files that ``count`` pictures go to: one (a grid if several), or ``count`` if the name has ``%d`` in it."""
    if not NUMBER.search(pattern.name):
        return [pattern]
    before, number, after = re.split(f"({NUMBER.pattern})", pattern.name, maxsplit=1)
    return [pattern.with_name(f"{before}{number % i}{after}") for i in range(count)]


def grid(images: Sequence[Image], columns: int | None = None) -> Image:
    """One picture of all, row by row: four a row up to 16, then a square; a single one is returned as it is."""
    from PIL import Image as pil

    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    columns = columns or (min(4, len(images)) if len(images) <= 16 else math.isqrt(len(images) - 1) + 1)
    rows = -(-len(images) // columns)
    sheet = pil.new(images[0].mode, (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def enlarged(image: Image, times: int) -> Image:
    """Each pixel as a square of ``times`` by ``times``."""
    from PIL import Image as pil

    return image.resize((image.width * times, image.height * times), pil.Resampling.NEAREST) if times > 1 else image


def even(image: Image) -> Image:
    """The picture with even sides: an odd one is made longer by its last row or column."""
    from PIL import Image as pil

    width, height = image.width + image.width % 2, image.height + image.height % 2
    if (width, height) == image.size:
        return image
    out = pil.new(image.mode, (width, height))
    for at in ((width - image.width, height - image.height), (0, height - image.height), (width - image.width, 0)):
        out.paste(image, at)
    out.paste(image, (0, 0))
    return out


def save(image: Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``image`` in the format of the suffix, whole or not at all; a PNG carries ``facts`` as JSON text."""
    from PIL.PngImagePlugin import PngInfo

    kind = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind != "PNG" else {}
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("fusegen", json.dumps(facts))
    with write.atomic(path) as file:
        image.save(file, kind, **options)
