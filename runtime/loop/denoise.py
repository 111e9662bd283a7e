"""The denoising loop: from noise to a sample, with any model that can be called and any sampler's coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusegen.kernels import sampler_step as kernel
from fusegen.runtime import noise
from fusegen.runtime.errors import Cancelled, RequestError
from fusegen.runtime.loop.cancel import Cancel, asked
from fusegen.runtime.sampler import Coefficients

Model = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Watch:
    """How a caller follows a loop, each part None where not wanted.

    ``progress(done, total)`` and ``preview(done, denoised)``, denoised (B, *shape) float32, are called after every
    evaluation; ``cancel``, an event or a function, is asked before each.
    """

    progress: Callable[[int, int], object] | None = None
    preview: Callable[[int, Tensor], object] | None = None
    cancel: Cancel | None = None

    def before(self, done: int, total: int) -> None:
        """Raise :class:`Cancelled` if the caller has asked to stop."""
        if asked(self.cancel):
            raise Cancelled("the generation was cancelled", f"after {done} of {total} evaluations")

    def after(self, done: int, total: int, denoised: Tensor) -> None:
        """Tell the caller of an evaluation."""
        if self.preview is not None:
            self.preview(done, denoised)
        if self.progress is not None:
            self.progress(done, total)


@dataclass(frozen=True)
class Inpaint:
    """A part of the sample that is given (Lugmayr et al. 2022, equation 8).

    ``known``: clean samples in the loop's own scale, (B, *shape) or what broadcasts to it; ``mask``, broadcast
    likewise, is 1 where the model paints, 0 where ``known`` stays, or between.  After every evaluation the known part
    is put back at the new level's noise, which is the loop's first: a deterministic sampler with a perfect model would
    be there too.
    """

    known: Tensor
    mask: Tensor

    def expanded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mask, known) as ``sampler_step`` takes them with the state ``x``; RequestError where they do not fit."""
        made = []
        for name in ("mask", "known"):
            tensor: Tensor = getattr(self, name)
            try:
                made.append(tensor.to(x).expand(x.shape).contiguous())
            except RuntimeError:
                shapes = f"it is {tuple(tensor.shape)}, the samples are {tuple(x.shape)}"
                raise RequestError(f"the inpainting {name} does not fit", name, shapes) from None
        return made[0], made[1]


@torch.inference_mode()
def denoise(
    model: Model,
    plan: Coefficients,
    seeds: Sequence[int],
    shape: Sequence[int],
    guidance: float | Sequence[float] | None = None,
    rescale: float = 0.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    watch: Watch = Watch(),
    threshold: float = 0.0,
    inpaint: Inpaint | None = None,
) -> Tensor:
    """Run ``plan`` and return the samples, (B, *shape) float32, one per seed.

    ``model(i, x)`` is evaluation i (from 0, at time ``plan.times[i]``) of x in ``dtype``.  Without ``guidance`` x and
    its output are (B, *shape).  With guidance, one number or one per sample, both are (2B, *shape): first the
    unconditional half, then the conditional one, combined as u + guidance (c - u) (Ho & Salimans 2022), rescaled by
    ``rescale`` (Lin et al. 2023).  ``threshold``: the quantile of dynamic thresholding (Saharia et al. 2022),
    0 for none.  Raises :class:`Cancelled` where ``watch`` says so.
    """
    keys = noise.seed_tensor(seeds, device)
    scale = guidance_tensor(guidance, len(keys), device)
    rows = torch.from_numpy(plan.rows).to(device=device, dtype=torch.float32)
    x = noise.initial(keys, shape).mul_(plan.initial)
    given = (x * plan.first_input).to(dtype)
    if guidance is not None:
        given = torch.cat([given, given])
    history = torch.empty((2 * kernel.SLOTS, *x.shape), dtype=torch.float32, device=device)
    mask, known = (None, None) if inpaint is None else inpaint.expanded(x)
    options = (rescale, threshold, mask, known)
    for i in range(len(plan)):
        watch.before(i, len(plan))
        out = model(i, given)
        x, given, denoised = torch.ops.fusegen.sampler_step(x, out, rows[i], history, keys, scale, *options)
        watch.after(i + 1, len(plan), denoised)
    return x


def guidance_tensor(guidance: float | Sequence[float] | None, batch: int, device: str | torch.device) -> Tensor:
    """(B,) float32; ones, which no kernel reads, without guidance."""
    values = [1.0 if guidance is None else guidance] * batch if not isinstance(guidance, Sequence) else list(guidance)
    if len(values) != batch:
        raise RequestError(f"{len(values)} guidance values for {batch} seeds", "guidance", "give one, or one a seed")
    return torch.tensor(values, dtype=torch.float32, device=device)
