"""What a bundle of the gan family holds, checked when it is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusegen.models.gan_request import MOST_LAYERS, GanDefaults
from fusegen.models.latents import MEMBER, Latents
from fusegen.models.request import ImageConfig, config, mapping
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.errors import FileError, RequestError
from fusegen.runtime.program import Program, TensorSpec

FAMILY = "gan"
STYLED, PLAIN = {"mapping", "synthesis"}, {"generator"}
FREE = 2**31  # what a free batch without a bound may be
MOST_ELEMENTS = 1 << 24  # of one sample of an input: noise of 4096 x 4096


@dataclass(frozen=True)
class Found:
    """The programs by name, and what the manifest and ``latents.safetensors`` say."""

    programs: dict[str, Program]
    image: ImageConfig
    defaults: GanDefaults
    latents: Latents | None


def read(bundle: Bundle) -> Found:
    """What is in ``bundle``; FileError where it is not this family's."""
    manifest, where = bundle.manifest, str(bundle.path)
    names = set(manifest.components)
    if names not in (STYLED, PLAIN):
        mend = f"a {FAMILY} model has mapping and synthesis, or generator"
        raise FileError(f"the bundle has the components {', '.join(manifest.components) or 'none'}", where, mend)
    try:
        if manifest.loop.keys() != {"kind", "image"} or manifest.loop["kind"] != "single":
            raise RequestError("loop is not a kind 'single' and an image", mend=f"it is {dict(manifest.loop)!r:.80}")
        image = config(ImageConfig, mapping(manifest.loop, "image"))
        defaults = config(GanDefaults, manifest.sampler)
        if names == PLAIN and manifest.sampler:
            raise RequestError("a generator without a w space has no sampler", mend=f"leave out {manifest.sampler}")
    except RequestError as error:
        raise FileError(f"the manifest is not one of a {FAMILY} model: {error}", where) from None
    programs = {name: bundle.program(name) for name in sorted(names)}
    _check_pictures(programs["generator" if names == PLAIN else "synthesis"], image, where)
    if names == PLAIN:
        _check_latent("generator", programs["generator"], where)
        return Found(programs, image, defaults, None)
    layers, width = _check_styles(programs["synthesis"], where)
    _check_mapping(programs["mapping"], width, where)
    if defaults.psi_cutoff is not None and defaults.psi_cutoff > layers:
        raise FileError(f"psi_cutoff is {defaults.psi_cutoff}", where, f"the generator has {layers} layers")
    if MEMBER not in manifest.members:
        raise FileError(f"the bundle has no {MEMBER}", where, "a model with a mapping needs the statistics of its w")
    return Found(programs, image, defaults, Latents.read(bundle.file(MEMBER), width, f"{where}: {MEMBER}"))


def most(program: Program) -> int:
    """The largest batch that a program takes."""
    batch = next(iter(program.inputs.values())).shape[0]
    return batch if isinstance(batch, int) else program.symbols.get(batch, (1, FREE))[1]


def _check_latent(name: str, program: Program, where: str) -> None:
    """That a program takes one z (B, ...)."""
    _check_batch(name, program, where)
    if len(program.inputs) != 1 or not _fixed(next(iter(program.inputs.values())), least=2):
        raise FileError(f"the {name} takes {_says(program)}", where, "it must take one latent, z (B, ...)")


def _check_mapping(program: Program, width: int, where: str) -> None:
    """That it makes w of the width that the synthesis takes."""
    _check_latent("mapping", program, where)
    spec = program.specs.get(program.outputs[0])
    if len(program.outputs) != 1 or (spec is not None and spec.shape[1:] != (width,)):
        given = "several outputs" if spec is None or len(program.outputs) != 1 else f"w {spec.shape}"
        raise FileError(f"the mapping gives {given}", where, f"the synthesis takes w (B, {width})")


def _check_styles(program: Program, where: str) -> tuple[int, int]:
    """(layers, width) of the styles that a synthesis takes."""
    _check_batch("synthesis", program, where)
    styles, *noises = program.inputs.values()
    good = len(styles.shape) == 3 and _fixed(styles, least=3)
    if not good or any(len(n.shape) != 4 or n.shape[1] != 1 or not _fixed(n, least=4) for n in noises):
        wanted = "it must take ws (B, L, W) and noise (B, 1, r, r)"
        raise FileError(f"the synthesis takes {_says(program)}", where, wanted)
    layers, width = (int(n) for n in styles.shape[1:])
    if layers > MOST_LAYERS:
        raise FileError(f"the synthesis has {layers} layers", where, f"at most {MOST_LAYERS} are read")
    return layers, width


def _check_pictures(program: Program, image: ImageConfig, where: str) -> None:
    """That it gives pictures of the size that the manifest states."""
    wanted = (image.channels, image.height, image.width)
    spec = program.specs.get(program.outputs[0]) if len(program.outputs) == 1 else None
    if spec is None or spec.shape[1:] != wanted:
        given = f"{len(program.outputs)} outputs" if spec is None else f"{spec.shape}"
        raise FileError(f"{program.name} gives {given}", where, f"the manifest states pictures (B, {wanted})")


def _check_batch(name: str, program: Program, where: str) -> None:
    """That all inputs have one batch, free from 1 on or 1."""
    sizes = {spec.shape[0] if spec.shape else None for spec in program.inputs.values()}
    batch = sizes.pop() if len(sizes) == 1 else None
    if batch != 1 and program.symbols.get(str(batch), (2, 2))[0] > 1:
        raise FileError(f"the {name} takes {_says(program)}", where, "its batch must be free, from 1 on")


def _fixed(spec: TensorSpec, least: int) -> bool:
    """Whether all sizes but the batch are known, and not more than any generator has."""
    sizes = [n for n in spec.shape[1:] if isinstance(n, int) and n > 0]
    return len(spec.shape) >= least and len(sizes) == len(spec.shape) - 1 and math.prod(sizes) <= MOST_ELEMENTS


def _says(program: Program) -> str:
    return ", ".join(f"{k} ({', '.join(map(str, v.shape))})" for k, v in program.inputs.items())[:160] or "nothing"
