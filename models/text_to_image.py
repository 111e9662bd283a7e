"""Text to image: a text encoder, a denoiser that attends to its features, and a sampler's loop.

The bundle of this family (``manifest.family == "text-to-image"``) has two components, called by position:

- ``text_encoder``: tokens (B, length) int64 -> context (B, length, width);
- ``denoiser``: x (B, C, H, W), t (B,), context -> a prediction of x's shape (``schedule.prediction`` says of what);

and the files ``tokenizer.json`` and ``card.md``.  ``manifest.loop`` holds ``schedule`` (a ``ScheduleConfig``) and
``image`` (an ``ImageConfig``), ``manifest.sampler`` the defaults of a request (a ``Defaults``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusegen.models import bundled
from fusegen.models.pixels import pictures
from fusegen.models.request import (
    MOST_IMAGES,
    MOST_SIDE,
    Defaults,
    ImageConfig,
    Request,
    check_text,
    config,
    integer,
    mapping,
)
from fusegen.runtime import noise
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.compile import AUTO
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.engine import Session
from fusegen.runtime.errors import FileError, RequestError
from fusegen.runtime.loop.cancel import Cancel
from fusegen.runtime.loop.denoise import Watch, denoise
from fusegen.runtime.sampler import coefficients
from fusegen.runtime.schedule import SIGMAS, ScheduleConfig, one_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

FAMILY = "text-to-image"
BATCH = 32  # the most pictures denoised at once; a request for more is cut

Progress = Callable[[int, int], object]
Preview = Callable[[int, "list[Image]"], object]


@dataclass(frozen=True)
class Follow:
    """The caller's wishes, as the loop's :class:`Watch` of a part of the request."""

    progress: Progress | None
    preview: Preview | None
    cancel: Cancel | None
    where: str

    def part(self, before: int, total: int) -> Watch:
        """The watch of a loop that starts after ``before`` of ``total`` evaluations."""
        progress, preview = self.progress, self.preview
        return Watch(
            progress and (lambda done, _: progress(before + done, total)),
            preview and (lambda done, denoised: preview(before + done, pictures(denoised, self.where))),
            self.cancel,
        )


class TextToImage:
    """A text-to-image model, ready to :meth:`generate`.

    ``bundle``: where it came from.  ``dtype``: what the denoiser computes in; the text encoder runs once a request, in
    float32.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: Session,
        denoiser: Session,
        schedule: ScheduleConfig,
        image: ImageConfig,
        defaults: Defaults,
        bundle: Bundle | None = None,
    ):
        self.tokenizer, self.text_encoder, self.denoiser = tokenizer, text_encoder, denoiser
        self.schedule, self.image, self.defaults, self.bundle = schedule, image, defaults, bundle
        if len(denoiser.program.inputs) != 3:
            names = ", ".join(denoiser.program.inputs)
            raise FileError("a denoiser takes x, t and context", self._where(), f"this one takes {names}")

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        device: str = "cpu",
        dtype: torch.dtype | str | None = None,
        deterministic: bool = False,
        without: Collection[str] = (),
        cache: str | Path | None = None,
    ) -> TextToImage:
        """Open the model in ``bundle``; ``dtype`` None is :func:`~fusegen.runtime.compile.default_dtype`.

        Raises FileError where the bundle's manifest or tokenizer is not this family's.
        """
        manifest, where = bundle.manifest, str(bundle.path)
        try:
            schedule = ScheduleConfig.of(mapping(manifest.loop, "schedule"))
            image = config(ImageConfig, mapping(manifest.loop, "image"))
            defaults = config(Defaults, manifest.sampler)
        except RequestError as error:
            raise FileError(f"the manifest is not one of a {FAMILY} model: {error}", where) from None
        for name in ("text_encoder", "denoiser"):
            if name not in manifest.components:
                raise FileError(f"the bundle has no component {name!r}", where, f"a {FAMILY} model needs it")
        chosen = AUTO if dtype is None else dtype
        return cls(
            bundled.tokenizer(bundle),
            compile_program(
                bundle.program("text_encoder"), device, torch.float32, None, deterministic, without=without, cache=cache
            ),
            compile_program(
                bundle.program("denoiser"), device, chosen, None, deterministic, without=without, cache=cache
            ),
            schedule,
            image,
            defaults,
            bundle,
        )

    @property
    def device(self) -> str:
        """The device it runs on."""
        return self.denoiser.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser takes and gives."""
        return next(iter(self.denoiser.program.inputs.values())).dtype

    def settings(
        self, sampler: str | None = None, steps: int | None = None, guidance: float | None = None
    ) -> dict[str, Any]:
        """``sampler``, ``steps`` and ``guidance`` with this model's own where None, checked."""
        given: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance": guidance}
        return asdict(replace(self.defaults, **{k: v for k, v in given.items() if v is not None}))

    def generate(
        self,
        prompt: str,
        negative: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seeds: Sequence[int] = (0,),
        width: int | None = None,
        height: int | None = None,
        schedule: str | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        preview: Preview | None = None,
    ) -> list[Image]:
        """One picture a seed, of ``prompt`` and away from ``negative`` (classifier-free guidance, Ho & Salimans 2022).

        A picture depends on its own seed and the request, not on the others.  ``guidance`` 1 is none, and runs the
        network once instead of twice a step.  ``schedule``: ``"karras"`` or ``"exponential"`` sigmas.
        ``progress(done, total)`` counts evaluations; ``preview(done, images)`` shows the pictures as they stand;
        ``cancel`` is an event or a function, asked before every evaluation.  Everything is checked before anything is
        allocated.  Raises :class:`RequestError`, :class:`~fusegen.runtime.errors.Cancelled` or
        :class:`~fusegen.runtime.errors.OutOfMemoryError`.
        """
        chosen = self.settings(sampler, steps, guidance)
        request = self._request(prompt, negative, chosen, seeds, width, height, schedule)
        return self._make(request, Follow(progress, preview, cancel, self._where()))

    def _request(
        self,
        prompt: str,
        negative: str,
        settings: Mapping[str, Any],
        seeds: Sequence[int],
        width: int | None,
        height: int | None,
        schedule: str | None,
    ) -> Request:
        """The request, checked; raises :class:`RequestError`."""
        texts = (check_text("negative prompt", negative), check_text("prompt", prompt))
        keys = noise.check_seeds(seeds)
        integer("number of seeds", len(keys), 1, MOST_IMAGES)
        rows, columns = (
            getattr(self.image, name) if value is None else self.image.check(name, integer(name, value, 1, MOST_SIDE))
            for name, value in (("height", height), ("width", width))
        )
        if schedule is not None:
            one_of("schedule", schedule, SIGMAS)
        levels = self.schedule if schedule is None else replace(self.schedule, sigmas=schedule)
        plan = coefficients(settings["sampler"], levels, settings["steps"])
        guidance = None if settings["guidance"] == 1 else settings["guidance"]
        shape = (self.image.channels, rows, columns)
        return Request(texts if guidance is not None else texts[1:], plan, keys, shape, guidance)

    def latents(self, prompt: str, seeds: Sequence[int], sampler: str, steps: int, guidance: float) -> Tensor:
        """What :meth:`generate` makes pictures of, (B, C, H, W) float32, of the model's own size."""
        chosen = self.settings(sampler, steps, guidance)
        request = self._request(prompt, "", chosen, seeds, None, None, None)
        return torch.cat(list(self._samples(request, Follow(None, None, None, self._where()))))

    def _make(self, request: Request, follow: Follow) -> list[Image]:
        """The pictures of a checked request."""
        return [p for x in self._samples(request, follow) for p in pictures(x, self._where())]

    def _samples(self, request: Request, follow: Follow) -> Iterator[Tensor]:
        """The samples of a checked request, at most ``BATCH`` at once."""
        context = self._encode(request.texts)
        _, t, features = self.denoiser.program.inputs
        per_step = {t: torch.from_numpy(request.plan.times).float()}
        chunks = [request.seeds[i : i + BATCH] for i in range(0, len(request.seeds), BATCH)]
        count = len(request.plan)
        for number, seeds in enumerate(chunks):
            fixed = {features: context.repeat_interleave(len(seeds), dim=0)}
            yield denoise(
                self.denoiser.trajectory(fixed=fixed, per_step=per_step),
                request.plan,
                seeds,
                request.shape,
                guidance=request.guidance,
                device=self.device,
                dtype=self.dtype,
                watch=follow.part(number * count, len(chunks) * count),
            )

    def save(self, path: str | Path) -> None:
        """Write the model as a bundle: its programs as they were read, its files and manifest."""
        bundled.save(self.bundle, path)

    def _where(self) -> str:
        return str(self.bundle.path) if self.bundle else ""

    def _encode(self, texts: Sequence[str]) -> Tensor:
        tokens = torch.tensor([e.ids for e in self.tokenizer.encode_batch(list(texts))], dtype=torch.int64)
        context: Tensor = self.text_encoder(tokens)
        return context.to(list(self.denoiser.program.inputs.values())[2].dtype)
