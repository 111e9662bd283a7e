"""Latent spaces of generators: z, where noise is drawn, and w, what a mapping network makes of it.

The statistics of w that a bundle brings (``latents.safetensors``), what is done with them, and walks in either space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusegen.runtime.errors import FileError
from fusegen.runtime.read import safetensors

MEMBER = "latents.safetensors"
SHAPES = {"w_mean": "(W,)", "directions": "(K, W)", "deviations": "(K,)"}
UNIT = 1e-3  # how far a direction's length may be from 1


@dataclass(frozen=True)
class Latents:
    """The mean of w (W,), unit directions (K, W) in it, and the standard deviation (K,) of w along each; float32."""

    w_mean: Tensor
    directions: Tensor
    deviations: Tensor

    @classmethod
    def read(cls, data: bytes, width: int, where: str) -> Latents:
        """From a safetensors file whose w has ``width`` elements; FileError for one that is not as it should be."""
        found = safetensors.read(bytearray(data), 0, len(data), where)
        if found.keys() != SHAPES.keys():
            raise FileError(f"it holds {', '.join(sorted(found)) or 'nothing'}", where, f"it needs {', '.join(SHAPES)}")
        count = len(found["deviations"]) if found["deviations"].ndim else 0
        sizes = {"w_mean": (width,), "directions": (count, width), "deviations": (count,)}
        for name, tensor in found.items():
            if tuple(tensor.shape) != sizes[name] or tensor.dtype != torch.float32:
                what = f"{name} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
                raise FileError(what, where, f"it must be float32 {SHAPES[name]}, W = {width}")
            if not bool(torch.isfinite(tensor).all()):
                raise FileError(f"{name} has values that are not finite", where)
        if bool((found["deviations"] < 0).any()):
            raise FileError("a deviation is negative", where)
        if bool(((found["directions"].norm(dim=1) - 1).abs() > UNIT).any()):
            raise FileError("a direction is not of length 1", where)
        return cls(**found)

    def to(self, device: str) -> Latents:
        """The same on ``device``."""
        return Latents(*(t.to(device) for t in (self.w_mean, self.directions, self.deviations)))

    def styles(self, w: Tensor, layers: int, psi: float, cutoff: int) -> Tensor:
        """w (B, W) for each layer, (B, layers, W), in the first ``cutoff`` drawn towards the mean: w_mean +
        psi (w - w_mean) (Karras et al. 2019, appendix B).

        Each operation rounds once, so that the bits of a row do not depend on the others.
        """
        ws = w[:, None].repeat(1, layers, 1)
        if psi != 1:
            ws[:, :cutoff] = (self.w_mean + psi * (w - self.w_mean))[:, None]
        return ws

    def shift(self, edit: Mapping[int, float]) -> Tensor:
        """What is added to w (W,): for each direction, its amount times the deviation (Härkönen et al. 2020)."""
        out = torch.zeros_like(self.w_mean)
        for direction, amount in edit.items():
            out += amount * self.deviations[direction] * self.directions[direction]
        return out


@dataclass(frozen=True)
class Between:
    """A frame of a walk: from key ``first`` towards key ``second`` by the part ``t``, 0 <= t < 1."""

    first: int
    second: int
    t: float


def path(keys: int, frames: int, loop: bool) -> list[Between]:
    """A walk of ``frames`` that stands on each of ``keys`` once, evenly apart to within a frame; with ``loop`` it goes
    on from the last key towards the first, else it ends on the last.  ``2 <= keys <= frames``."""
    if loop:
        places = [k * frames // keys for k in range(keys + 1)]
    else:
        places = [k * (frames - 1) // (keys - 1) for k in range(keys)]
    out = []
    for k, (low, high) in enumerate(zip(places, places[1:], strict=False)):
        out += [Between(k, (k + 1) % keys, (frame - low) / (high - low)) for frame in range(low, high)]
    return out if loop else [*out, Between(keys - 1, keys - 1, 0.0)]


def lerp(keys: Tensor, frames: list[Between]) -> Tensor:
    """Straight lines between ``keys`` (n, *shape): (frames, *shape)."""
    a, b, t = _ends(keys, frames)
    return a + t * (b - a)


def slerp(keys: Tensor, frames: list[Between]) -> Tensor:
    """Arcs between ``keys`` (n, *shape) at an even pace (Shoemake 1985; White 2016): (frames, *shape).

    The length goes evenly from one key's to the other's, so between points of one length it is kept.  Worked out in
    float64; keys that lie on one line through 0 have no arc, and the straight line is taken.
    """
    a, b, t = _ends(keys.double().flatten(1), frames)
    long_a, long_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    a, b = a / long_a.clamp(min=1e-30), b / long_b.clamp(min=1e-30)
    angle = torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True)) * 2
    sine = torch.sin(angle)
    flat = sine < 1e-7
    safe = torch.where(flat, torch.ones_like(sine), sine)
    from_a = torch.where(flat, 1 - t, torch.sin((1 - t) * angle) / safe)
    from_b = torch.where(flat, t, torch.sin(t * angle) / safe)
    arc = (from_a * a + from_b * b) * (long_a + t * (long_b - long_a))
    return arc.to(keys.dtype).reshape(len(frames), *keys.shape[1:])


def _ends(keys: Tensor, frames: list[Between]) -> tuple[Tensor, Tensor, Tensor]:
    first, second = ([getattr(f, end) for f in frames] for end in ("first", "second"))
    t = torch.tensor([f.t for f in frames], dtype=keys.dtype, device=keys.device)
    return keys[first], keys[second], t.reshape(-1, *[1] * (keys.ndim - 1))
