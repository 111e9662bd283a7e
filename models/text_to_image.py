"""Text to image: a text encoder, a denoiser that attends to its features, and a sampler's loop.

The bundle of this family (``manifest.family == "text-to-image"``) has two components, called by position:

- ``text_encoder``: tokens (B, length) int64 -> context (B, length, width);
- ``denoiser``: x (B, C, H, W), t (B,), context -> a prediction of x's shape (``schedule.prediction`` says of what);

and the files ``tokenizer.json`` and ``card.md``.  ``manifest.loop`` holds ``schedule`` (a ``ScheduleConfig``) and
``image`` (an :class:`ImageConfig`), ``manifest.sampler`` the defaults of a request (a :class:`Defaults`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fusegen.runtime import noise
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.compile import native
from fusegen.runtime.engine import Session
from fusegen.runtime.errors import Error, FileError, OutOfMemoryError, RequestError
from fusegen.runtime.loop.denoise import Cancel, Progress, denoise
from fusegen.runtime.sampler import coefficients, find
from fusegen.runtime.schedule import SIGMAS, ScheduleConfig, one_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

FAMILY = "text-to-image"
MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE, MOST_TEXT, MOST_SIDE = 1024, 1000, 1000.0, 10_000, 16_384
BATCH = 32  # the most pictures denoised at once; a request for more is cut

Config = TypeVar("Config", "ImageConfig", "Defaults")


@dataclass(frozen=True)
class ImageConfig:
    """The pictures a model makes: default ``width`` and ``height`` in pixels, and what other sizes it takes."""

    width: int
    height: int
    least: int
    most: int
    multiple: int = 1
    channels: int = 3

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if type(value) is not int or not 1 <= value <= MOST_SIDE:
                raise RequestError(f"{key} is not an integer from 1 to {MOST_SIDE}", "image", f"it is {value!r}")
        if self.channels not in (1, 3):
            raise RequestError(f"{self.channels} channels are no picture", "image", "use 1 or 3")
        self.check("width", self.width)
        self.check("height", self.height)

    def check(self, name: str, value: int) -> int:
        """``value`` as a side of a picture; RequestError says which there are."""
        if not self.least <= value <= self.most or value % self.multiple:
            which = str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
            every = f", a multiple of {self.multiple}" if self.multiple > 1 and self.least < self.most else ""
            raise RequestError(f"{name} {value} is not one this model makes", name, f"ask for {which}{every}")
        return value


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets."""

    sampler: str = "dpmpp_2m"
    steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", find(self.sampler))
        object.__setattr__(self, "steps", integer("steps", self.steps, 1, MOST_STEPS))
        object.__setattr__(self, "guidance", check_guidance(self.guidance))


def integer(name: str, value: Any, least: int, most: int) -> int:
    """``value`` as an int within bounds, or RequestError."""
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if not least <= found <= most:
        raise RequestError(f"{name} is not an integer from {least} to {most}", name, f"it is {value!r:.80}")
    return found


