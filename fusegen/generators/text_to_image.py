"""Pictures from a prompt."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusegen import pictures
from fusegen.arguments import finite, integer
from fusegen.cancelling import cancellable

TITLE = "options of text-to-image models (emoji)"
MOST = 1024  # pictures


def sampler_name(text: str) -> str:
    """An argument type: the name of a sampler."""
    from fusegen.runtime.errors import RequestError
    from fusegen.runtime.sampler import find

    try:
        return find(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(f"{error.what}; {error.mend}") from None


def add(p: Any) -> None:
    p.add_argument("--negative", "--negative-prompt", metavar="TEXT", help="what not to show")
    p.add_argument("--count", type=integer(1, MOST), metavar="N", help="the same as -n: pictures (default: 1)")
    p.add_argument("--sampler", "--sampling-method", type=sampler_name, metavar="NAME", help="default: the model's own")
    p.add_argument("--steps", type=integer(1, 1000), metavar="N", help="sampler steps (default: the model's own)")
    p.add_argument("--scheduler", choices=("karras", "exponential"), help="spacing of noise levels (default: even)")
    p.add_argument("--cfg-scale", type=finite, metavar="X", help="guidance: 1 is none (default: the model's own)")
    p.add_argument("-W", "--width", type=integer(1, 2**16), metavar="PIXELS", help="default: the model's own")
    p.add_argument("-H", "--height", type=integer(1, 2**16), metavar="PIXELS", help="default: the model's own")
    p.add_argument("--deterministic", action="store_true", default=None,
                   help="bind only kernels whose result does not depend on the batch")  # fmt: skip


def checked(args: argparse.Namespace) -> tuple[int, Path]:
    """How many pictures, and the file; RequestError where they are not to be had."""
    from fusegen.runtime.errors import RequestError

    count = args.count if args.count is not None else 1 if args.number is None else args.number
    if not 1 <= count <= MOST:
        raise RequestError(f"-n {count} is out of range", mend=f"a text-to-image model makes 1 to {MOST} pictures")
    file: Path = args.output or Path("output.png")
    if file.suffix.lower() not in pictures.FORMATS:
        raise RequestError(f"'{file}' does not end in one of {', '.join(pictures.FORMATS)}", "-o")
    return count, file


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    count, output = checked(args)
    first = secrets.randbits(32) if args.seed < 0 else args.seed
    seeds = list(range(first, first + count))
    with _progress() as bar:
        import fusegen
        from fusegen.runtime.compile import default_dtype

        options = {"device": args.device, "dtype": args.dtype, "deterministic": bool(args.deterministic)}
        model = fusegen.load(args.model, **options)
        loaded = time.perf_counter()
        with cancellable() as cancel:
            images = model.generate(
                args.prompt, negative=args.negative or "", steps=args.steps, guidance=args.cfg_scale,
                sampler=args.sampler, schedule=args.scheduler, seeds=seeds, width=args.width, height=args.height,
                progress=bar, cancel=cancel,
            )  # fmt: skip
        done = time.perf_counter()
    facts: dict[str, Any] = {
        "model": args.model, "prompt": args.prompt, "negative": args.negative or "", "seeds": seeds,
        "width": images[0].width, "height": images[0].height, "scheduler": args.scheduler,
        **model.settings(args.sampler, args.steps, args.cfg_scale),
        "device": model.device, "dtype": args.dtype or str(default_dtype(model.device)).removeprefix("torch."),
        "notes": model.denoiser.notes,
    }  # fmt: skip
    files = pictures.destinations(output, len(images))
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
