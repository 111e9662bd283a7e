"""Pictures from a prompt."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from fusegen.arguments import finite, first_seed, integer
from fusegen.cancelling import cancellable
from fusegen.generators import picture

TITLE = "options of text-to-image models (emoji)"


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
    p.add_argument("--sampler", "--sampling-method", type=sampler_name, metavar="NAME", help="default: the model's own")
    p.add_argument("--steps", type=integer(1, 1000), metavar="N", help="sampler steps (default: the model's own)")
    p.add_argument("--scheduler", choices=("karras", "exponential"), help="spacing of noise levels (default: even)")
    p.add_argument("--cfg-scale", type=finite, metavar="X", help="guidance: 1 is none (default: the model's own)")
    p.add_argument("-W", "--width", type=integer(1, 2**16), metavar="PIXELS", help="default: the model's own")
    p.add_argument("-H", "--height", type=integer(1, 2**16), metavar="PIXELS", help="default: the model's own")


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    count, output, first = picture.count(args), picture.destination(args), first_seed(args.seed)
    seeds = list(range(first, first + count))
    with picture.progress("denoising") as bar:
        import fusegen

        options = {"device": args.device, "dtype": args.dtype, "deterministic": bool(args.deterministic)}
        options["cache"] = args.cache
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
        "device": model.device, "dtype": str(model.dtype).removeprefix("torch."),
        "notes": model.denoiser.notes,
    }  # fmt: skip
    files = picture.save(images, seeds, output, facts)
    facts |= {"files": files, "seconds_load": loaded - start, "seconds": done - loaded}
    facts["plan"] = {"text_encoder": model.text_encoder.plan.counts(), "denoiser": model.denoiser.plan.counts()}
    picture.tell(facts["notes"])
    print(json.dumps(facts) if args.json else _line(facts))
    return 0


def _line(facts: dict[str, Any]) -> str:
    count, seeds, size = len(facts["seeds"]), facts["seeds"], f"{facts['width']} x {facts['height']}"
    return (
        f"{' '.join(facts['files'])}: {count} picture{'s' * (count > 1)} of {size}, {picture.called(seeds)}, "
        f"{facts['sampler']}, {facts['steps']} steps, guidance {facts['guidance']:g}, {facts['seconds']:.2f} s "
        f"on {facts['device']} in {facts['dtype']} (+ {facts['seconds_load']:.2f} s to start)"
    )
