"""``fusegen bench``: hands the rest of the command line to the benchmarks."""

from __future__ import annotations

import argparse

HELP = "time kernels or models beside their peers (`fusegen bench --help`)"
DESCRIPTION = "Time kernels or models beside their peers."
EXAMPLES = "  fusegen bench kernels --op attention\n"


def add(p: argparse.ArgumentParser) -> None:
    """Nothing: the options are those of the benchmarks' own parser, which gets ``args.rest``."""


def run(args: argparse.Namespace) -> int:
    from fusegen.bench import cli

    own = cli.parser().parse_args(args.rest)
    args.verbose = own.verbose
    return cli.run(own)
