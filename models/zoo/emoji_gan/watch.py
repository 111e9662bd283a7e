"""What is seen of a training while it runs: means of the losses, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from fusegen.models.stylegan2 import Generator, StyleGAN2Config


class Losses:
    """Sums of what the steps return, on their device, until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """What one step returned; not every step has every loss."""
        for k, v in losses.items():
            self.sums[k] = self.sums.get(k, torch.zeros_like(v)) + v
            self.counts[k] = self.counts.get(k, 0) + 1

    def means(self) -> dict[str, float]:
        """The means since they were last read."""
        means = {k: round(float(v) / self.counts[k], 5) for k, v in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


@torch.no_grad()
def grid(
    weights: Mapping[str, Tensor],
    cfg: StyleGAN2Config,
    device: str = "cpu",
    psis: Sequence[float] = (1.0, 0.7),
    side: int = 8,
    scale: int = 2,
) -> Image.Image:
    """A generator's pictures of the same ``side`` squared latents at each truncation psi, side by side."""
    net = Generator(cfg).to(device).eval()
    net.load_state_dict(dict(weights))
    random = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=random, device=device)  # noqa: E731
    mean, w = net.mapping(normal(1000, cfg.z_width)).mean(0), net.mapping(normal(side * side, cfg.z_width))
    noise, grids = [normal(*shape) for shape in cfg.noises(side * side)], []
    for psi in psis:
        images = net.synthesis((mean + psi * (w - mean))[:, None].expand(-1, cfg.layers, -1), *noise)
        grids.append(images.unflatten(0, (side, side)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1))
    pixels = torch.cat(grids, dim=1).clamp(-1, 1).add(1).mul(127.5).round().byte()
    picture = Image.fromarray(pixels.cpu().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
