"""The denoising loop: from noise to a sample, with any model that can be called and any sampler's coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fusegen.kernels import sampler_step as kernel
from fusegen.runtime import noise
from fusegen.runtime.errors import Cancelled, RequestError
from fusegen.runtime.sampler import Coefficients

Model = Callable[[int, Tensor], Tensor]
Progress = Callable[[int, int], object]
Preview = Callable[[int, Tensor], object]


class Event(Protocol):
    """What cancels from another thread; ``threading.Event`` is one."""

    def is_set(self) -> bool: ...


Cancel = Event | Callable[[], bool]


def cancelled(cancel: Cancel | None) -> bool:
    """Whether the caller has asked to stop."""
    if cancel is None:
        return False
    return bool(cancel() if callable(cancel) else cancel.is_set())


@torch.inference_mode()
def denoise(
    model: Model,
    plan: Coefficients,
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    guidance: float | Sequence[float] | None = None,
    rescale: float = 0.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    preview: Preview | None = None,
    cancel: Cancel | None = None,
) -> Tensor:
    """Run ``plan`` and return the samples, (B, *shape) float32, one per seed.

    ``model(i, x)`` is evaluation i (from 0, at time ``plan.times[i]``) of x in ``dtype``.  Without ``guidance`` x and
    its output are (B, *shape).  With guidance, one number or one per sample, both are (2B, *shape): first the
    unconditional half, then the conditional one, combined as u + guidance (c - u) (Ho & Salimans 2022), rescaled by
    ``rescale`` (Lin et al. 2023).  ``progress(done, total)`` and ``preview(done, denoised)`` (float32, (B, *shape))
    follow every evaluation.  ``cancel`` is asked before each; :class:`Cancelled` says how far it got.
    """
    keys = noise.seed_tensor(seeds, device)
    batch, total = len(keys), len(plan)
    scale = guidance_tensor(guidance, batch, device)
    rows = torch.from_numpy(plan.rows).to(device=device, dtype=torch.float32)
    x = noise.initial(keys, shape).mul_(plan.initial)
    given = (x * plan.first_input).to(dtype)
    if guidance is not None:
        given = torch.cat([given, given])
    history = torch.empty((2 * kernel.SLOTS, *x.shape), dtype=torch.float32, device=device)
    for i in range(total):
        if cancelled(cancel):
            raise Cancelled("the generation was cancelled", f"after {i} of {total} evaluations")
        out = model(i, given)
        x, given, denoised = torch.ops.fusegen.sampler_step(x, out, rows[i], history, keys, scale, rescale)
        if preview is not None:
            preview(i + 1, denoised)
        if progress is not None:
            progress(i + 1, total)
    return x


def guidance_tensor(guidance: float | Sequence[float] | None, batch: int, device: str | torch.device) -> Tensor:
    """(B,) float32; ones, which no kernel reads, without guidance."""
    values = [1.0 if guidance is None else guidance] * batch if not isinstance(guidance, Sequence) else list(guidance)
    if len(values) != batch:
        raise RequestError(f"{len(values)} guidance values for {batch} seeds", "guidance", "give one, or one a seed")
    return torch.tensor(values, dtype=torch.float32, device=device)
