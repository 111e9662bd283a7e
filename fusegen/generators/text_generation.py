"""Text that goes on from a prompt, or fills in the middle between it and a suffix."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from fusegen.arguments import finite, first_seed, integer
from fusegen.cancelling import cancellable

TITLE = "options of text-generation models (pycode), each by default the model's own"
# option -> the setting's name
SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty"),
    "repeat_last_n",
)


def add(p: Any) -> None:
    p.add_argument("--predict", "--n-predict", "--max-tokens", dest="max_tokens", type=integer(-1, 2**20), metavar="N",
                   help="the same as -n: tokens to write at most; -1: as many as fit")  # fmt: skip
    p.add_argument("--suffix", metavar="TEXT", help="fill in what stands between the prompt and this")
    p.add_argument("--temp", "--temperature", dest="temperature", type=finite, metavar="X", help="0 is greedy")
    p.add_argument("--top-k", type=integer(0, 2**20), metavar="N", help="draw from the N likeliest; 0 is off")
    p.add_argument("--top-p", type=finite, metavar="X", help="draw from those that make up X of the mass; 1 is off")
    p.add_argument("--min-p", type=finite, metavar="X", help="leave out what is below X of the likeliest; 0 is off")
    p.add_argument("--repeat-penalty", type=finite, metavar="X", help="of tokens seen before; 1 is off")
    p.add_argument("--frequency-penalty", type=finite, metavar="X", help="for each time a token was seen; 0 is off")
    p.add_argument("--presence-penalty", type=finite, metavar="X", help="of tokens seen before; 0 is off")
    p.add_argument("--repeat-last-n", type=integer(-1, 2**20), metavar="N", help="how far back those look; -1 is all")
    p.add_argument("-r", "--reverse-prompt", "--stop", dest="stop", action="append", metavar="TEXT",
                   help="end before this text; may be given several times")  # fmt: skip
    p.add_argument("--no-display-prompt", action="store_true", default=None, help="print only what was written")


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    seed = first_seed(args.seed)
    import fusegen

    model = fusegen.load(args.model, device=args.device, dtype=args.dtype, cache=args.cache)
    loaded = time.perf_counter()
    settings = {name: getattr(args, name) for name in SETTINGS} | {"max_tokens": _most(args, model)}
    out, first = _Out(args), None
    with cancellable() as cancel:
        pieces = model.stream(args.prompt, args.suffix, seed, args.stop or (), cancel, **settings)
        out.write("" if args.no_display_prompt else args.prompt)
        for piece in pieces:
            first = time.perf_counter() if first is None else first
            out.write(piece, new=True)
        out.write("" if args.no_display_prompt else args.suffix or "")
    done = time.perf_counter()
    facts: dict[str, Any] = {
        "model": args.model, "prompt": args.prompt, "suffix": args.suffix, "seed": seed, **model.settings(**settings),
        "stop": args.stop or [], "text": out.new, "device": model.device,
        "dtype": str(model.dtype).removeprefix("torch."), "notes": model.decoder.notes,
        "seconds_load": loaded - start, "seconds_first": (first or done) - loaded, "seconds": done - loaded,
    }  # fmt: skip
    out.close(facts)
    for note in facts["notes"]:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _most(args: argparse.Namespace, model: Any) -> int | None:
    """The most tokens, by whichever option; -1 is as many as fit."""
    most = args.number if args.max_tokens is None else args.max_tokens
    return model.text.context if most == -1 else most


class _Out:
    """Where the text goes: to the terminal as it comes, into a file at the end, or into the JSON."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.text, self.new = args, "", ""

    def write(self, piece: str, new: bool = False) -> None:
        """Take a piece; ``new`` where the model wrote it."""
        self.text += piece
        self.new += piece if new else ""
        if not self.args.json and self.args.output is None:
            print(piece, end="", flush=True)

    def close(self, facts: dict[str, Any]) -> None:
        """Write what is to be written at the end."""
        if self.args.output is not None:
            from fusegen.runtime import write

            with write.atomic(self.args.output) as file:
                file.write(self.text.encode())
            facts["files"] = [str(self.args.output)]
        if self.args.json:
            print(json.dumps(facts))
        elif self.args.output is not None:
            print(f"{self.args.output}: {len(self.text)} characters, seed {facts['seed']}, {facts['seconds']:.2f} s")
        elif not self.text.endswith("\n"):
            print()
