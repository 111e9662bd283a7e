"""Pictures of seeds from a generator, mixed, edited, or as a walk from one to the next."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusegen import pictures, video
from fusegen.arguments import finite, first_seed, integer, numbers
from fusegen.cancelling import cancellable
from fusegen.generators import picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from fusegen.models.gan import Gan

TITLE = "options of gan models (emoji-gan)"
SEVERAL = 4  # seeds of a walk or a matrix, where nobody says
LAYERS, FRAMES = 63, 10_000


def edits(text: str) -> dict[int, float]:
    """An argument type: ``DIRECTION:AMOUNT``, several with commas between."""
    out: dict[int, float] = {}
    for part in text.split(","):
        direction, colon, amount = part.partition(":")
        if not colon:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form DIRECTION:AMOUNT")
        which = integer(0, 2**20)(direction)
        if which in out:
            raise argparse.ArgumentTypeError(f"direction {which} is given twice")
        out[which] = finite(amount)
    return out


def add(p: Any) -> None:
    seeds, layers = numbers(0, 2**64 - 1, picture.MOST), numbers(0, LAYERS, LAYERS + 1)
    p.add_argument("--seeds", type=seeds, metavar="LIST",
                   help="these seeds, as in 0-15 or 0,3,8-11, instead of -n from --seed on")  # fmt: skip
    p.add_argument("--psi", type=finite, metavar="X",
                   help="truncation: 1 is none, 0 the mean picture (default: the model's own)")  # fmt: skip
    p.add_argument("--psi-cutoff", type=integer(0, LAYERS), metavar="N",
                   help="truncate the first N layers (default: all)")  # fmt: skip
    p.add_argument("--mix", type=layers, metavar="LAYERS",
                   help="style mixing, a matrix: the first column shows the seeds, the first row the mixing seeds, and "
                        "each other picture is its row's seed with these layers (as in 3,7 or 4-7) of its "
                        "column's")  # fmt: skip
    p.add_argument("--mix-seeds", type=seeds, metavar="LIST", help="the mixing seeds (default: the same seeds)")
    p.add_argument("--edit", type=edits, metavar="D:X,...",
                   help="go X standard deviations along direction D, as in 0:2,3:-1.5")  # fmt: skip
    p.add_argument("--walk", type=integer(2, FRAMES), metavar="FRAMES",
                   help=f"a video that passes through the seeds ({SEVERAL} by default) and returns to the first, to "
                        f"{', '.join(video.FORMATS)} (default: output.mp4)")  # fmt: skip
    p.add_argument("--no-loop", action="store_true", default=None, help="end the walk on the last seed")
    p.add_argument("--space", choices=("w", "z"), help="where to walk (default: w where the model has it)")
    p.add_argument("--fps", type=integer(1, video.MOST_RATE), metavar="N", help="frames a second (default: 30)")
    p.add_argument("--scale", type=integer(1, 64), metavar="N",
                   help="pixels become squares of N (default: 1; of a video at least 256 pixels)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    seeds, output = checked(args)
    with picture.progress("drawing") as bar:
        import fusegen

        options = {"device": args.device, "dtype": args.dtype, "deterministic": bool(args.deterministic)}
        options["cache"] = args.cache
        model: Gan = fusegen.load(args.model, **options)
        loaded = time.perf_counter()
        facts = _facts(args, model, seeds)
        with cancellable() as cancel:
            make = _walk if args.walk else _pictures
            given = {"psi": args.psi, "psi_cutoff": args.psi_cutoff, "edit": args.edit, "progress": bar}
            files = make(args, model, output, facts, {**given, "cancel": cancel})
    facts |= {"files": files, "seconds_load": loaded - start, "seconds": time.perf_counter() - loaded}
    facts["plan"] = {name: session.plan.counts() for name, session in model.sessions.items()}
    picture.tell(facts["notes"])
    print(json.dumps(facts) if args.json else _line(facts))
    return 0


def checked(args: argparse.Namespace) -> tuple[list[int], Path]:
    """The seeds and the file; RequestError for what does not go together."""
    from fusegen.runtime.errors import RequestError

    def refuse(what: str, mend: str) -> None:
        raise RequestError(what, mend=mend)

    if args.seeds is not None and (args.seed, args.number, args.count) != (None, None, None):
        refuse("--seeds was given beside --seed or -n", "say either")
    for name in ("no_loop", "space", "fps"):
        if args.walk is None and getattr(args, name) is not None:
            refuse(f"--{name.replace('_', '-')} is for a --walk", "leave it out, or say --walk 60")
    if args.mix_seeds is not None and args.mix is None:
        refuse("--mix-seeds was given without --mix", "say of which layers, as in --mix 3,7")
    if args.walk is not None and args.mix is not None:
        refuse("--walk and --mix do not go together", "leave one out")
    seeds = args.seeds
    if seeds is None:
        first = first_seed(args.seed)
        usual = 1 if args.walk is None and args.mix is None else SEVERAL
        seeds = range(first, first + picture.count(args, usual))
    if args.mix is not None:
        rows, columns = len(seeds), len(args.mix_seeds or seeds)
        if (rows + 1) * (columns + 1) > picture.MOST + 1:
            refuse(f"a matrix of {rows} by {columns} seeds is too large", f"up to {picture.MOST} pictures are made")
        if args.output and pictures.NUMBER.search(args.output.name):
            refuse(f"'{args.output}' has a number in it, and a matrix is one file", "leave it out")
    return list(seeds), _destination(args)


def _destination(args: argparse.Namespace) -> Path:
    """The file; RequestError where it is of another kind."""
    if args.walk is None:
        return picture.destination(args)
    file: Path = args.output or Path("output.mp4")
    video.check(file, args.fps or video.RATE)
    return file


def _facts(args: argparse.Namespace, model: Gan, seeds: list[int]) -> dict[str, Any]:
    """What was asked, with the model's own choices filled in."""
    scale = args.scale or 1
    if args.walk is not None:
        scale = video.enlargement(model.image.width, model.image.height, args.scale)
    facts: dict[str, Any] = {"model": args.model, "seeds": seeds, **model.settings(args.psi, args.psi_cutoff)}
    if args.mix is not None:
        facts |= {"mix": list(args.mix), "mix_seeds": list(args.mix_seeds or seeds)}
    if args.walk is not None:
        space = args.space or ("w" if model.space.layers else "z")
        facts |= {"walk": args.walk, "space": space, "loop": not args.no_loop, "fps": args.fps or video.RATE}
    dtype = str(model.dtype).removeprefix("torch.")
    facts |= {"edit": args.edit or {}, "width": model.image.width, "height": model.image.height, "scale": scale}
    return facts | {"device": model.device, "dtype": dtype, "notes": model.notes}


