"""Group normalization on NVIDIA GPUs: see group_norm_kernels.py.

What :mod:`.join_group_norm` needs as well: which launches serve a shape, and their values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.gpu import group_norm_kernels as kernels
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "weight": 2, "bias": 3, "add": 6, "scale": 7, "shift": 8, "moments": 9}  # positions in the schema
SLAB = 81920  # bytes of the padded tiles that a one-launch program may hold in registers: 80 elements a thread, or 40
SOURCE = Path(kernels.__file__)
_FLAGS = {"WEIGHT": "weight", "BIAS": "bias", "PLUS": "add", "SCALE": "scale", "SHIFT": "shift"}


@dataclass(frozen=True)
class Config:
    """``slab``: one launch instead of two; ``block``: elements that a program loads at a time; ``channels``: of them in
    a row; ``chunks``: at most so many parts of a channel, each a program's."""

    slab: bool
    block: int
    channels: int
    num_warps: int
    chunks: int = 1


@dataclass(frozen=True)
class Problem:
    """What is normalized: sizes, and whether channels are nearer in memory than pixels."""

    channels: int
    pixels: int
    groups: int
    last: bool
    dtype: torch.dtype

    @property
    def slab(self) -> tuple[int, int, int]:
        """(channels, pixels, tiles) that hold a whole slab.  Where channels are innermost one tile takes all of them:
        several would each read all lines of memory."""
        per, most = self.channels // self.groups, power(self.channels // self.groups)
        sizes = [most] if self.last else [most >> i for i in range(most.bit_length())]
        channels = next(c for c in sizes if self.last or 7 * (blocks(per, c) * c - per) <= per)
        return channels, power(self.pixels), blocks(per, channels)

    @property
    def reach(self) -> int:
        """Elements of the padded tiles of a slab; where channels are innermost at least 64 bytes of each pixel, which
        memory moves at the least."""
        channels, pixels, tiles = self.slab
        return max(channels * tiles, 64 // self.dtype.itemsize if self.last else 1) * pixels

    def key(self, what: str) -> str:
        """Everything but the batch; ``what`` else the best choice depends on."""
        layout, dtype = "last" if self.last else "first", str(self.dtype).removeprefix("torch.")
        return f"{self.channels}x{self.pixels} {self.groups} {layout} {dtype} {what}"

    def tiled(self, warps: int, depth: int, programs: int, wide: int = 32) -> Config:
        """Two launches by ``depth`` tiles of 8 elements a thread, with about ``programs`` programs a sample.

        A row has ``wide`` channels where those are innermost, else the fewest that leave no pixel out of reach.  Every
        program combines all chunks of its channels, so there are at most 64.
        """
        block = 256 * warps * depth
        channels = wide if self.last else max(1, block // power(self.pixels))
        channels = min(channels, power(self.channels), 64)
        parts = power(programs // blocks(self.channels, channels))
        return Config(False, block, channels, warps, min(64, parts, power(blocks(self.pixels * channels, block))))

    def default(self, moments: bool = False) -> Config:
        """One launch where a slab is small; else tiles, of more warps where a program goes through many."""
        channels, pixels, _ = self.slab
        if self.reach <= 20480 and self.reach * self.dtype.itemsize <= SLAB and not moments:
            return Config(True, channels * pixels, channels, max(1, min(16, channels * pixels // 256)))
        if self.last:
            return self.tiled(16 if self.pixels >= 32768 else 8, 4, 256)
        return self.tiled(8, 4, 512)

    def space(self, moments: bool = False) -> Iterator[Config]:
        """The slab with more or fewer warps up to its limit; steps of 8, 16 or 32 KiB of bfloat16."""
        channels, pixels, tiles = self.slab
        tile = channels * pixels
        for warps in (4, 8, 16, 32):
            held = tile * tiles * self.dtype.itemsize
            if held <= SLAB and tile // (32 * warps) >= 4 and tile * tiles // (32 * warps) <= 80 and not moments:
                yield Config(True, tile, channels, warps)
        if self.reach >= 4096 or moments:
            for warps, depth in ((4, 4), (8, 2), (8, 4), (16, 4)):
                for programs in (256, 512):
                    yield from (self.tiled(warps, depth, programs, wide) for wide in ((32, 64) if self.last else (1,)))


def problem(x: Tensor, groups: int, channels: int | None = None) -> Problem:
    """The problem of x, or of something like it with other channels."""
    last = x.dim() > 2 and x.shape[1] > 1 and x.stride(1) < max(x.stride()[2:])
    return Problem(channels or x.shape[1], math.prod(x.shape[2:]), groups, last, x.dtype)


def spatial(x: Tensor) -> tuple[int, int] | None:
    """Pixels of ``x`` (B, C, *) and the stride between them, or None where one stride does not serve."""
    size, stride = 1, 0
    for n, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if n == 1:
            continue
        if size > 1 and step != size * stride:
            return None
        size, stride = size * n, stride if size > 1 else step
    return (size, stride) if x.numel() else (math.prod(x.shape[2:]), stride)


def _strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    found = spatial(tensor)
    assert found is not None
    return {f"{prefix}_b": tensor.stride(0), f"{prefix}_c": tensor.stride(1), f"{prefix}_s": found[1]}


def _values(
    outs: tuple[Tensor, ...], args: tuple[Any, ...], roles: Mapping[str, int], given: Problem, join: int
) -> dict[str, Any]:
    """The values of every parameter that does not depend on the configuration, by name."""
    x, y = args[roles["x"]], outs[0]
    there = {n: args[roles[n]] for n in roles if args[roles[n]] is not None}
    values: dict[str, Any] = {n: Use(roles[n] if n in there else roles["x"]) for n in ("other", *_FLAGS.values())}
    values |= {"x": Use(roles["x"]), "joined": outs[-1], "y": y}
    values |= _strides("x", x) | _strides("o", there.get("other", x)) | _strides("y", y)
    values |= {"j_b": values["y_b"], "j_c": values["y_c"], "j_s": values["y_s"]}
    for name in ("add", "scale", "shift"):
        step = there[name].stride(0) if name in there and there[name].shape[0] > 1 else 0
        values |= {f"{name}_b": step, f"{name}_c": there[name].stride(1) if name in there else 0}
    values |= {"channels": given.channels, "groups": given.groups, "PER_GROUP": given.channels // given.groups}
    values |= {"pixels": given.pixels, "split": x.shape[1], "JOIN": join}
    return values | {flag: name in there for flag, name in _FLAGS.items()}


def launches(
    outs: tuple[Tensor, ...],
    args: tuple[Any, ...],
    config: Config,
    roles: Mapping[str, int],
    given: Problem,
    eps: float,
    silu: bool,
    join: int = 0,
) -> tuple[Stage, ...]:
    """The launches for ``config``; the scratch of partial statistics is theirs.

    ``roles``: a parameter of the kernels -> the position of the argument it takes.  ``join`` says what outs[1] is.
    """
    x = args[roles["x"]]
    if not outs[0].numel():
        return ()
    every = _values(outs, args, roles, given, join) | {"eps": eps, "SILU": silu}
    if not config.slab:
        moments = None if args[roles["moments"]] is None else Use(roles["moments"])
        return _tiled(every, x.shape[0], config, given, moments, outs[-1] if join else None)
    block_c, block_s, tiles = given.slab
    even = (block_c * tiles, block_s) == (every["PER_GROUP"], given.pixels)
    every |= {"BLOCK_C": block_c, "BLOCK_S": block_s, "TILES": tiles, "EVEN": even}
    return (_stage(kernels.slab_kernel, (x.shape[0] * given.groups,), every, config),)


def _tiled(
    every: dict[str, Any], batch: int, config: Config, given: Problem, moments: Use | None, joined: Tensor | None
) -> tuple[Stage, ...]:
    """Statistics and normalization by the same tiles, or that alone by ``moments``."""
    per, tile = every["PER_GROUP"], 256 * config.num_warps
    step = config.block // config.channels
    steps = blocks(blocks(given.pixels, step), config.chunks)
    chunks, covered = blocks(given.pixels, steps * step), steps * step
    grid = (blocks(given.channels, config.channels), chunks, batch)
    every |= {"BLOCK_C": config.channels, "BLOCK_S": tile // config.channels, "DEPTH": config.block // tile}
    every |= {"steps": steps, "chunks": chunks, "covered": covered, "EVEN": given.pixels % covered == 0}
    first: tuple[Stage, ...] = ()
    if moments is None:
        device = every["y"].device
        every["partial"] = torch.empty((batch, chunks, 2, given.channels), dtype=torch.float32, device=device)
        first = (_stage(kernels.partial_kernel, grid, every, config),)
        if joined is not None:  # the second launch reads what the first one joined
            every |= {"x": joined, "JOIN": 0} | {f"x_{d}": every[f"y_{d}"] for d in "bcs"}
    else:
        every |= {"partial": moments, "chunks": 1, "covered": given.pixels}
    parts = every["chunks"] * per
    starts = range(0, given.channels, config.channels)
    groups = power(max((min(c + config.channels, given.channels) - 1) // per - c // per + 1 for c in starts))
    width = min(power(parts), max(32, 4096 // groups))
    every |= {"GROUPS": groups, "WIDTH": width, "PARTS": blocks(parts, width), "MOMENTS": moments is not None}
    return (*first, _stage(kernels.apply_kernel, grid, every, config))


def _stage(kernel: Any, grid: tuple[int, ...], every: Mapping[str, Any], config: Config) -> Stage:
    return Stage(kernel, grid, {name: every[name] for name in kernel.arg_names}, {"num_warps": config.num_warps})


def decline(x: Tensor, *rest: Any) -> str | None:
    """Batches beyond the grid's third dimension and layouts without one stride for all pixels."""
    if x.shape[0] > 65535:
        return f"a batch of {x.shape[0]} is beyond the grid's third dimension (65535)"
    if x.numel() and spatial(x) is None:
        return f"the pixels of strides {tuple(x.stride()[2:])} have no single stride"
    return None


def small(x: Tensor, *rest: Any) -> Iterator[Config]:
    """For tests: tiles that cut small cases into chunks of several steps."""
    yield Config(False, 512, 16, 1, 3) if x.dtype == torch.float16 else Config(False, 256, 4, 1, 8)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch or two."""
    return launches(outs, args, config, ROLES, problem(args[0], args[1]), args[4], args[5] == "silu")


def key(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, activation: str, *rest: Any) -> str:
    return problem(x, groups).key(activation + " by moments" * (rest[-1] is not None))


def default(x: Tensor, groups: int, *rest: Any, limit: int = 0) -> Config:
    return problem(x, groups).default(rest[-1] is not None)


def space(x: Tensor, groups: int, *rest: Any) -> Iterator[Config]:
    return problem(x, groups).space(rest[-1] is not None)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            where = "contiguous" if layout == torch.contiguous_format else "channels-last"
            for shape, more in (
                ((2, 320, 64, 64), ""),
                ((2, 320, 64, 64), " add"),
                ((2, 320, 64, 64), " by moments"),
                ((2, 1280, 8, 8), ""),
            ):
                x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
                parameter, time = meta(shape[1], dtype=dtype), meta(*shape[:2], dtype=dtype) if more == " add" else None
                moments = meta(shape[0], 2, shape[1], dtype=torch.float64) if more == " by moments" else None
                args = (x, 32, parameter, parameter, 1e-5, "silu", time, None, None, moments)
                name = f"{kind} {shape[1]}x{shape[2]}x{shape[3]} {where}{more}"
                yield name, lambda args=args: args  # type: ignore[misc]


TUNABLE = Tunable("group_norm", Config, key, default, space, stages, SOURCE, small)
KERNELS = [Kernel("group_norm.triton", "cuda", decline, TUNABLE.bind)]
