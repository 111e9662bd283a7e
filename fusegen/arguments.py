"""The command line's parser and argument types: each error is one line and says what would be right."""

from __future__ import annotations

import argparse
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number from ``low`` to ``high``, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is out of range, which is {low} to {high}")
        return value

    return parse


def numbers(low: int, high: int, most: int) -> Callable[[str], tuple[int, ...]]:
    """An argument type: whole numbers and ranges of them, ``0,3,8-11``, from ``low`` to ``high``; at most ``most``."""
    one = integer(low, high)

    def parse(text: str) -> tuple[int, ...]:
        out: list[int] = []
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            begin = one(first)
            end = one(last) if dash else begin
            if end < begin:
                raise argparse.ArgumentTypeError(f"the range {part.strip()} runs backwards")
            if len(out) + end - begin >= most:
                raise argparse.ArgumentTypeError(f"{text!r:.40} is more than {most} numbers")
            out += range(begin, end + 1)
        return tuple(out)

    return parse


def first_seed(seed: int | None) -> int:
    """The seed that was asked for: 42 where none was, drawn where it is -1."""
    if seed is None:
        return 42
    return secrets.randbits(32) if seed < 0 else seed


def finite(text: str) -> float:
    """An argument type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def output(text: str) -> Path:
    """An argument type: a file to write, in a folder that exists."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options that say where and in which precision a model runs."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="what networks compute in (default: the device's best)")
    parser.add_argument("-t", "--threads", type=integer(1, 1024), metavar="N", help="CPU threads (default: all cores)")


def set_threads(threads: int | None) -> None:
    """Give PyTorch, and the kernels that share its pool, ``threads`` threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
