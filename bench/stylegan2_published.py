"""StyleGAN2's synthesis network as it was published: the fused form of the modulated convolution, in NCHW.

A sample's weights are modulated and demodulated, and a batch is one grouped convolution (NVlabs, stylegan2-ada-pytorch,
``fused_modconv=True``); an upsampling layer is a transposed convolution, then its filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.models.stylegan2 import StyleGAN2Config


def synthesis(state: Mapping[str, Tensor], cfg: StyleGAN2Config, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The network of a state dict under its published names, computing in ``dtype``: (ws (B, L, W), then a noise
    (B, 1, r, r) for each layer) -> the picture (B, 3, R, R)."""
    own = {name: value.to(dtype) for name, value in state.items()}

    def call(ws: Tensor, *noises: Tensor) -> Tensor:
        with torch.inference_mode():
            return _picture(own, cfg, ws.to(dtype), [noise.to(dtype) for noise in noises])

    return call


def _picture(own: Mapping[str, Tensor], cfg: StyleGAN2Config, ws: Tensor, noises: list[Tensor]) -> Tensor:
    left, at = iter(noises), 0
    x, image = own["b4.const"].expand(len(ws), -1, -1, -1), None
    for r in cfg.resolutions:
        for name in ("conv0", "conv1") if r > 4 else ("conv1",):
            x = _layer(own, f"b{r}.{name}", x, ws[:, at], next(left), name == "conv0")
            at += 1
        weight = own[f"b{r}.torgb.weight"]
        style = _styles(own, f"b{r}.torgb", ws[:, at]) / math.sqrt(weight.shape[1])
        rgb = _modulated(x, weight, style, False) + own[f"b{r}.torgb.bias"].reshape(1, -1, 1, 1)
        image = rgb if image is None else _larger(image, own[f"b{r}.resample_filter"]) + rgb
    assert image is not None
    return image


def _layer(own: Mapping[str, Tensor], name: str, x: Tensor, w: Tensor, noise: Tensor, up: bool) -> Tensor:
    taps = own[f"{name}.resample_filter"] if up else None
    x = _modulated(x, own[f"{name}.weight"], _styles(own, name, w), True, taps)
    x = x + noise * own[f"{name}.noise_strength"] + own[f"{name}.bias"].reshape(1, -1, 1, 1)
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def _styles(own: Mapping[str, Tensor], name: str, w: Tensor) -> Tensor:
    weight = own[f"{name}.affine.weight"]
    return F.linear(w, weight / math.sqrt(weight.shape[1]), own[f"{name}.affine.bias"])


def _modulated(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool, taps: Tensor | None = None) -> Tensor:
    """A convolution by each sample's own weights; with ``taps`` of twice the size, then that filter."""
    own = weight[None] * style[:, None, :, None, None]
    if demodulate:
        own = own * (own.float().square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt().to(own.dtype)
    batch, outputs, side = own.shape[0], own.shape[1], own.shape[3]
    x = x.reshape(1, -1, *x.shape[2:])
    if taps is None:
        y = F.conv2d(x, own.flatten(0, 1), padding=side // 2, groups=batch)
        return y.reshape(batch, outputs, *y.shape[2:])
    y = F.conv_transpose2d(x, own.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
    return _filtered(y.reshape(batch, outputs, *y.shape[2:]), taps, (1, 1, 1, 1))


def _larger(image: Tensor, taps: Tensor) -> Tensor:
    """Twice the size: zeros between the pixels, then the filter."""
    spread = F.pad(image[:, :, :, None, :, None], (0, 1, 0, 0, 0, 1)).flatten(4, 5).flatten(2, 3)
    return _filtered(spread, taps, (2, 1, 2, 1))


def _filtered(x: Tensor, taps: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    kernel = (4 * taps).flip(0, 1).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, padding), kernel, groups=x.shape[1])