def _pictures(args: Any, model: Gan, output: Path, facts: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Make and write pictures, or a matrix; returns the files' names."""
    seeds = facts["seeds"]
    if args.mix is None:
        images = [pictures.enlarged(i, facts["scale"]) for i in model.generate(seeds, **given)]
        return picture.save(images, seeds, output, facts)
    sheet = matrix(model, seeds, facts["mix_seeds"], args.mix, **given)
    pictures.save(pictures.enlarged(sheet, facts["scale"]), output, facts)
    return [str(output)]


def matrix(model: Gan, down: Sequence[int], across: Sequence[int], layers: Sequence[int], **given: Any) -> Image:
    """Style mixing (Karras et al. 2019, figure 3): the pictures of ``down`` in the first column, those of ``across`` in
    the first row, and where they meet the former with the ``layers`` of the latter; ``given`` goes to ``generate``."""
    from PIL import Image as pil

    pairs = [(s, s) for s in [*across, *down]] + [(row, column) for row in down for column in across]
    made = model.generate([a for a, _ in pairs], mix=layers, mix_seeds=[b for _, b in pairs], **given)
    columns, rows, mixed = made[: len(across)], made[len(across) :][: len(down)], made[len(across) + len(down) :]
    sheet = [pil.new(made[0].mode, made[0].size, "white"), *columns]
    for i, source in enumerate(rows):
        sheet += [source, *mixed[i * len(across) : (i + 1) * len(across)]]
    return pictures.grid(sheet, columns=1 + len(across))


def _walk(args: Any, model: Gan, output: Path, facts: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Make and write a video; returns the file's name."""
    frames = model.walk(facts["seeds"], args.walk, facts["space"], loop=facts["loop"], **given)
    video.save(frames, output, facts["fps"], facts["scale"], facts)
    return [str(output)]


def _line(facts: dict[str, Any]) -> str:
    seeds, size = facts["seeds"], f"{facts['width'] * facts['scale']} x {facts['height'] * facts['scale']}"
    count, what = len(seeds), "picture"
    if "walk" in facts:
        count, what = facts["walk"], "frame"
    elif "mix" in facts:
        count *= len(facts["mix_seeds"])
    psi = f"psi {facts['psi']:g}, " if "psi" in facts else ""
    return (
        f"{' '.join(facts['files'])}: {count} {what}{'s' * (count > 1)} of {size}, {picture.called(seeds)}, "
        f"{psi}{facts['seconds']:.2f} s on {facts['device']} in {facts['dtype']} "
        f"(+ {facts['seconds_load']:.2f} s to start)"
    )