def check_guidance(value: Any) -> float:
    """``value`` as a finite number of moderate size, or RequestError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or abs(value) > MOST_GUIDANCE:
        raise RequestError(f"guidance is not a number up to {MOST_GUIDANCE:g}", "guidance", f"it is {value!r:.80}")
    return float(value)


def check_text(name: str, value: Any) -> str:
    """``value`` as a text of moderate length, or RequestError."""
    if not isinstance(value, str):
        raise RequestError(f"the {name} is a {type(value).__name__}", name, "give one string")
    if len(value) > MOST_TEXT:
        raise RequestError(f"the {name} has {len(value)} characters", name, f"give at most {MOST_TEXT}")
    return value


def default_dtype(device: str) -> torch.dtype:
    """What a network computes in unless told: bfloat16 where the device has such arithmetic, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if native("bfloat16") else torch.float32


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
    ) -> TextToImage:
        """Open the model in ``bundle``; ``dtype`` None is :func:`default_dtype`.

        Raises FileError where the bundle's manifest or tokenizer is not this family's.
        """
        manifest, where = bundle.manifest, str(bundle.path)
        try:
            schedule = ScheduleConfig.of(_mapping(manifest.loop, "schedule"))
            image = _config(ImageConfig, _mapping(manifest.loop, "image"))
            defaults = _config(Defaults, manifest.sampler)
        except RequestError as error:
            raise FileError(f"the manifest is not one of a {FAMILY} model: {error}", where) from None
        for name in ("text_encoder", "denoiser"):
            if name not in manifest.components:
                raise FileError(f"the bundle has no component {name!r}", where, f"a {FAMILY} model needs it")
        chosen = default_dtype(device) if dtype is None else dtype
        return cls(
            _tokenizer(bundle),
            compile_program(bundle.program("text_encoder"), device, torch.float32, deterministic=deterministic),
            compile_program(bundle.program("denoiser"), device, chosen, deterministic=deterministic),
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
        given = {"sampler": sampler, "steps": steps, "guidance": guidance}
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
        preview: Callable[[int, list[Image]], object] | None = None,
    ) -> list[Image]:
        """One picture a seed, of ``prompt`` and away from ``negative`` (classifier-free guidance, Ho & Salimans 2022).

        A picture depends on its own seed and the request, not on the others.  ``guidance`` 1 is none, and runs the
        network once instead of twice a step.  ``schedule``: ``"karras"`` or ``"exponential"`` sigmas.
        ``progress(done, total)`` counts evaluations; ``preview(done, images)`` shows the pictures as they stand;
        ``cancel`` is an event or a function, asked before every evaluation.  Everything is checked before anything is
        allocated; raises :class:`RequestError`, :class:`~fusegen.runtime.errors.Cancelled` or OutOfMemoryError.
        """
        texts = [check_text("negative prompt", negative), check_text("prompt", prompt)]
        chosen = self.settings(sampler, steps, guidance)
        keys = noise.check_seeds(seeds)
        integer("number of seeds", len(keys), 1, MOST_IMAGES)
        side = [
            getattr(self.image, name) if value is None else self.image.check(name, integer(name, value, 1, MOST_SIDE))
            for name, value in (("height", height), ("width", width))
        ]
        config = self.schedule
        if schedule is not None:
            one_of("schedule", schedule, SIGMAS)
            config = replace(config, sigmas=schedule)
        plan = coefficients(chosen["sampler"], config, chosen["steps"])
        scale = None if chosen["guidance"] == 1 else chosen["guidance"]
        context = self._encode(texts if scale is not None else texts[1:])
        times = torch.from_numpy(plan.times).float()
        chunks = [keys[i : i + BATCH] for i in range(0, len(keys), BATCH)]
        out: list[Image] = []
        for number, chunk in enumerate(chunks):
            fixed = {self._names[2]: context.repeat_interleave(len(chunk), dim=0)}
            model = self.denoiser.trajectory(fixed=fixed, per_step={self._names[1]: times})
            before, total = number * len(plan), len(chunks) * len(plan)
            x = denoise(
                model,
                plan,
                chunk,
                (self.image.channels, *side),
                guidance=scale,
                device=self.device,
                dtype=self.dtype,
                progress=progress and (lambda done, _, b=before: progress(b + done, total)),
                preview=preview and (lambda done, d, b=before: preview(b + done, pictures(d, self._where()))),
                cancel=cancel,
            )
            out += pictures(x, self._where())
        return out

    def save(self, path: str | Path) -> None:
        """Write the model as a bundle: its programs as they were read, its files and manifest."""
        if self.bundle is None:
            raise RequestError("this model was not loaded from a bundle", "save", "save the bundle it was made from")
        source = self.bundle
        own = {name: source.file(name) for name in source.manifest.members if not name.startswith("components/")}
        kinds = {c.storage_dtype for c in source.manifest.components.values()}
        programs = {name: source.program(name) for name in source.manifest.components}
        Bundle.write(path, source.manifest, programs, own, kinds.pop() if len(kinds) == 1 else "")

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.denoiser.program.inputs)

    def _where(self) -> str:
        return str(self.bundle.path) if self.bundle else ""

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = torch.tensor([e.ids for e in self.tokenizer.encode_batch(texts)], dtype=torch.int64)
        context: Tensor = self.text_encoder(tokens)
        return context.to(list(self.denoiser.program.inputs.values())[2].dtype)


def pictures(x: Tensor, where: str = "") -> list[Image]:
    """Samples (B, C, H, W) in [-1, 1] as pictures: clamped, and rounded to the nearest of 256 values."""
    from PIL import Image as pil

    if not bool(torch.isfinite(x).all()):
        raise Error("the model gave values that are not finite", where, "load it with dtype='float32'")
    pixels = x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [pil.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def _mapping(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = holder.get(key)
    if not isinstance(value, Mapping):
        raise RequestError(f"there is no {key!r}", "loop", "it must be an object")
    return value


def _config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise RequestError(f"{kind.__name__} has no {key!r}", mend=f"it has {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise RequestError(f"{kind.__name__} is incomplete: {error}") from None


def _tokenizer(bundle: Bundle) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(bundle.file("tokenizer.json").decode())
    except Error:
        raise
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise FileError(f"tokenizer.json cannot be read: {error}", str(bundle.path), "get the file again") from None
