"""What the families that make pictures ask and do alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusegen import pictures
from fusegen.arguments import integer

if TYPE_CHECKING:
    from PIL.Image import Image

TITLE = "options of models that make pictures (emoji, emoji-gan)"
FAMILIES = ("text-to-image", "gan")
MOST = 1024  # pictures


def add(p: Any) -> None:
    p.add_argument("--count", type=integer(1, MOST), metavar="N", help="the same as -n: pictures (default: 1)")
    p.add_argument("--deterministic", action="store_true", default=None,
                   help="bind only kernels whose result does not depend on the batch")  # fmt: skip


def count(args: argparse.Namespace, usual: int = 1) -> int:
    """How many pictures, ``usual`` where nobody says; RequestError where they are not to be had."""
    from fusegen.runtime.errors import RequestError

    found: int = args.count if args.count is not None else usual if args.number is None else args.number
    if not 1 <= found <= MOST:
        raise RequestError(f"-n {found} is out of range", mend=f"a request makes 1 to {MOST} pictures")
    return found


def destination(args: argparse.Namespace) -> Path:
    """The file that pictures go to; RequestError where it is not a picture's."""
    from fusegen.runtime.errors import RequestError

    file: Path = args.output or Path("output.png")
    if file.suffix.lower() not in pictures.FORMATS:
        raise RequestError(f"'{file}' does not end in one of {', '.join(pictures.FORMATS)}", "-o")
    return file


def save(images: Sequence[Image], seeds: Sequence[int], output: Path, facts: Mapping[str, Any]) -> list[str]:
    """Write pictures, one a seed, to a grid or to files of their own; returns the files' names."""
    files = pictures.destinations(output, len(images))
    if len(files) == 1:
        pictures.save(pictures.grid(images), files[0], facts)
    else:
        for file, image, seed in zip(files, images, seeds, strict=True):
            pictures.save(image, file, {**facts, "seeds": [seed]})
    return [str(f) for f in files]


def called(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds[:8]))}{', ...' * (len(seeds) > 8)}"


def tell(notes: Sequence[str]) -> None:
    """Print a model's notes on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@contextmanager
def progress(doing: str) -> Iterator[Any]:
    """A bar on stderr; yields the function ``(step, steps)`` that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda step, steps: bar.update(task, description=doing, completed=step, total=steps)
