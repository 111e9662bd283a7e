"""Adaptive discriminator augmentation (Karras et al. 2020b, arXiv:2006.06676).

What the discriminator sees, real or generated, is first flipped, turned, moved, scaled and recoloured at random, each
with probability p, which follows how much the discriminator overfits.  The geometric changes are one matrix and one
bilinear resampling, in which what lies outside of a picture is its edge; the changes of colour are another matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = np.full(3, 1 / math.sqrt(3))  # the axis of grey


def _linear(a: float, b: float, c: float, d: float) -> np.ndarray:
    return np.array([[a, b, 0], [c, d, 0], [0, 0, 1.0]])


def _turn(angle: float) -> np.ndarray:
    return _linear(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))


def _move(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def geometry(rng: np.random.Generator, p: float, size: int) -> np.ndarray:
    """(2, 3): where each pixel of the result comes from, in [-1, 1]; the changes and strengths of the paper's table."""
    m = np.eye(3)
    if rng.random() < p and rng.random() < 0.5:
        m = m @ _linear(-1, 0, 0, 1)
    if rng.random() < p:
        m = m @ _turn(math.pi / 2 * rng.integers(4))
    if rng.random() < p:  # whole pixels, up to an eighth of the side
        m = m @ _move(*(np.round(rng.uniform(-0.125, 0.125, 2) * size) * 2 / size))
    if rng.random() < p:
        scale = 2 ** (0.2 * rng.standard_normal())
        m = m @ _linear(scale, 0, 0, scale)
    turned = 1 - math.sqrt(1 - p)  # a rotation before and one after the stretch: p that there is any
    if rng.random() < turned:
        m = m @ _turn(rng.uniform(-math.pi, math.pi))
    if rng.random() < p:
        stretch = 2 ** (0.2 * rng.standard_normal())
        m = m @ _linear(stretch, 0, 0, 1 / stretch)
    if rng.random() < turned:
        m = m @ _turn(rng.uniform(-math.pi, math.pi))
    if rng.random() < p:
        m = m @ _move(*(0.25 * rng.standard_normal(2)))
    return m[:2]


def colour(rng: np.random.Generator, p: float) -> np.ndarray:
    """(3, 4): brightness, contrast, inverted luma, hue and saturation, as one matrix and what is added."""
    m, grey = np.eye(4), np.zeros((4, 4))
    grey[:3, :3] = np.outer(LUMA, LUMA)
    if rng.random() < p:
        m[:3, 3] += 0.2 * rng.standard_normal()
    if rng.random() < p:
        m = np.diag([*[2 ** (0.5 * rng.standard_normal())] * 3, 1]) @ m
    if rng.random() < p and rng.random() < 0.5:
        m = (np.eye(4) - 2 * grey) @ m
    if rng.random() < p:
        angle, (x, y, z) = rng.uniform(-math.pi, math.pi), LUMA
        turn, across = np.eye(4), np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        turn[:3, :3] = math.cos(angle) * np.eye(3) + math.sin(angle) * across + (1 - math.cos(angle)) * grey[:3, :3]
        m = turn @ m
    if rng.random() < p:
        rest = np.diag([1.0, 1, 1, 0]) - grey
        m = (np.diag([0, 0, 0, 1.0]) + grey + rest * 2 ** rng.standard_normal()) @ m
    return m[:3]


@dataclass(frozen=True)
class Changes:
    """What happens to each picture of a batch: ``where`` (B, 2, 3), ``colour`` (B, 3, 4), float32."""

    where: Tensor
    colour: Tensor

    @classmethod
    def drawn(cls, rng: np.random.Generator, p: float, count: int, size: int, device: str) -> Changes:
        """The changes of ``count`` pictures of ``size`` pixels a side, each with probability ``p`` in [0, 1]."""
        drawn = [(geometry(rng, p, size), colour(rng, p)) for _ in range(count)]
        where, colours = (torch.from_numpy(np.stack(m)).float().to(device) for m in zip(*drawn, strict=True))
        return cls(where, colours)

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` (B, 3, H, W), float32, changed."""
        grid = F.affine_grid(self.where, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        flat = self.colour[:, :, :3] @ moved.flatten(2) + self.colour[:, :, 3:]
        return flat.view_as(images)


@dataclass
class Adaptive:
    """p, raised while the discriminator's real logits are more often positive than ``target`` says, else lowered.

    r = E[sign D(real)] (equation 1) is taken over ``EVERY`` steps; p goes from 0 to 1 in ``images`` pictures at most.
    """

    EVERY = 4
    p: float = 0.0
    signs: float = 0.0  # summed since p last changed
    target: float = 0.6
    images: int = 50_000

    def observe(self, real: Tensor, step: int) -> None:
        """The real logits (B, 1) of step ``step``."""
        self.signs += float(real.detach().sign().mean())
        if step % self.EVERY == self.EVERY - 1:
            change = math.copysign(len(real) * self.EVERY / self.images, self.signs / self.EVERY - self.target)
            self.p, self.signs = min(max(self.p + change, 0.0), 1.0), 0.0
