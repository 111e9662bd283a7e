"""From a network's output to pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusegen.runtime.errors import Error

if TYPE_CHECKING:
    from PIL.Image import Image


def pictures(x: Tensor, where: str = "") -> list[Image]:
    """Samples (B, C, H, W) in [-1, 1] as pictures: clamped, and rounded to the nearest of 256 values.

    Raises :class:`Error` where one is not finite.
    """
    from PIL import Image as pil

    if not bool(torch.isfinite(x).all()):
        raise Error("the model gave values that are not finite", where, "load it with dtype='float32'")
    pixels = x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [pil.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
