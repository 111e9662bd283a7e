"""Quantizing a bundle, and what that costs: the proof goes into the manifest, or nothing is written.

Of a text-to-image model the denoiser is quantized, which does the work, and whole trajectories are compared; of a
bundle without a family, every component.  Text models and gans are not served yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.models.text_to_image import FAMILY, TextToImage
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.engine import Session
from fusegen.runtime.errors import RequestError
from fusegen.runtime.manifest import Manifest
from fusegen.runtime.program import Program
from fusegen.runtime.quantize import RULE, known, layers, quality, quantize, quantized
from fusegen.runtime.specialize import concrete

PROMPTS = ("pig face", "a red heart", "a house by the sea")
SEEDS = (1, 2)


@dataclass(frozen=True)
class Options:
    """What a caller may say.

    ``keep``: layers, weights or modules that stay.  ``most``: so do layers whose own relative error on seeded inputs
    is larger.  ``least``: the cosine below which nothing is written.  ``steps`` of the trajectories compared.
    ``storage``: what the other float32 weights are stored in ("" as they are, None as in the source).  ``sizes``: those
    that a bare program leaves open, for its trial.
    """

    bits: str = "int8"
    keep: Collection[str] = ()
    most: float | None = None
    least: float = quality.LEAST
    steps: int = quality.STEPS
    storage: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


def quantize_bundle(
    bundle: Bundle, path: Path, options: Options = Options(), progress: quality.Progress | None = None
) -> Manifest:
    """Write ``bundle`` quantized to ``path`` and return its manifest, with ``quantization`` and ``quality``.

    Raises :class:`RequestError` for a family that is not served or options that do not fit, and
    :class:`~fusegen.runtime.errors.QualityError` where the loss is above what was allowed: then nothing is written.
    """
    manifest, where = bundle.manifest, str(bundle.path)
    if manifest.family not in ("", FAMILY):
        raise RequestError(
            f"int8 is not served for {manifest.family} models", where, f"it is for {FAMILY} models and bare programs"
        )
    programs = {name: bundle.program(name) for name in manifest.components}
    files = {name: bundle.file(name) for name in manifest.members if not name.startswith("components/")}
    trial = pictures(bundle, options.steps) if manifest.family else None
    chosen = {"denoiser": programs["denoiser"]} if manifest.family else programs
    made, more = _quantized(chosen, options, trial, where, progress)
    stored = next((c.storage_dtype for c in manifest.components.values()), "")
    storage = stored if options.storage is None else options.storage
    return Bundle.write(path, replace(manifest, **more), {**programs, **made}, files, storage)


def quantize_program(
    program: Program, path: Path, options: Options = Options(), progress: quality.Progress | None = None
) -> Manifest:
    """Write a bundle of ``program``, quantized, as :func:`quantize_bundle` does."""
    made, more = _quantized({"graph": program}, options, None, program.name, progress)
    return Bundle.write(path, Manifest(path.stem, **more), made, {}, options.storage or "")


def _quantized(
    programs: Mapping[str, Program], options: Options, trial: quality.Trial | None, where: str,
    progress: quality.Progress | None,
) -> tuple[dict[str, Program], dict[str, Any]]:  # fmt: skip
    """The programs in int8, and what the manifest says of it; ``trial`` None: one for a bare program."""
    for name in options.keep:
        if not any(known(p, name) for p in programs.values()):
            raise RequestError(f"no layer or weight is called {name!r}", where, "fusegen plan shows the names")
    made, facts, proof = dict[str, Program](), {}, {}
    for name, program in programs.items():
        specs, keep = concrete(program, options.sizes), [k for k in options.keep if known(program, k)]
        if options.most is not None:
            errors = layers.errors(program, quality.drawn(specs), options.bits, keep)
            keep += [layer for layer, error in errors.items() if error > options.most]
        made[name] = quantize(program, options.bits, keep)
        facts[name] = _facts(program, made[name])
        chosen = trial or quality.trial_of(specs, options.steps)
        proof[name] = quality.measured(program, made[name], chosen, progress)
        quality.require(proof[name], options.least, f"{where}, {name}")
    quantization = {"bits": options.bits, "components": facts}
    return made, {"quantization": quantization, "quality": {"least_cosine": options.least, "components": proof}}


def _facts(program: Program, made: Program) -> dict[str, Any]:
    """What was quantized, why how many stayed, and the weights' bytes in float32 and now, as plain data."""
    (done,) = [a for a in made.applied if a.rule == RULE]
    size = sum(4 * w.numel() if w.dtype.is_floating_point else w.nbytes for w in program.weights.values())
    kept = Counter(why.partition(": ")[2] for why in done.left)
    return {**quantized(made), "kept": dict(kept), "float32_bytes": size,
            "weight_bytes": sum(w.nbytes for w in made.weights.values())}  # fmt: skip


def pictures(bundle: Bundle, steps: int) -> quality.Trial:
    """A trial of a text-to-image model's denoiser: the latents of :data:`PROMPTS` with the seeds :data:`SEEDS`."""
    whole = TextToImage.from_bundle(bundle, dtype=torch.float32)
    guidance = whole.defaults.guidance

    def run(session: Session, progress: quality.Progress | None) -> Mapping[str, Tensor]:
        model, found = copy(whole), []
        model.denoiser = session
        for done, prompt in enumerate(PROMPTS, 1):
            found.append(model.latents(prompt, SEEDS, quality.SAMPLER, steps, guidance))
            if progress:
                progress(done, len(PROMPTS))
        return {"latent": torch.cat(found)}

    stated = {"prompts": list(PROMPTS), "seeds": list(SEEDS), "sampler": quality.SAMPLER, "steps": steps}
    return quality.Trial(run, {**stated, "guidance": guidance})
