"""What ``fusegen generate`` asks and does for each family, one file each: a TITLE, its options, and its run."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# manifest.family -> the file of this folder
FAMILIES = {"text-to-image": "text_to_image", "text-generation": "text_generation"}


def module(family: str) -> Any:
    """The file of a family; none imports PyTorch."""
    return importlib.import_module(f"fusegen.generators.{FAMILIES[family]}")


def add(parser: argparse.ArgumentParser) -> None:
    """Every family's options, None where they are not given."""
    options: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        group = parser.add_argument_group(module(family).TITLE)
        module(family).add(group)
        options[family] = {a.dest: a.option_strings[-1] for a in group._group_actions}
    parser.set_defaults(options_of=options)


def refuse_others(args: argparse.Namespace, family: str) -> None:
    """Raise RequestError for an option that is another family's."""
    from fusegen.runtime.errors import RequestError

    for other, options in args.options_of.items():
        for dest, option in options.items():
            if other != family and getattr(args, dest) is not None:
                what = f"{option} is for {other} models, and {args.model} is a {family} model"
                raise RequestError(what, mend="see fusegen generate --help")
