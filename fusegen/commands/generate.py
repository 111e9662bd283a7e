"""``fusegen generate``: pictures, videos or text, by the model's family."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusegen import generators
from fusegen.arguments import add_device, integer, output, set_threads

HELP = "make pictures, videos or text"
DESCRIPTION = """Make pictures, videos or text: what the model makes decides which options apply.

Pictures: picture i has the seed SEED + i, and depends on nothing else: not on how many are made with it. Several
pictures go into one file as a grid, row by row; with %d in the file's name each gets a file of its own, counted from 0.
A PNG carries what it was made with as text.

A gan model needs no prompt, a seed is all there is to say. With --walk it writes a video that goes from seed to seed.

Text is printed as it comes, after the prompt. It depends on the request and the seed alone.

Ctrl-C stops within one step and leaves no file behind."""
EXAMPLES = """  fusegen generate -m emoji -p "pig face" -n 8 -o pig.png
  fusegen generate -m emoji -p "red heart" --sampler euler_a --steps 30 --cfg-scale 3 --seed 7 -n 4 -o heart-%d.png
  fusegen generate -m emoji -p "cat" --json | jq .seconds
  fusegen generate -m emoji-gan --seeds 0-15 --psi 0.7 -o grid.png
  fusegen generate -m emoji-gan --seeds 0-3 --mix 3,7 --mix-seeds 8-12 -o mix.png
  fusegen generate -m emoji-gan --seeds 5 --edit 0:2,3:-1.5 --scale 8 -o edited.png
  fusegen generate -m emoji-gan --walk 60 -o walk.mp4
  fusegen generate -m pycode -p "def read_json(path):" -n 64 --temp 0
  fusegen generate -m pycode -p "def add(a, b):" --suffix "    return total" --stop "def "
"""


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("-m", "--model", required=True,
                   help="a .fg file, or the name of a model in the zoo (emoji, emoji-gan, pycode)")  # fmt: skip
    p.add_argument("-p", "--prompt", help="what to show, or what to go on from; a gan model takes none")
    p.add_argument("-n", dest="number", type=integer(-1, 2**20), metavar="N",
                   help="pictures (default: 1), or tokens to write at most")  # fmt: skip
    p.add_argument("-o", "--output", type=output, metavar="FILE",
                   help="the file to write (default: output.png; text goes to the terminal)")  # fmt: skip
    p.add_argument("--seed", type=integer(-1, 2**62), help="of the first one; -1 draws it (default: 42)")
    p.add_argument("--json", action="store_true", help="print what was made as JSON")
    p.add_argument("--cache", type=Path, metavar="DIR",
                   help="keep what is made of the weights here, as large as they, for the next start")  # fmt: skip
    add_device(p)
    generators.add(p)


def run(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    from fusegen.models.load import family_of

    family = family_of(args.model)
    generators.check(args, family)
    code: int = generators.module(family).run(args)
    return code
