"""The command ``fusegen``: its parser, and what becomes of errors.

Exit codes: 0 done; 1 a fault in fusegen itself; 2 a request that cannot be served, in one line on stderr; 130
cancelled with Ctrl-C.  ``-v`` adds the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import fusegen
from fusegen.arguments import Parser

COMMANDS = ("generate", "export", "quantize", "plan", "info", "bench", "doctor")


def parser() -> Parser:
    """The parser of the whole command line; imports every command's file, none of which imports PyTorch."""
    top = Parser("fusegen", description="Run exported generative models with fused kernels.")
    top.add_argument("--version", action="version", version=f"fusegen {fusegen.__version__}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name in COMMANDS:
        command = importlib.import_module(f"fusegen.commands.{name}")
        one = sub.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog="examples:\n" + command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(one)
        one.add_argument("-v", "--verbose", action="store_true", help="on an error, show the traceback")
        one.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words[:1] if words[:1] == ["bench"] else words)
    args.rest = words[1:]
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fusegen: cancelled", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `fusegen plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        return _failed(error, getattr(args, "verbose", False))


def _failed(error: Exception, verbose: bool) -> int:
    """Say what went wrong; the exit code."""
    from fusegen.kernels.cpu.library import LevelError
    from fusegen.runtime.errors import Cancelled, Error

    if verbose:
        traceback.print_exception(error)
    if isinstance(error, Cancelled):
        print("fusegen: cancelled", file=sys.stderr)
        return 130
    if isinstance(error, (Error, LevelError, OSError)):
        print("fusegen: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    hint = "" if verbose else " (-v shows where; please report it)"
    print(f"fusegen: fault: {type(error).__name__}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    return 1
