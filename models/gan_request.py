"""What may be asked of a generative adversarial network, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusegen.models.request import MOST_IMAGES, integer, number
from fusegen.runtime import noise
from fusegen.runtime.errors import RequestError

MOST_PSI, MOST_AMOUNT, MOST_FRAMES, MOST_LAYERS = 100.0, 1000.0, 10_000, 64
SPACES = ("w", "z")


@dataclass(frozen=True)
class GanDefaults:
    """What a request that does not say gets: ``psi`` of truncation (1 is none), and of how many layers, the first ones
    (``psi_cutoff``, None: all)."""

    psi: float = 1.0
    psi_cutoff: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "psi", number("psi", self.psi, -MOST_PSI, MOST_PSI))
        if self.psi_cutoff is not None:
            object.__setattr__(self, "psi_cutoff", integer("psi_cutoff", self.psi_cutoff, 0, MOST_LAYERS))


@dataclass(frozen=True)
class Space:
    """What a generator has of a w space: ``layers`` that each take a w (0: it has none), and ``directions`` in it."""

    layers: int = 0
    directions: int = 0

    def need(self, **given: Any) -> None:
        """Raise RequestError for the first of ``given`` that was asked for, None where it was not, without a space."""
        for name, value in given.items():
            if value is not None and not self.layers:
                raise RequestError("this model has no w space", name, f"leave {name} out")


@dataclass(frozen=True)
class Style:
    """How w becomes the styles of the layers: truncation, and what is added, direction -> standard deviations."""

    psi: float = 1.0
    psi_cutoff: int = 0
    edit: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """Pictures to be made: one a seed; ``layers`` take the w of ``mix_seeds``, one a seed where there are any."""

    seeds: tuple[int, ...]
    style: Style
    layers: tuple[int, ...] = ()
    mix_seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Walk:
    """Frames to be made, between pictures of ``seeds``."""

    seeds: tuple[int, ...]
    style: Style
    frames: int
    space: str
    loop: bool


def check_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """At least one seed and at most ``MOST_IMAGES``, or RequestError."""
    keys = noise.check_seeds(seeds)
    integer("number of seeds", len(keys), 1, MOST_IMAGES)
    return keys


def style(space: Space, defaults: GanDefaults, psi: Any, psi_cutoff: Any, edit: Any) -> Style:
    """A request's style, the defaults where None; RequestError."""
    space.need(psi=psi, psi_cutoff=psi_cutoff, edit=edit)
    chosen = defaults.psi if psi is None else number("psi", psi, -MOST_PSI, MOST_PSI)
    cutoff = defaults.psi_cutoff if psi_cutoff is None else integer("psi_cutoff", psi_cutoff, 0, space.layers)
    return Style(chosen, space.layers if cutoff is None else cutoff, check_edit(space, {} if edit is None else edit))


def check_edit(space: Space, edit: Any) -> dict[int, float]:
    """``edit`` as direction -> amount, or RequestError."""
    if not isinstance(edit, Mapping):
        raise RequestError(f"edit is a {type(edit).__name__}", "edit", "give {direction: amount}")
    if edit and not space.directions:
        raise RequestError("this model has no directions", "edit", "leave edit out")
    out = {}
    for direction, amount in edit.items():
        which = integer("direction", direction, 0, space.directions - 1)
        out[which] = number(f"the amount of direction {which}", amount, -MOST_AMOUNT, MOST_AMOUNT)
    return dict(sorted(out.items()))  # sums do not depend on the order it was given in


def check_mix(space: Space, count: int, mix: Any, mix_seeds: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers to mix and a second seed for each of ``count`` pictures, none where both are None; RequestError."""
    space.need(mix=mix, mix_seeds=mix_seeds)
    if (mix is None) != (mix_seeds is None):
        name, other = ("mix", "mix_seeds") if mix_seeds is None else ("mix_seeds", "mix")
        raise RequestError(f"{name} was given without {other}", name, "give both, layers and the seeds they are of")
    if mix is None:
        return (), ()
    if isinstance(mix, (str, bytes)) or not isinstance(mix, Sequence) or not mix:
        raise RequestError("mix is not a list of layers", "mix", f"it is {mix!r:.80}")
    layers = sorted({integer("a layer of mix", layer, 0, space.layers - 1) for layer in mix})
    others = check_seeds(mix_seeds)
    if len(others) not in (1, count):
        raise RequestError(f"{len(others)} mix_seeds for {count} seeds", "mix_seeds", "give one, or one a seed")
    return tuple(layers), others * (count if len(others) == 1 else 1)


def check_walk(space: Space, seeds: Iterable[int], frames: Any, where: Any, loop: Any) -> Walk:
    """A walk in the space ``where`` (None: w where there is one), its style yet to be put in; RequestError."""
    keys = check_seeds(seeds)
    if len(keys) < 2:
        raise RequestError("a walk goes from seed to seed", "seeds", "give at least 2")
    chosen = ("w" if space.layers else "z") if where is None else where
    if not isinstance(chosen, str) or chosen not in SPACES:
        raise RequestError(f"there is no space {chosen!r:.80}", "space", f"there are {', '.join(SPACES)}")
    if chosen == "w":
        space.need(space=chosen)
    if not isinstance(loop, bool):
        raise RequestError("loop is not True or False", "loop", f"it is {loop!r:.80}")
    return Walk(keys, Style(), integer("frames", frames, len(keys), MOST_FRAMES), chosen, loop)
