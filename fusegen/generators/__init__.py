"""What ``fusegen generate`` asks and does for each family, one file each: a TITLE, its options, and its run."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# manifest.family -> the file of this folder
FAMILIES = {"text-to-image": "text_to_image", "text-generation": "text_generation", "gan": "gan"}
PROMPTED = ("text-to-image", "text-generation")  # those that cannot do without a prompt


def module(family: str) -> Any:
    """The file of a family; none imports PyTorch."""
    return importlib.import_module(f"fusegen.generators.{FAMILIES[family]}")


def add(parser: argparse.ArgumentParser) -> None:
    """Every family's options, None where they are not given; those that several families take stand by themselves."""
    from fusegen.generators import picture

    takes: dict[str, tuple[str, tuple[str, ...]]] = {"prompt": ("--prompt", PROMPTED)}
    for file, families in [(picture, picture.FAMILIES), *((module(family), (family,)) for family in FAMILIES)]:
        group = parser.add_argument_group(file.TITLE)
        file.add(group)
        takes |= {a.dest: (a.option_strings[-1], families) for a in group._group_actions}
    parser.set_defaults(options_of=takes)


def check(args: argparse.Namespace, family: str) -> None:
    """Raise RequestError for an option that is another family's, and for a prompt that is missing."""
    from fusegen.runtime.errors import RequestError

    kind = f"{args.model} is a {family} model"
    for dest, (option, families) in args.options_of.items():
        if family not in families and getattr(args, dest) is not None:
            what = f"{option} is for {' and '.join(families)} models, and {kind}"
            raise RequestError(what, mend="see fusegen generate --help")
    if family in PROMPTED and args.prompt is None:
        raise RequestError(f"{kind}, which needs a prompt", "-p/--prompt", 'give one, as in -p "pig face"')
