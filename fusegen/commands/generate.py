"""``fusegen generate``: pictures from a prompt."""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusegen import pictures
from fusegen.arguments import add_device, finite, integer, output, set_threads

HELP = "make pictures from a prompt"
DESCRIPTION = """Make pictures from a prompt.

Picture i has the seed SEED + i, and depends on nothing else: not on how many are made with it. Several pictures go
into one file as a grid, row by row; with %d in the file's name each gets a file of its own, counted from 0. A PNG
carries what it was made with as text. Ctrl-C stops within one step and leaves no file behind."""
EXAMPLES = """  fusegen generate -m emoji -p "pig face" -n 8 -o pig.png
  fusegen generate -m emoji -p "red heart" --sampler euler_a --steps 30 --cfg-scale 3 --seed 7 -n 4 -o heart-%d.png
  fusegen generate -m emoji -p "cat" --json | jq .seconds
"""


def picture_file(text: str) -> Path:
    """An argument type: a picture to write, of a format that can be written."""
    path = output(text)
    if path.suffix.lower() not in pictures.FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(pictures.FORMATS)}")
    return path


def sampler_name(text: str) -> str:
    """An argument type: the name of a sampler."""
    from fusegen.runtime.errors import RequestError
    from fusegen.runtime.sampler import find

    try:
        return find(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(f"{error.what}; {error.mend}") from None


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("-m", "--model", required=True, help="a .fg file, or the name of a model in the zoo (emoji)")
    p.add_argument("-p", "--prompt", required=True, help="what to show")
    p.add_argument("--negative", "--negative-prompt", default="", metavar="TEXT", help="what not to show")
    p.add_argument("-n", "--count", type=integer(1, 1024), default=1, metavar="N", help="pictures (default: 1)")
    p.add_argument("-o", "--output", type=picture_file, default=Path("output.png"), metavar="FILE",
                   help="the file to write (default: output.png)")  # fmt: skip
    p.add_argument("--sampler", "--sampling-method", type=sampler_name, metavar="NAME", help="default: the model's own")
    p.add_argument("--steps", type=integer(1, 1000), metavar="N", help="sampler steps (default: the model's own)")
    p.add_argument("--scheduler", choices=("karras", "exponential"), help="spacing of noise levels (default: even)")
    p.add_argument("--cfg-scale", type=finite, metavar="X", help="guidance: 1 is none (default: the model's own)")
    p.add_argument("--seed", type=integer(-1, 2**62), default=42, help="of the first one; -1 draws it (default: 42)")
    p.add_argument("-W", "--width", type=integer(1, 2**16), metavar="PIXELS", help="default: the model's own")
    p.add_argument("-H", "--height", type=integer(1, 2**16), metavar="PIXELS", help="default: the model's own")
    p.add_argument("--deterministic", action="store_true",
                   help="bind only kernels whose result does not depend on the batch")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print what was made as JSON")
    add_device(p)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    first = secrets.randbits(32) if args.seed < 0 else args.seed
    seeds = list(range(first, first + args.count))
    set_threads(args.threads)
    with _progress() as bar:
        import fusegen
        from fusegen.models.text_to_image import default_dtype

        model = fusegen.load(args.model, device=args.device, dtype=args.dtype, deterministic=args.deterministic)
        loaded = time.perf_counter()
        with _cancellable() as cancel:
            images = model.generate(
                args.prompt, negative=args.negative, steps=args.steps, guidance=args.cfg_scale, sampler=args.sampler,
                schedule=args.scheduler, seeds=seeds, width=args.width, height=args.height, progress=bar, cancel=cancel,
            )  # fmt: skip
        done = time.perf_counter()
    facts: dict[str, Any] = {
        "model": args.model, "prompt": args.prompt, "negative": args.negative, "seeds": seeds,
        "width": images[0].width, "height": images[0].height, "scheduler": args.scheduler,
        **model.settings(args.sampler, args.steps, args.cfg_scale),
        "device": model.device, "dtype": args.dtype or str(default_dtype(model.device)).removeprefix("torch."),
        "notes": model.denoiser.notes,
    }  # fmt: skip
    files = pictures.destinations(args.output, len(images))
    if len(files) == 1:
        pictures.save(pictures.grid(images), files[0], facts)
    else:
        for file, image, seed in zip(files, images, seeds, strict=True):
            pictures.save(image, file, {**facts, "seeds": [seed]})
    facts |= {"files": [str(f) for f in files], "seconds_load": loaded - start, "seconds": done - loaded}
    facts["plan"] = {"text_encoder": model.text_encoder.plan.counts(), "denoiser": model.denoiser.plan.counts()}
    for note in facts["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(facts) if args.json else _line(facts))
    return 0


def _line(facts: dict[str, Any]) -> str:
    count, seeds, size = len(facts["seeds"]), facts["seeds"], f"{facts['width']} x {facts['height']}"
    which = f"seed {seeds[0]}" if count == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return (
        f"{' '.join(facts['files'])}: {count} picture{'s' * (count > 1)} of {size}, {which}, "
        f"{facts['sampler']}, {facts['steps']} steps, guidance {facts['guidance']:g}, {facts['seconds']:.2f} s "
        f"on {facts['device']} in {facts['dtype']} (+ {facts['seconds_load']:.2f} s to start)"
    )


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on stderr; yields the function ``(step, steps)`` that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda step, steps: bar.update(task, description="denoising", completed=step, total=steps)


@contextmanager
def _cancellable() -> Iterator[Any]:
    """Turn the first Ctrl-C into a request that the loop reads after each step; a second one interrupts at once."""
    asked = threading.Event()

    def ask(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
