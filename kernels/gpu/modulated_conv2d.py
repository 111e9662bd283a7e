"""Modulated convolution on NVIDIA GPUs: an implicit product of matrices, pixels by channels out.

A first launch multiplies x by the styles, channels innermost, and lays the weights out anew, taps outermost, so that
the product copies both straight into shared memory, 16 bytes a thread; it also squares the weights for the norms of the
second.  Norm, noise, bias and activation follow on the accumulator.  Styles are divided by their largest magnitude and
the result multiplied by it, so that half precision does not overflow.  A transposed convolution runs phase by phase: an
output of one phase meets every up-th tap.  Few pixels need none of this: see :mod:`.modulated_few`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu import modulated_few as few
from fusegen.kernels.gpu.activation import activated
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.modulated_layout import prepared
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.modulated_conv2d import finish, sizes
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last

X, WEIGHT, STYLES, NOISE, BIAS = range(5)  # positions of the tensors in the schema
SMALLEST = 16  # tl.dot's least extent


@triton.jit
def modulated_kernel(
    scaled, packed, norms, noise, bias, out, padded, outputs, height, width, out_y, out_x, pad_y, pad_x,
    y_b, y_c, y_y, y_x, n_b, n_y, n_x, tiles_y, tiles_x, alpha, gain, clamp,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, UP: tl.constexpr, NOISE: tl.constexpr, BIAS: tl.constexpr,
    ACT: tl.constexpr, CLAMP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCKS_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS x COLS outputs of one phase and BLOCK_O channels of one sample."""
    pid = tl.program_id(0)
    tile_x, rest = pid % tiles_x, pid // tiles_x
    tile_y, block_o = rest % tiles_y, rest // tiles_y
    phase, b = tl.program_id(1) % (UP * UP), (tl.program_id(1) // (UP * UP)).to(tl.int64)
    phase_y, phase_x = phase // UP, phase % UP
    near = tl.arange(0, ROWS * COLS)
    q_y, q_x = tile_y * ROWS + near // COLS, tile_x * COLS + near % COLS
    if UP == 1:  # output q meets tap k at input q - pad + k
        first_y, first_x, at_y, at_x = 0, 0, q_y - pad_y, q_x - pad_x
        met_y, met_x, step = TAPS_Y, TAPS_X, 1
    else:  # output UP q + phase meets tap first + UP j at input q + (phase + pad) // UP - j
        first_y, first_x = (phase_y + pad_y) % UP, (phase_x + pad_x) % UP
        at_y, at_x = q_y + (phase_y + pad_y) // UP, q_x + (phase_x + pad_x) // UP
        met_y = tl.maximum(TAPS_Y - first_y + UP - 1, 0) // UP
        met_x = tl.maximum(TAPS_X - first_x + UP - 1, 0) // UP
        step = -1
    o = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    scaled += b * height * width * padded
    acc = tl.zeros((ROWS * COLS, BLOCK_O), tl.float32)
    for k in range(met_y * met_x * BLOCKS_I):
        block_i, j = k % BLOCKS_I, k // BLOCKS_I
        j_y, j_x = j // met_x, j % met_x
        c = block_i * BLOCK_I + i
        y, z = at_y + j_y * step, at_x + j_x * step
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        start = (y * width + z).to(tl.int64) * padded
        tile = tl.load(scaled + start[:, None] + c[None, :], inside[:, None] & (c < padded)[None, :], 0.0)
        tap = (first_y + UP * j_y) * TAPS_X + first_x + UP * j_x
        w_at = packed + (tap * outputs + o[None, :]).to(tl.int64) * padded + c[:, None]
        w = tl.load(w_at, mask=(c < padded)[:, None] & (o < outputs)[None, :], other=0.0)
        acc = tl.dot(tile, w, acc, input_precision=PRECISION)
    acc *= tl.load(norms + b * outputs + o, mask=o < outputs, other=0.0)[None, :]
    o_y, o_x = q_y * UP + phase_y, q_x * UP + phase_x
    keep = (o_y < out_y) & (o_x < out_x)
    if NOISE:
        where = b * n_b + o_y.to(tl.int64) * n_y + o_x * n_x
        acc += tl.load(noise + where, mask=keep, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, alpha, ACT) * gain
    if CLAMP:
        acc = tl.where(acc > clamp, clamp, tl.where(acc < -clamp, -clamp, acc))  # NaN stays
    to = out + b * y_b + (o_y.to(tl.int64) * y_y + o_x.to(tl.int64) * y_x)[:, None] + o[None, :].to(tl.int64) * y_c
    tl.store(to, acc.to(out.dtype.element_ty), mask=keep[:, None] & (o < outputs)[None, :])


@dataclass(frozen=True)
class Config:
    """Tiles of ``pixels`` by ``outputs`` by ``channels``, and how a program runs.  ``splits``: with few pixels, the
    parts that sums are made in, ``channels`` counting (channel, tap) pairs; 0 where the weights are laid out anew."""

    pixels: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int
    splits: int = 0


def key(x: Tensor, weight: Tensor, styles: Tensor, *rest: Any) -> str:
    """Everything but the batch."""
    s = sizes(x, weight, styles, *rest)
    layout = "last" if is_channels_last(x) else "first"
    kind = str(x.dtype).removeprefix("torch.")
    rows = " rows" if few.serves(x, weight, styles, *rest) else ""
    return f"{s.channels}-{s.outputs} {s.height}x{s.width} {s.taps_y}x{s.taps_x} up{s.up} {layout} {kind}{rows}"


def _quarter(x: Tensor, *rest: Any) -> tuple[int, int]:
    """Outputs of one phase along y and x."""
    s = sizes(x, *rest)
    return blocks(s.out_y, s.up), blocks(s.out_x, s.up)


def default(x: Tensor, weight: Tensor, *rest: Any, limit: int = 0) -> Config:
    """128 pixels by 128 channels where there are so many; less where that leaves most of the chip idle."""
    rows, cols = _quarter(x, weight, *rest)
    if few.serves(x, weight, *rest):
        outputs = 32 if rows * cols <= 64 else 64  # each block of outputs gathers all that the pixels meet
        return _few(x, weight, *rest, outputs=outputs, channels=64 if x.dtype == torch.float32 else 128)
    wide = x.dtype == torch.float32
    most = 64 if wide and sizes(x, weight, *rest).up > 1 else 128  # or an sm_80 spills thousands of registers
    pixels = max(SMALLEST, min(128, power(rows) * power(cols)))
    outputs = max(SMALLEST, min(most if pixels >= 128 and rows * cols > 1024 else 32, power(weight.shape[0])))
    warps = 8 if pixels * outputs > (4096 if wide else 8192) else 4
    channels = max(SMALLEST, min(32 if wide else 64, power(x.shape[1])))
    return Config(pixels, outputs, channels, warps, 3 if wide or warps == 8 else 4)


def _few(x: Tensor, weight: Tensor, *rest: Any, outputs: int, channels: int, num_warps: int = 0) -> Config:
    s = sizes(x, weight, *rest)
    pixels = max(SMALLEST, min(32, power(s.out_y * s.out_x)))
    channels = max(SMALLEST, min(channels, power(s.channels * s.taps_y * s.taps_x)))
    splits = few.splits(x, weight, pixels, outputs, channels, *rest)
    warps = num_warps or (8 if pixels * channels * x.element_size() > 4096 else 4)
    return Config(pixels, outputs, channels, warps, 5, splits)


def space(x: Tensor, weight: Tensor, *rest: Any) -> Iterator[Config]:
    """Tiles of 32 to 256 pixels by 32 to 128 channels; with few pixels, 16 to 64 outputs by parts of sums."""
    if few.serves(x, weight, *rest):
        for outputs in (16, 32, 64):
            for channels in (64, 128, 256):
                for warps in (4, 8):
                    yield _few(x, weight, *rest, outputs=outputs, channels=channels, num_warps=warps)
    rows, cols = _quarter(x, weight, *rest)
    channels = max(SMALLEST, min(32 if x.dtype == torch.float32 else 64, power(x.shape[1])))
    for pixels in (32, 64, 128, 256):
        for outputs in (32, 64, 128):
            fits = pixels <= 2 * power(rows * cols) and outputs <= max(32, power(weight.shape[0]))
            if fits and pixels * outputs <= 16384:
                for stages in (3, 4):
                    yield Config(pixels, outputs, channels, 8 if pixels * outputs >= 8192 else 4, stages)


def _values(y: Tensor, args: tuple[Any, ...], config: Config) -> dict[str, Any]:
    """What the kernels of few and of many pixels are given."""
    x, _, _, noise, bias, _, up = args[:7]
    s, found = sizes(*args[:8]), finish("modulated_conv2d", *args[8:12])
    values = {f"x_{n}": t for n, t in zip("bcyx", x.stride(), strict=True)}
    values |= {f"y_{n}": t for n, t in zip("bcyx", y.stride(), strict=True)}
    return values | {
        "x": Use(X), "weight": Use(WEIGHT), "styles": Use(STYLES), "out": y,
        "noise": Use(X) if noise is None else Use(NOISE), "bias": Use(X) if bias is None else Use(BIAS),
        "outputs": s.outputs, "channels": s.channels, "height": s.height, "width": s.width,
        "out_y": s.out_y, "out_x": s.out_x, "pad_y": s.pad_y, "pad_x": s.pad_x,
        "n_b": 0 if noise is None or noise.shape[0] == 1 else noise.stride(0),
        "n_y": 0 if noise is None else noise.stride(2), "n_x": 0 if noise is None else noise.stride(3),
        "alpha": found.alpha, "gain": found.gain, "clamp": found.clamp,
        "TAPS_Y": s.taps_y, "TAPS_X": s.taps_x, "UP": up, "NOISE": noise is not None, "BIAS": bias is not None,
        "ACT": found.act, "CLAMP": found.clamp != float("inf"), "BLOCK_O": config.outputs,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch for few pixels; else what is laid out, norms, convolution."""
    x, up, (y,) = args[X], args[6], outs
    if not y.numel():
        return ()
    s = sizes(*args[:8])
    values = _values(y, args, config)
    if config.splits:
        return (few.stage(values, args, config),)
    padded = blocks(s.channels, 16) * 16  # rows of channels begin on wide boundaries
    packed = torch.empty((s.taps_y * s.taps_x, s.outputs, padded), dtype=x.dtype, device=x.device)
    scaled = torch.empty((s.batch, s.height, s.width, padded), dtype=x.dtype, device=x.device)
    norms = torch.empty((s.batch, s.outputs), dtype=torch.float32, device=x.device)
    rows, cols = blocks(s.out_y, up), blocks(s.out_x, up)
    tile_x = min(config.pixels, power(cols))
    tile_y = config.pixels // tile_x
    tiles_y, tiles_x = blocks(rows, tile_y), blocks(cols, tile_x)
    values |= {"padded": padded, "packed": packed, "scaled": scaled, "norms": norms}
    values |= {"tiles_y": tiles_y, "tiles_x": tiles_x, "ROWS": tile_y, "COLS": tile_x, "BLOCK_I": config.channels}
    values["BLOCKS_I"] = blocks(padded, config.channels)
    values = {name: values[name] for name in modulated_kernel.arg_names}
    grid = (tiles_y * tiles_x * blocks(s.outputs, config.outputs), s.batch * up * up)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (*prepared(args, packed, scaled, norms), Stage(modulated_kernel, grid, values, options))


def decline(x: Tensor, *rest: Any) -> str | None:
    """More samples and phases than a grid's second dimension holds, and dtypes without a product."""
    s = sizes(x, *rest)
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if s.batch * s.up * s.up > 65535:
        return f"{s.batch} samples of {s.up * s.up} phases are beyond the grid's second dimension (65535)"
    return None


def small(x: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(16, 16, 16, 4, 2)
    if few.serves(x, *rest):
        yield _few(x, *rest, outputs=16, channels=16)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for name, last in (("512 32x32", False), ("512 32x32 channels-last", True)):
            layout = torch.channels_last if last else torch.contiguous_format
            x = torch.empty(1, 512, 32, 32, dtype=dtype, device="meta", memory_format=layout)
            own = (meta(512, 512, 3, 3, dtype=dtype), meta(1, 512, dtype=dtype))
            after = (meta(1, 1, 32, 32, dtype=dtype), meta(512, dtype=dtype))
            layer = (True, 1, [1, 1], "lrelu", None, None, 256.0, 1e-8)
            yield f"{kind} {name}", lambda a=(x, *own, *after, *layer): a  # type: ignore[misc]
            rest = (True, 2, [0, 0], "linear", None, None, None, 1e-8)
            yield f"{kind} {name} transposed", lambda a=(x, *own, None, None, *rest): a  # type: ignore[misc]
        x = meta(1, 512, 4, 4, dtype=dtype)
        after = (meta(1, 1, 4, 4, dtype=dtype), meta(512, dtype=dtype))
        yield f"{kind} 512 4x4", lambda a=(x, *own, *after, *layer): a  # type: ignore[misc]
        yield f"{kind} 512 4x4 transposed", lambda a=(x, *own, None, None, *rest): a  # type: ignore[misc]


TUNABLE = Tunable("modulated_conv2d", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("modulated_conv2d.triton", "cuda", decline, TUNABLE.bind)]
