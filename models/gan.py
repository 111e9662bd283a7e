"""Generative adversarial networks: a picture of a latent in one pass.

The bundle of this family (``manifest.family == "gan"``) has either the two components of a style-based generator
(Karras et al. 2019, 2020), called by position,

- ``mapping``: z (B, ...) -> w (B, W);
- ``synthesis``: ws (B, L, W), noise_0 (B, 1, r, r), noise_1, ... -> pictures (B, C, H, W) in [-1, 1];

and the file ``latents.safetensors`` (``models/latents.py``), or one, which has no w space:

- ``generator``: z (B, ...) -> pictures.

``manifest.loop`` is ``{"kind": "single", "image": an ImageConfig}``, ``manifest.sampler`` the defaults of a request (a
``GanDefaults``; empty for a plain generator).  z is the noise of a picture's seed at step 0, the noise of layer k that
at step k + 1: a picture depends on its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusegen.models import bundled, gan_bundle, gan_request, latents
from fusegen.models.gan_request import GanDefaults, Request, Space, Style, Walk
from fusegen.models.latents import Latents
from fusegen.models.pixels import pictures
from fusegen.models.request import ImageConfig
from fusegen.runtime import noise
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.compile import AUTO
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.engine import Session
from fusegen.runtime.loop.cancel import Cancel
from fusegen.runtime.loop.single import Pass, parts, single

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS, BATCH = 1 << 17, 32  # at most so many of each are made at once; a request for more is cut

Progress = Callable[[int, int], object]


class Gan:
    """A generator, ready to :meth:`generate` and to :meth:`walk`.

    ``mapping``, which computes in float32, and ``synthesis``, or else ``generator``: the sessions.  ``latents``: the
    statistics of w, None where there is no w.  ``space``: how many layers and directions it has.
    """

    mapping: Session
    synthesis: Session
    generator: Session

    def __init__(
        self,
        sessions: Mapping[str, Session],
        statistics: Latents | None,
        image: ImageConfig,
        defaults: GanDefaults,
        bundle: Bundle | None = None,
    ):
        vars(self).update(sessions)
        self.sessions, self.image, self.defaults, self.bundle = dict(sessions), image, defaults, bundle
        self.first = sessions["generator" if statistics is None else "mapping"]
        self.last = sessions["generator" if statistics is None else "synthesis"]
        self.latents = statistics and statistics.to(self.device)
        self.space = Space()
        if statistics is not None:
            layers = next(iter(self.synthesis.program.inputs.values())).shape[1]
            self.space = Space(int(layers), len(statistics.deviations))
        bounds = [gan_bundle.most(s.program) for s in sessions.values()]
        self.most = max(1, min(BATCH, PIXELS // (image.width * image.height), *bounds))

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        device: str = "cpu",
        dtype: torch.dtype | str | None = None,
        deterministic: bool = False,
        without: Collection[str] = (),
        cache: str | Path | None = None,
    ) -> Gan:
        """Open the model in ``bundle``; ``dtype`` None is :func:`~fusegen.runtime.compile.default_dtype`.

        Raises FileError where the bundle's manifest, programs or latents are not this family's.
        """
        found = gan_bundle.read(bundle)
        chosen = AUTO if dtype is None else dtype
        sessions = {
            name: compile_program(
                p,
                device,
                torch.float32 if name == "mapping" else chosen,
                None,
                deterministic,
                without=without,
                cache=cache,
            )
            for name, p in found.programs.items()
        }
        return cls(sessions, found.latents, found.image, found.defaults, bundle)

    @property
    def device(self) -> str:
        """The device it runs on."""
        return self.last.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """What its synthesis takes and gives."""
        return next(iter(self.last.program.inputs.values())).dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What a caller should know of the choices made."""
        return self.last.notes

    def settings(self, psi: float | None = None, psi_cutoff: int | None = None) -> dict[str, Any]:
        """``psi`` and ``psi_cutoff`` with this model's own where None, checked; empty where there is no w."""
        style = gan_request.style(self.space, self.defaults, psi, psi_cutoff, None)
        return {"psi": style.psi, "psi_cutoff": style.psi_cutoff} if self.space.layers else {}

    def generate(
        self,
        seeds: Iterable[int] = (0,),
        psi: float | None = None,
        psi_cutoff: int | None = None,
        mix: Sequence[int] | None = None,
        mix_seeds: Iterable[int] | None = None,
        edit: Mapping[int, float] | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> list[Image]:
        """One picture a seed, which depends on that seed and the request, not on the others.

        ``psi``: w is drawn towards its mean, to w_mean + psi (w - w_mean), for the first ``psi_cutoff`` layers (None:
        all).  ``mix``: the layers, counted from 0, that take the w of ``mix_seeds`` instead, of one seed or one a
        picture; the noise stays the first seed's.  ``edit``: direction -> how many standard deviations to go along it.
        ``progress(done, total)`` counts pictures; ``cancel`` is an event or a function, asked before every pass.
        Everything is checked before anything is allocated.  Raises :class:`RequestError`,
        :class:`~fusegen.runtime.errors.Cancelled` or :class:`~fusegen.runtime.errors.OutOfMemoryError`.
        """
        keys = gan_request.check_seeds(seeds)
        style = gan_request.style(self.space, self.defaults, psi, psi_cutoff, edit)
        request = Request(keys, style, *gan_request.check_mix(self.space, len(keys), mix, mix_seeds))
        return [image for part in self._run(self._pictures(request), len(keys), progress, cancel) for image in part]

    def walk(
        self,
        seeds: Iterable[int],
        frames: int,
        space: str | None = None,
        psi: float | None = None,
        psi_cutoff: int | None = None,
        edit: Mapping[int, float] | None = None,
        loop: bool = True,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Iterator[Image]:
        """``frames`` pictures on the way from seed to seed, as they are made; with ``loop`` back to the first one.

        ``space``: ``"w"``, in straight lines, or ``"z"``, along arcs; by default w where there is one.  The way stands
        on each seed for one frame.  The noise is the first seed's throughout.  Else as :meth:`generate`; the request is
        checked at once.
        """
        request = gan_request.check_walk(self.space, seeds, frames, space, loop)
        request = replace(request, style=gan_request.style(self.space, self.defaults, psi, psi_cutoff, edit))
        return self._walked(request, progress, cancel)

    def save(self, path: str | Path) -> None:
        """Write the model as a bundle: its programs as they were read, its files and manifest."""
        bundled.save(self.bundle, path)

    def _walked(self, request: Walk, progress: Progress | None, cancel: Cancel | None) -> Iterator[Image]:
        for part in self._run(self._frames(request), request.frames, progress, cancel):
            yield from part

    def _run(
        self, chain: Sequence[Pass], count: int, progress: Progress | None, cancel: Cancel | None
    ) -> Iterator[list[Image]]:
        where = str(self.bundle.path) if self.bundle else ""
        return (pictures(x, where) for x in single(chain, count, self.most, progress, cancel))

    def _pictures(self, request: Request) -> Sequence[Pass]:
        """The passes of a request: a part of it -> the last network's inputs -> its output."""

        def inputs(part: range) -> list[Tensor]:
            seeds = request.seeds[part.start : part.stop]
            if self.latents is None:
                return [self._z(seeds)]
            ws = self._styles(self._mapped(self._z(seeds)), request.style)
            if request.layers:
                others = self._z(request.mix_seeds[part.start : part.stop])
                layers = list(request.layers)
                ws[:, layers] = self._styles(self._mapped(others), request.style)[:, layers]
            return [ws, *self._noise(seeds)]

        return inputs, self._draw

    def _frames(self, request: Walk) -> Sequence[Pass]:
        """The passes of a walk."""
        way = latents.path(len(request.seeds), request.frames, request.loop)
        keys = self._z(request.seeds)
        keys = self._mapped(keys) if request.space == "w" else keys
        still = [] if self.latents is None else self._noise(request.seeds[:1])

        def inputs(part: range) -> list[Tensor]:
            some = way[part.start : part.stop]
            if request.space == "w":
                w = latents.lerp(keys, some)
            else:
                z = latents.slerp(keys, some)
                if self.latents is None:
                    return [z]
                w = self._mapped(z)
            return [self._styles(w, request.style), *(n.expand(len(some), *n.shape[1:]) for n in still)]

        return inputs, self._draw

    def _z(self, seeds: Sequence[int]) -> Tensor:
        """z of ``seeds``, (B, ...) float32."""
        shape = [int(n) for n in next(iter(self.first.program.inputs.values())).shape[1:]]
        return noise.initial(noise.seed_tensor(seeds, self.device), shape)

    def _noise(self, seeds: Sequence[int]) -> list[Tensor]:
        """The noise of every layer, each (B, 1, r, r) float32."""
        keys = noise.seed_tensor(seeds, self.device)
        shapes = [spec.shape[1:] for spec in list(self.synthesis.program.inputs.values())[1:]]
        return [noise.at(keys, [int(n) for n in shape], k + 1) for k, shape in enumerate(shapes)]

    def _mapped(self, z: Tensor) -> Tensor:
        """w (B, W) float32 of z, as many at once as the network takes."""
        some = parts(len(z), gan_bundle.most(self.mapping.program))
        return torch.cat([self.mapping(z[part.start : part.stop]) for part in some]).float()

    def _styles(self, w: Tensor, style: Style) -> Tensor:
        """w (B, W) for each layer, (B, L, W): truncated, then edited."""
        assert self.latents is not None
        ws = self.latents.styles(w, self.space.layers, style.psi, style.psi_cutoff)
        return ws + self.latents.shift(style.edit) if style.edit else ws

    def _draw(self, inputs: Sequence[Tensor]) -> Tensor:
        """The network's output for inputs of any float."""
        specs = self.last.program.inputs.values()
        out: Tensor = self.last(*(x.to(s.dtype) for x, s in zip(inputs, specs, strict=True)))
        return out
